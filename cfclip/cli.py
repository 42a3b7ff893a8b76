"""``cfclip …``: a thin door to the package's functions."""

from pathlib import Path
from typing import Annotated

import typer

from .domains import DATA

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Counterfactual image manipulation via CLIP.")
toonfaces = typer.Typer(no_args_is_help=True, help="The embedded domain's networks.")
app.add_typer(toonfaces, name="toonfaces")

Name = Annotated[str, typer.Argument(help="generator, clip, heldout_clip, identity, readout, encoder, multi or heldout_multi")]


def _check(name: str) -> None:
    from .toonfaces.cards import NETWORKS
    if name not in NETWORKS:
        raise typer.BadParameter(f"unknown network {name!r}; there are: {', '.join(NETWORKS)}")


@toonfaces.command("train")
def toonfaces_train(
    name: Name,
    steps: Annotated[int | None, typer.Option(help="optimisation steps; default: the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(help="default: the recipe's")] = None,
    out: Annotated[Path | None, typer.Option(help="checkpoints and logs; a stopped run goes on from here")] = None,
    weights: Annotated[Path, typer.Option(help="where the trained file goes")] = DATA / "toonfaces",
) -> None:
    """Train one network, store it with its card. Stop it at any time: the same command goes on."""
    from .toonfaces import cards
    _check(name)
    overrides = {key: value for key, value in {"seed": seed, "steps": steps}.items() if value is not None}
    cards.train(name, out or Path("reports/runs/toonfaces") / name, weights, **overrides)
    typer.echo(cards.write_card(name, weights))


@toonfaces.command("measure")
def toonfaces_measure(name: Annotated[str | None, typer.Argument(help="one network; default: all")] = None) -> None:
    """Measure the committed networks again and rewrite their cards."""
    from .toonfaces import cards
    for one in [name] if name else [known for known in cards.NETWORKS if (DATA / "toonfaces" / f"{known}.safetensors").exists()]:
        _check(one)
        typer.echo(cards.write_card(one))


@toonfaces.command("ceiling")
def toonfaces_ceiling(
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts that name a part's colour; default: two of every part")] = None,
    n: Annotated[int, typer.Option(help="faces per prompt")] = 12,
    steps: Annotated[int, typer.Option(help="of Adam on W+, for the source and again for the edit")] = 150,
    first_layer: Annotated[int, typer.Option(help="the edit changes the layers from this one on; 4: those that colour")] = 4,
    weights: Annotated[Path, typer.Option(help="where the networks are")] = DATA / "toonfaces",
    seed: Annotated[int, typer.Option(help="of the faces")] = 60_000,
    out: Annotated[Path, typer.Option(help="where the table goes")] = Path("reports/ceiling.md"),
) -> None:
    """What any editor of the generator could reach: W+ optimised straight to the rendered true counterfactual."""
    import pandas as pd

    from .domains import load_toonfaces
    from .reporting import markdown
    from .toonfaces.ceiling import PROMPTS, ceiling
    from .training import atomic_save
    domain = load_toonfaces(weights)
    table = pd.DataFrame(ceiling(domain, prompts or PROMPTS, n, steps, seed=seed, first_layer=first_layer))
    columns = ["prompt", "n", *(c for c in ("success_before", "success_after", "true_success_after", "progress", "leakage", "true_leakage",
                                            "identity", "true_identity") if c in table)]
    table = table[columns]
    table.insert(len(columns) - 2, "leakage_beyond", table.leakage - table.true_leakage)
    table.loc[len(table)] = {"prompt": "mean", "n": table.n.sum()} | table.drop(columns=["prompt", "n"]).mean().to_dict()
    note = (f"W+ optimised to held-out renders ({steps} steps of Adam, all layers), then, in the layers from {first_layer} on, to the same "
            f"renders with the part recoloured; n = {n} faces per prompt, seed {seed}, device cpu. true: the renders themselves; leakage beyond: "
            "what the generator adds to theirs. No CLIP and no mapper: what is low here is the generator's limit.")
    text = f"# Ceiling\n\nRewritten by `cfclip toonfaces ceiling`.\n\n{markdown(table, note)}"
    typer.echo(atomic_save(text, out, lambda text, part: part.write_text(text)))


@app.command("sweep")
def run_sweep(
    spec: Annotated[Path, typer.Argument(help="what to run, e.g. notebooks/presets/paper-toonfaces.yaml")],
    quick: Annotated[bool, typer.Option("--quick", help="the file's small version of itself")] = False,
    out: Annotated[Path, typer.Option(help="a folder per run; what is finished there is not done again")] = Path("reports/runs"),
    reports: Annotated[Path, typer.Option(help="where tables and figures go")] = Path("reports"),
    workers: Annotated[int | None, typer.Option(min=1, help="processes on this machine; default: one per core")] = None,
    scheduler: Annotated[str | None, typer.Option(help="a dask cluster instead, tcp://…; it must see the same files under the same paths")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
) -> None:
    """Run a grid of notebooks, then the ones that gather it. Stopped or failed, the same command does what is missing."""
    from . import executors, sweep
    try:
        what = sweep.load_spec(spec, quick)
        if dry_run:
            runs, then = sweep.plan(what, out)
            for run in runs:
                typer.echo(f"{sweep.status(out / run.id) or 'to do':<10}{run.id}")
            for run in then:
                typer.echo(f"{'then':<10}{run.id}")
            return
        if scheduler and workers:
            raise ValueError("--workers counts processes on this machine; a cluster has as many as were started there")
        with executors.cluster_executor(scheduler) if scheduler else executors.LocalExecutor(workers) as executor:
            runs = sweep.sweep(what, out, reports, executor)
    except (ValueError, OSError) as error:
        raise SystemExit(f"cfclip: {error}") from None
    typer.echo(f"{len(runs)} runs are finished in {out}")


@app.command("bench")
def run_bench(
    parts: Annotated[str, typer.Option(help="some of generator, step, explorer, scaling, fidelity, profile, with commas; default: all")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, to see that it runs: about a minute")] = False,
    out: Annotated[Path | None, typer.Option(help="where tables and figures go; default: reports/bench/MACHINE, or reports/runs/bench if --quick")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: one per core; --quick: one")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: both, as far as they are there")] = "",
) -> None:
    """Measure speed and memory on this machine, against the published recipe's work. Stopped, the same command goes on."""
    from .bench import bench
    try:
        report = bench(parts.split(",") if parts else (), quick, out or (Path("reports/runs/bench") if quick else None), threads,
                       (device,) if device else ("cpu", "cuda"))
    except (ValueError, OSError) as error:
        raise SystemExit(f"cfclip: {error}") from None
    typer.echo(report.read_text(encoding="utf-8"))


Domain = Annotated[str, typer.Argument(help="ffhq, afhq-dog, afhq-cat or toonfaces")]
Folder = Annotated[Path | None, typer.Option(help="where the files are; default: data/downloads")]


def _report(rows: list) -> None:
    """Print the rows of sources.check; exit with 1 if something required is missing or corrupt."""
    from .sources import unmet
    for row in rows:
        typer.echo(f"{row.status:<11}{row.source.role + ('' if row.source.required else ' (optional)'):<27}{row.path}")
        if row.status != "valid":
            typer.echo(f"{'':<11}{row.detail}")
    if roles := unmet(rows):
        raise SystemExit(f"cfclip: not complete, no good file for: {', '.join(roles)}")


@app.command()
def fetch(
    domain: Domain,
    everything: Annotated[bool, typer.Option("--all", help="also what is optional")] = False,
    folder: Folder = None,
) -> None:
    """Download a domain's files, as far as they have a URL, and say how to get the others. Stopped, the same command goes on."""
    from . import sources
    try:
        rows = sources.fetch(domain, folder or sources.DOWNLOADS, optional=everything)
    except (ValueError, OSError) as error:
        raise SystemExit(f"cfclip: {error}") from None
    _report(rows)


@app.command()
def check(domain: Domain, folder: Folder = None) -> None:
    """List a domain's files: valid, unverified, missing or corrupt. Downloads nothing."""
    from . import sources
    try:
        rows = sources.check(domain, folder or sources.DOWNLOADS)
    except (ValueError, OSError) as error:
        raise SystemExit(f"cfclip: {error}") from None
    _report(rows)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a generator or mapper in any format that is read here")],
    out: Annotated[Path, typer.Argument(help="the .safetensors to write")],
    kind: Annotated[str, typer.Option(help="auto, generator or mapper; a mapper's file holds a generator too")] = "auto",
) -> None:
    """Rewrite a generator or a mapper as safetensors: safe, small, quick to open. Never touches its input."""
    from .checkpoints import convert as run
    try:
        what = run(source, out, kind)
    except (ValueError, OSError) as error:
        raise SystemExit(f"cfclip: {error}") from None
    typer.echo(f"{out}: a {what}, {out.stat().st_size / 1e6:.1f} MB (from {source.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    app()
