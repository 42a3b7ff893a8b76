"""``cfclip …``: commands that call the package's functions. Each imports what it needs: help is instant."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cfclip.files import DATA, DOWNLOADS, ROOT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Counterfactual image manipulation via CLIP.",
)
toonfaces = typer.Typer(no_args_is_help=True, help="The embedded domain's networks.")
app.add_typer(toonfaces, name="toonfaces")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Our own errors end the command with one sentence, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"cfclip: {error}") from None


Name = Annotated[
    str, typer.Argument(help="generator, clip, guide2, heldout_clip, identity, readout, encoder or multi")
]


def _check_name(name: str) -> None:
    from cfclip.toonfaces.train.cards import NETWORKS

    if name not in NETWORKS:
        raise typer.BadParameter(f"unknown network {name!r}; choose one of {', '.join(NETWORKS)}")


@toonfaces.command("train")
def toonfaces_train(
    name: Name,
    steps: Annotated[int | None, typer.Option(help="optimisation steps; default: the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(help="default: the recipe's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; the committed networks are of a GPU")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="checkpoints and logs; a stopped run is resumed from here")
    ] = None,
    weights: Annotated[Path, typer.Option(help="where the trained file goes")] = DATA / "toonfaces",
) -> None:
    """Train one network and store it with its card. Stop it at any time: the same command resumes it."""
    from cfclip.toonfaces.train import cards

    _check_name(name)
    given = {key: value for key, value in {"seed": seed, "steps": steps}.items() if value is not None}
    with _plain_errors():
        cards.train(name, out or Path("reports/runs/toonfaces") / name, weights, device, **given)
    typer.echo(cards.write_card(name, weights))


@toonfaces.command("measure")
def toonfaces_measure(
    name: Annotated[str | None, typer.Argument(help="one network; default: all")] = None,
) -> None:
    """Measure the committed networks again; rewrite their cards and checksums, by default of all files."""
    from cfclip.toonfaces.domain import record
    from cfclip.toonfaces.train import cards

    if name is None:
        typer.echo(record())  # also those of mappers
    there = [known for known in cards.NETWORKS if (DATA / "toonfaces" / f"{known}.safetensors").exists()]
    for one in [name] if name else there:
        _check_name(one)
        typer.echo(cards.write_card(one))


Prompts = Annotated[
    list[str] | None, typer.Argument(help="prompts that name a part's colour; default: two of every part")
]
FirstLayer = Annotated[
    int, typer.Option(min=0, help="edits change the layers of W+ from this one on; 4: those that colour")
]
FaceSeed = Annotated[int, typer.Option(min=0, help="of the faces")]
Networks = Annotated[Path, typer.Option(help="where the networks are")]


@toonfaces.command("ceiling")
def toonfaces_ceiling(
    prompts: Prompts = None,
    n: Annotated[int, typer.Option(min=1, help="faces per prompt")] = 12,
    steps: Annotated[
        int, typer.Option(min=1, help="of Adam on W+, for the source and again for the edit")
    ] = 150,
    first_layer: FirstLayer = 4,
    seed: FaceSeed = 60_000,
    folder: Networks = DATA / "toonfaces",
    out: Annotated[Path, typer.Option(help="where the table goes")] = Path("reports/ceiling.md"),
) -> None:
    """What any editor of the generator could reach: W+ optimised straight to the true counterfactual."""
    from cfclip.toonfaces.ceiling import PROMPTS, write_ceiling

    with _plain_errors():
        typer.echo(write_ceiling(out, prompts or PROMPTS, n, steps, seed, first_layer, folder))


@toonfaces.command("gap")
def toonfaces_gap(
    prompts: Prompts = None,
    n: Annotated[int, typer.Option(min=1, help="faces per prompt")] = 6,
    guides: Annotated[int, typer.Option(min=1, help="how many of the domain's CLIPs are optimised")] = 1,
    steps: Annotated[
        int, typer.Option(min=1, help="of Adam on W+, for the source and for the right edit")
    ] = 150,
    first_layer: FirstLayer = 4,
    near: Annotated[int, typer.Option(min=0, help="steps down the objective from the right edit")] = 50,
    far: Annotated[int, typer.Option(min=0, help="steps down the objective from the source")] = 80,
    seed: FaceSeed = 62_000,
    folder: Networks = DATA / "toonfaces",
    out: Annotated[Path, typer.Option(help="where the table goes")] = Path("reports/exploit.md"),
) -> None:
    """Does each method's objective prefer the right edit to what an optimiser finds instead?"""
    from cfclip.toonfaces.exploit import PROMPTS, write_gap

    with _plain_errors():
        typer.echo(write_gap(out, guides, prompts or PROMPTS, n, steps, first_layer, near, far, seed, folder))


