"""``cfclip …``: commands that call the package's functions. Each imports what it needs: help is instant."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from cfclip.files import DATA, DOWNLOADS, NOTEBOOKS, ROOT


class Commands(TyperGroup):
    """Our own errors end a command with one sentence, without a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise SystemExit(f"cfclip: {error}") from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Counterfactual image manipulation via CLIP.",
)
toonfaces = typer.Typer(no_args_is_help=True, help="The embedded domain's networks.")
app.add_typer(toonfaces, name="toonfaces")


def _known(name: str | None) -> str | None:
    from cfclip.toonfaces.train.cards import NETWORKS

    if name and name not in NETWORKS:
        raise typer.BadParameter(f"unknown network {name!r}; choose one of {', '.join(NETWORKS)}")
    return name


NAMES = "generator, clip, guide2, heldout_clip, identity, readout, encoder or multi"
Name = Annotated[str | None, typer.Argument(help=NAMES, callback=_known)]
Steps = Annotated[int, typer.Option(min=1, help="of Adam on W+, for the source and for the right edit")]


@toonfaces.command("train")
def toonfaces_train(
    name: Name,
    steps: Annotated[int | None, typer.Option(help="optimisation steps; default: the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(help="default: the recipe's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; the committed networks are of a GPU")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="checkpoints and logs, to resume from")] = None,
) -> None:
    """Train one network; store it and its card in data/ or $CFCLIP_DATA. The same command resumes it."""
    from cfclip.toonfaces.train import cards

    given = {key: value for key, value in {"seed": seed, "steps": steps}.items() if value is not None}
    cards.train(name, out or Path("reports/runs/toonfaces") / name, device=device, **given)
    typer.echo(cards.write_card(name))


@toonfaces.command("measure")
def toonfaces_measure(name: Name = None) -> None:
    """Measure a committed network again, or all of them; rewrite their cards and checksums."""
    from cfclip.toonfaces.domain import record
    from cfclip.toonfaces.train import cards

    if name is None:
        typer.echo(record())  # also those of mappers
    there = [known for known in cards.NETWORKS if (DATA / "toonfaces" / f"{known}.safetensors").exists()]
    for one in [name] if name else there:
        typer.echo(cards.write_card(one))


Prompts = Annotated[list[str] | None, typer.Argument(help="a part's colour; default: two of every part")]
FirstLayer = Annotated[
    int, typer.Option(min=0, help="first layer of W+ that edits change; 4: of those that colour")
]
FaceSeed = Annotated[int, typer.Option(min=0, help="of the faces")]
Networks = Annotated[Path, typer.Option(help="where the networks are")]
Table = Annotated[Path, typer.Option(help="where the table goes")]


@toonfaces.command("ceiling")
def toonfaces_ceiling(
    prompts: Prompts = None,
    n: Annotated[int, typer.Option(min=1, help="faces per prompt")] = 12,
    steps: Steps = 150,
    first_layer: FirstLayer = 4,
    seed: FaceSeed = 60_000,
    folder: Networks = DATA / "toonfaces",
    out: Table = Path("reports/ceiling.md"),
) -> None:
    """What any editor of the generator could reach: W+ optimised straight to the true counterfactual."""
    from cfclip.toonfaces.ceiling import PROMPTS, write_ceiling

    typer.echo(write_ceiling(out, prompts or PROMPTS, n, steps, seed, first_layer, folder))


@toonfaces.command("gap")
def toonfaces_gap(
    prompts: Prompts = None,
    n: Annotated[int, typer.Option(min=1, help="faces per prompt")] = 6,
    guides: Annotated[int, typer.Option(min=1, help="how many of the domain's CLIPs are optimised")] = 1,
    steps: Steps = 150,
    first_layer: FirstLayer = 4,
    near: Annotated[int, typer.Option(min=0, help="steps down the objective from the right edit")] = 50,
    far: Annotated[int, typer.Option(min=0, help="steps down the objective from the source")] = 80,
    seed: FaceSeed = 62_000,
    folder: Networks = DATA / "toonfaces",
    out: Table = Path("reports/exploit.md"),
) -> None:
    """Does each method's objective prefer the right edit to what an optimiser finds instead?"""
    from cfclip.toonfaces.exploit import PROMPTS, write_gap

    typer.echo(write_gap(out, guides, prompts or PROMPTS, n, steps, first_layer, near, far, seed, folder))


@toonfaces.command("routes")
def toonfaces_routes(
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each kind")] = 3,
    n: Annotated[int, typer.Option(min=1, help="test faces")] = 32,
    runs: Annotated[Path, typer.Option(help="of the trainings; none is done twice")] = Path(
        "reports/runs/routes"
    ),
    out: Table = Path("reports/many_prompts/routes.csv"),
    only: Annotated[list[str] | None, typer.Option(help="the table of this route; may be repeated")] = None,
) -> None:
    """Compare the ways to train one mapper for many prompts, on prompts that none of them saw."""
    from cfclip.files import write_csv
    from cfclip.toonfaces.domain import load_toonfaces
    from cfclip.toonfaces.train.routes import ROUTES, compared

    if wrong := set(only or ()) - set(ROUTES):
        raise ValueError(f"--only must be one of {'; '.join(ROUTES)}, not {'; '.join(sorted(wrong))}")
    typer.echo(write_csv(out, compared(load_toonfaces(), runs, range(seeds), n, only or ROUTES)))


@app.command("sweep")
def run_sweep(
    spec: Annotated[Path, typer.Argument(help="what to run, e.g. notebooks/presets/paper-toonfaces.yaml")],
    quick: Annotated[bool, typer.Option("--quick", help="the file's small version of itself")] = False,
    out: Annotated[Path, typer.Option(help="has a folder per run; none is done twice")] = Path(
        "reports/runs"
    ),
    reports: Annotated[Path, typer.Option(help="where tables and figures go")] = Path("reports"),
    workers: Annotated[int | None, typer.Option(min=1, help="processes here; default: one per core")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="a dask cluster instead, tcp://…, which sees the same files and paths")
    ] = None,
    pack: Annotated[
        int | None, typer.Option(min=1, help="trainings in a process; default: as many as gain something")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="runs with this value, as method=nada, and no tables; may be repeated"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: the file's")] = None,
    kernel: Annotated[bool, typer.Option(help="execute notebooks; without: only their numbers")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
) -> None:
    """Run a grid of notebooks, then those that gather it. After a stop the same command does the rest."""
    from cfclip.experiments.executors import LocalExecutor, cluster_executor
    from cfclip.experiments.runs import status
    from cfclip.experiments.spec import load_spec
    from cfclip.experiments.sweep import plan, sweep

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
    names: Annotated[list[str] | None, typer.Argument(help="such as 00_tour; default: all")] = None,
    links: Annotated[bool, typer.Option("--links", help="only renew the lines of links to code")] = False,
) -> None:
    """Execute the committed notebooks at their own parameters, and put them in place with their outputs."""
    from cfclip.experiments import notebooks
    from cfclip.experiments.spec import find_notebook

    for path in map(find_notebook, names or sorted(NOTEBOOKS.glob("*.ipynb"))):
        notebooks.renew_links(path)
        if not links:
            typer.echo(notebooks.execute(path))
    notebooks.renew_links(ROOT / "README.md")


@app.command("bench")
def run_bench(
    parts: Annotated[
        str, typer.Option(help="generator,step,explorer,scaling,fidelity,profile or some; default: all")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, to see that it runs: a minute")] = False,
    out: Annotated[
        Path | None, typer.Option(help="default: reports/bench/MACHINE; reports/runs/bench if --quick")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: one per core; --quick: one")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: all that this machine has")] = "",
) -> None:
    """Measure speed and memory on this machine. If it was stopped, the same command does the rest."""
    from cfclip.bench.run import bench

    devices = (device,) if device else ("cpu", "cuda")
    report = bench(parts.split(",") if parts else (), quick, out, threads, devices)
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

    _print_files(domain, sources.fetch(domain, folder, optional=everything))


@app.command()
def check(domain: DomainName, folder: Folder = DOWNLOADS) -> None:
    """List a domain's files: valid, unverified, missing or corrupt. Downloads nothing."""
    from cfclip.checkpoints import sources

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
        typer.Option(help="cfclip; or rosinality or nvidia (PyTorch), for their code: see data/README.md"),
    ] = "cfclip",
    label: Annotated[
        int | None, typer.Option(help="of a class-conditional generator: write this class alone")
    ] = None,
) -> None:
    """Rewrite a generator or a mapper as safetensors: safe, small, quick to open. Never changes its input.

    With --layout a generator is written for rosinality's or NVIDIA's code, as a .pt of plain tensors.
    """
    import warnings

    from cfclip.checkpoints import convert as run

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        what = run(source, out, kind, layout, label)
    for note in notes:
        typer.echo(f"note: {note.message}")
    size, before = out.stat().st_size / 1e6, source.stat().st_size / 1e6
    typer.echo(f"{out}: a {what}, {size:.1f} MB (from {before:.1f} MB)")


if __name__ == "__main__":
    app()