@toonfaces.command("routes")
def toonfaces_routes(
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each kind")] = 3,
    n: Annotated[int, typer.Option(min=1, help="test faces")] = 32,
    runs: Annotated[Path, typer.Option(help="of the trainings; what is there is not trained again")] = Path(
        "reports/runs/routes"
    ),
    out: Annotated[Path, typer.Option(help="where the table goes, for 08_many_prompts")] = Path(
        "reports/many_prompts/routes.csv"
    ),
    only: Annotated[list[str] | None, typer.Option(help="the table of this route; may be repeated")] = None,
) -> None:
    """Compare the ways to train one mapper for many prompts, on prompts that none of them saw."""
    from cfclip.files import write_csv
    from cfclip.toonfaces.domain import load_toonfaces
    from cfclip.toonfaces.train.routes import ROUTES, compared

    with _plain_errors():
        if wrong := set(only or ()) - set(ROUTES):
            raise ValueError(f"--only must be one of {'; '.join(ROUTES)}, not {'; '.join(sorted(wrong))}")
        typer.echo(write_csv(out, compared(load_toonfaces(), runs, range(seeds), n, only or ROUTES)))


@app.command("sweep")
def run_sweep(
    spec: Annotated[Path, typer.Argument(help="what to run, e.g. notebooks/presets/paper-toonfaces.yaml")],
    quick: Annotated[bool, typer.Option("--quick", help="the file's small version of itself")] = False,
    out: Annotated[Path, typer.Option(help="a folder per run; finished runs are not repeated")] = Path(
        "reports/runs"
    ),
    reports: Annotated[Path, typer.Option(help="where tables and figures go")] = Path("reports"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes on this machine; default: one per core")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="a dask cluster instead, tcp://…; it must see the same files under the same paths"),
    ] = None,
    pack: Annotated[
        int | None,
        typer.Option(
            min=1, help="how many trainings share a process; default: as many as gain something; 1: none do"
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="the runs with this value of a parameter, as method=nada; may be given often"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: the file's")] = None,
    kernel: Annotated[
        bool, typer.Option(help="a kernel and an executed notebook for each run; without: only the numbers")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
) -> None:
    """Run a grid of notebooks, then those that gather it. After a stop the same command does the rest."""
    from cfclip.experiments.executors import LocalExecutor, cluster_executor
    from cfclip.experiments.runs import status
    from cfclip.experiments.spec import load_spec
    from cfclip.experiments.sweep import plan, sweep

    with _plain_errors():
        what = load_spec(spec, quick).narrowed(only or (), device)
        if dry_run:
            runs, then = plan(what, out)
            for run in runs:
                typer.echo(f"{status(out / run.id) or 'to do':<10}{run.id}")
            for run in then:
                typer.echo(f"{'then':<10}{run.id}")
            return
        if scheduler and workers:
            raise ValueError("--workers counts processes on this machine; a cluster has its own workers")
        with cluster_executor(scheduler) if scheduler else LocalExecutor(workers) as executor:
            runs = sweep(what, out, reports, executor, pack, kernel)
    typer.echo(f"{len(runs)} runs are finished in {out}")


@app.command("notebooks")
def run_notebooks(
    names: Annotated[
        list[str] | None, typer.Argument(help="such as 00_tour, as they are in notebooks/; default: all")
    ] = None,
    links: Annotated[
        bool, typer.Option("--links", help="only renew the line numbers of links to code, also in README.md")
    ] = False,
) -> None:
    """Execute the committed notebooks at their own parameters, and put them in place with their outputs."""
    from cfclip.experiments import notebooks

    with _plain_errors():
        for path in notebooks.find(names or ()):
            notebooks.renew_links(path)
            if not links:
                typer.echo(notebooks.execute(path))
        notebooks.renew_links(ROOT / "README.md")


@app.command("bench")
def run_bench(
    parts: Annotated[
        str,
        typer.Option(
            help="some of generator, step, explorer, scaling, fidelity, profile, with commas; default: all"
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="tiny sizes, to see that it runs: about a minute")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="tables and figures; default: reports/bench/MACHINE, or reports/runs/bench if --quick"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: one per core; --quick: one")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: all that this machine has")] = "",
) -> None:
    """Measure speed and memory on this machine. If it was stopped, the same command does the rest."""
    from cfclip.bench.run import bench

    with _plain_errors():
        where = out or (Path("reports/runs/bench") if quick else None)
        devices = (device,) if device else ("cpu", "cuda")
        report = bench(parts.split(",") if parts else (), quick, where, threads, devices)
    typer.echo(report.read_text(encoding="utf-8"))


DomainName = Annotated[str, typer.Argument(help="ffhq, afhq-dog, afhq-cat or toonfaces")]
Folder = Annotated[Path, typer.Option(help="where the files are")]


def _print_files(domain: str, rows: list) -> None:
    """Print the rows of sources.check and the embedded files of ``domain``.

    Exits with 1 if something required is missing or corrupt.
    """
    from cfclip.checkpoints.sources import unmet
    from cfclip.toonfaces.domain import check

    rows = [*(check() if domain == "toonfaces" else []), *rows]
    for row in rows:
        role = row.source.role + ("" if row.source.required else " (optional)")
        typer.echo(f"{row.status:<11}{role:<27}{row.path}")
        if row.status != "valid":
            typer.echo(f"{'':<11}{row.detail}")
    if roles := unmet(rows):
        raise SystemExit(f"cfclip: not complete, no good file for: {', '.join(roles)}")


@app.command()
def fetch(
    domain: DomainName,
    everything: Annotated[bool, typer.Option("--all", help="optional files too")] = False,
    folder: Folder = DOWNLOADS,
) -> None:
    """Download a domain's files where they have a URL; say how to get the others. Resumes after a stop."""
    from cfclip.checkpoints import sources

    with _plain_errors():
        _print_files(domain, sources.fetch(domain, folder, optional=everything))


@app.command()
def check(domain: DomainName, folder: Folder = DOWNLOADS) -> None:
    """List a domain's files: valid, unverified, missing or corrupt. Downloads nothing."""
    from cfclip.checkpoints import sources

    with _plain_errors():
        _print_files(domain, sources.check(domain, folder))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a generator or mapper in any format that cfclip reads")],
    out: Annotated[Path, typer.Argument(help="the file to write: .safetensors, or .pt in another layout")],
    kind: Annotated[
        str, typer.Option(help="auto, generator or mapper; a mapper's file holds a generator too")
    ] = "auto",
    layout: Annotated[
        str,
        typer.Option(
            help="cfclip, or a generator for the code of others: rosinality, whose Generator loads "
            "file['g_ema'], or nvidia (PyTorch), which is for "
            "G = Generator(**file['init_kwargs']) of stylegan2-ada-pytorch's training.networks, then "
            "G.load_state_dict(file['G_ema']); stylegan3's training.networks_stylegan2 takes the entries of "
            "synthesis_kwargs as arguments. It is not a .pkl for --network: those carry NVIDIA's source code"
        ),
    ] = "cfclip",
    label: Annotated[
        int | None,
        typer.Option(help="of a class-conditional generator: write this class alone, without the others"),
    ] = None,
) -> None:
    """Rewrite a generator or a mapper as safetensors: safe, small, quick to open. Never changes its input.

    With --layout a generator is written for rosinality's or NVIDIA's code, as a .pt of plain tensors.
    """
    import warnings

    from cfclip.checkpoints import convert as run

    with _plain_errors(), warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        what = run(source, out, kind, layout, label)
    for note in notes:
        typer.echo(f"note: {note.message}")
    size, before = out.stat().st_size / 1e6, source.stat().st_size / 1e6
    typer.echo(f"{out}: a {what}, {size:.1f} MB (from {before:.1f} MB)")


if __name__ == "__main__":
    app()
