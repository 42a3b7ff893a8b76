"""The measurements. Each function yields rows: a name, its columns, and those of :func:`.measure.stats`."""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity

from cfclip.baselines.methods import configure, fit
from cfclip.bench.measure import Work, dtypes, peak_gb, reset_peak, stats, synchronise, timed, work_of
from cfclip.bench.networks import random_domain, random_generator
from cfclip.bench.published import NAMES, PlainGenerator, Published, Wastes
from cfclip.domain import Domain
from cfclip.domains import load_domain
from cfclip.evaluation import metrics
from cfclip.experiments.runs import write_record
from cfclip.experiments.spec import Spec, load_preset
from cfclip.experiments.sweep import plan, sweep
from cfclip.files import NOTEBOOKS
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.loop import Request, Step, generator_for
from cfclip.method.networks import FrozenNetworks
from cfclip.method.pack import Pack
from cfclip.method.trainer import MapperTrainer
from cfclip.models.ops import HALF, folding, name_of, using
from cfclip.models.stylegan2 import Generator

Rows = Iterator[dict[str, Any]]

PROMPT = "green lipstick"


# ---- the floors of the device ----


def floors(device: str, side: int, copied: int, repeats: int) -> Rows:
    """The best rates of the device.

    Per dtype, TFLOP/s of a product of ``side`` x ``side`` matrices and of a 3x3 convolution; GB/s of a copy
    of ``copied`` bytes.
    """
    reduced = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16,)
    for dtype in (torch.float32, *reduced):
        n = side if dtype in dtypes(device) else side // 4  # a slow dtype would take minutes
        for name, call in _operators(device, dtype, n).items():
            flop = sum(entry[0] for entry in work_of(call).values())
            measured = stats(timed(call, device, repeats, warm=1))
            yield {"name": name, "dtype": name_of(dtype), "tflops": flop / measured["low"] / 1e12} | measured
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured = stats(timed(lambda: target.copy_(source), device, repeats, warm=1))
    yield {"name": "copy", "gb_per_second": 2 * copied / measured["low"] / 1e9} | measured


def _operators(device: str, dtype: torch.dtype, n: int) -> dict[str, Callable[[], Tensor]]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    channels = max(16, n // 16)
    x, kernel = (
        torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((4, channels, 64, 64), (channels, channels, 3, 3))
    )
    return {"matrix product": lambda: a @ b, "convolution": lambda: F.conv2d(x, kernel, padding=1)}


# ---- (a) the generator ----


def _passes(draw: Callable, g: Generator, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """Two passes of ``draw`` (w -> pictures): without a graph, and with the gradient with respect to w."""
    torch.manual_seed(0)
    with torch.no_grad():
        w = g.mapping(torch.randn(batch, g.z_dim, device=device))
    leaf = w.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            draw(w)

    def forward_backward() -> None:
        leaf.grad = None
        draw(leaf).square().mean().backward()

    return {"forward": forward, "forward + backward": forward_backward}


def _ours(g: Generator, dtype: torch.dtype, fold: bool | None = None) -> Callable[[Tensor], Tensor]:
    """w -> pictures in ``dtype``. ``fold``: fold all FIR filters into kernels, or none; None: our choice."""

    def draw(w: Tensor) -> Tensor:
        with nullcontext() if fold is None else folding(fold):
            return g.synthesis(w, dtype=None if dtype == torch.float32 else dtype)

    return draw


def generator(device: str, sizes: Sequence[tuple[int, int]], repeats: int, tiny: bool) -> Rows:
    """Both passes at each (resolution, batch) of ``sizes``; in each repeat all variants take turns.

    Variants: plain operators in float32, and ours per dtype: with our choice of folding, with all FIR filters
    folded and, in half precision, with none folded.
    """
    for resolution, batch in sizes:
        g = random_generator(resolution, tiny).to(device)
        draws = {("plain", "float32"): PlainGenerator(g)}
        for dtype in dtypes(device):
            ways = {"ours": None, "folded": True} | ({"unfolded": False} if dtype in HALF else {})
            for name, fold in ways.items():
                # a copy has its own cache of kernels
                draws[name, name_of(dtype)] = _ours(copy.deepcopy(g), dtype, fold)
        calls = {}
        for key, draw in draws.items():
            calls |= {(*key, name): call for name, call in _passes(draw, g, batch, device).items()}
        work = {key: work_of(call) for key, call in calls.items()}  # this also warms up
        seconds = {key: [] for key in calls}
        for _ in range(repeats):
            for key, call in calls.items():
                seconds[key] += timed(call, device)
        for (name, dtype, which), taken in seconds.items():
            flop, moved = (sum(column) for column in zip(*work[name, dtype, which].values(), strict=True))
            row = {"name": name, "dtype": dtype, "pass": which, "resolution": resolution, "batch": batch}
            yield row | {"tflop": flop / 1e12, "moved_gb": moved / 1e9} | stats(taken)


def compiled(device: str, resolution: int, batch: int, repeats: int, tiny: bool) -> Rows:
    """``torch.compile`` of the plain operators; ``compiling`` is the seconds of the first call."""
    g = random_generator(resolution, tiny).to(device)
    sizes = {"dtype": "float32", "resolution": resolution, "batch": batch}
    for which, call in _passes(torch.compile(PlainGenerator(g).__call__), g, batch, device).items():
        row = {"name": "torch.compile of plain", "pass": which, "compiling": timed(call, device)[0]}
        yield row | sizes | stats(timed(call, device, repeats, warm=1))


def generator_memory(device: str, resolution: int, batch: int, dtype: str, plain: bool, tiny: bool) -> Rows:
    """Peak memory of one forward + backward, in a process that does nothing else."""
    g = random_generator(resolution, tiny).to(device)
    draw = PlainGenerator(g) if plain else _ours(g, getattr(torch, dtype))
    measured = stats(timed(_passes(draw, g, batch, device)["forward + backward"], device))
    row = {"name": "plain" if plain else "ours", "dtype": dtype, "resolution": resolution, "batch": batch}
    yield row | {"peak_gb": peak_gb(device)} | measured


# ---- (b) the mapper's step ----


def _trainer(device: str, resolution: int, tiny: bool, **settings: Any) -> MapperTrainer:
    """A trainer of random networks with these ``settings`` of :class:`CFCLIPConfig`; starts a new peak."""
    config = CFCLIPConfig(PROMPT, train_latents=max(4, settings.get("batch", 2)), **settings)
    run = MapperTrainer(random_domain(resolution, tiny, device), config)
    reset_peak(device)
    return run


def _sizes(run: MapperTrainer) -> dict[str, Any]:
    resolution = run.domain.generator.resolution
    return {"dtype": run.config.dtype, "resolution": resolution, "batch": run.config.batch}


def _repeated(run: MapperTrainer, step: Step | None = None, repeats: int = 1, warm: int = 0) -> dict:
    """``step`` (default: ours) repeated from the same mapper with the same random numbers.

    Columns: the sizes of ``run``, its ``losses`` with the norm of the mapper's gradient, and stats.
    """
    step = step or run.step
    start = {name: value.clone() for name, value in run.mapper.state_dict().items()}
    seconds, losses = [], {}
    for _ in range(warm + repeats):
        run.mapper.load_state_dict(start)
        seconds += timed(lambda: losses.update(step(0, generator_for(0, 0))), run.domain.device.type)
    run.mapper.load_state_dict(start)
    norm = torch.stack([p.grad.norm() for p in run.mapper.parameters()]).norm().item()
    return _sizes(run) | {"losses": losses | {"gradient": norm}} | stats(seconds[warm:])


def step(device: str, repeats: int, sources: bool = False, again: bool = False, **settings: Any) -> Rows:
    """Our step. ``sources``: synthesise and encode the sources in every step. ``again``: a repeat."""
    run = _trainer(device, **settings)
    name, take = "ours", run.step
    if sources:
        name, take = "ours, sources drawn", Published(run, Wastes.none(sources=True)).step
    if run.config.micro_batch:
        name += f", {run.config.micro_batch} at a time"
    measured = _repeated(run, take, repeats, warm=1)
    yield {"name": name + " (again)" * again, "peak_gb": peak_gb(device)} | measured


TIMED = [name for name in NAMES if name != "second_clip"]
"""The wastes that take time."""


def ladder(device: str, resolution: int, tiny: bool, repeats: int) -> Rows:
    """The published step, then its wastes turned off one after the other until it is ours.

    Only the published step is warmed up, and only its peak memory is known.
    """
    run, wastes = _trainer(device, resolution, tiny), Wastes()
    measured = _repeated(run, Published(run, wastes).step, repeats, warm=1)
    yield {"name": "published", "off": None, "peak_gb": peak_gb(device)} | measured
    copy_gb = sum(p.numel() * p.element_size() for p in run.domain.clip.parameters()) / 1e9
    for name in NAMES:
        wastes = replace(wastes, **{name: False})
        row = {"name": f"- {name}", "off": name} | _sizes(run)
        if name in TIMED:
            yield row | _repeated(run, Published(run, wastes).step)
        else:
            yield row | {"saves_gb": copy_gb}


def wastes(device: str, resolution: int, tiny: bool, rounds: int) -> Rows:
    """All wastes, each turned off alone, each turned on alone, and none; ``rounds`` times in turns."""
    run = _trainer(device, resolution, tiny)
    variants = {("all", None): Wastes()}
    variants |= {("off", name): replace(Wastes(), **{name: False}) for name in TIMED}
    for name in TIMED:  # views of a source need the source
        variants["on", name] = Wastes.none(**{name: True, "sources": name in ("sources", "source_views")})
    variants["none", None] = Wastes.none()
    measured = {key: [] for key in variants}
    _repeated(run, Published(run).step)
    for _ in range(rounds):
        for key, variant in variants.items():
            measured[key].append(_repeated(run, Published(run, variant).step))
    for (kind, name), rows in measured.items():
        row = {"name": f"{kind} {name}" if name else kind, "kind": kind, "waste": name}
        yield row | rows[0] | stats([row["median"] for row in rows])


# ---- (e) how cost grows ----


def _toonfaces(device: str, tiny: bool) -> Domain:
    """The domain toonfaces, or with ``tiny`` one of tiny random networks."""
    return random_domain(16, True, device) if tiny else load_domain("toonfaces", device)


def growing_steps(device: str, name: str, values: Sequence[int], repeats: int, **fixed: Any) -> Rows:
    """Our step at each of ``values`` of ``name``, "resolution" or "batch"; other settings are ``fixed``.

    ``values`` go from small to large, so that the peak memory so far is that of the current value.
    """
    for value in values:
        measured = _repeated(_trainer(device, **fixed | {name: value}), repeats=repeats, warm=1)
        yield {"name": name, "value": value, "peak_gb": peak_gb(device)} | measured


def growing_prompts(
    device: str, prompts: Sequence[int], prompts_at_once: Sequence[int], tiny: bool, repeats: int
) -> Rows:
    """Steps of one mapper of many prompts on toonfaces, batch 8.

    First the number of prompts to choose from grows, then the number in one step. ``tiny``: on tiny random
    networks.
    """
    domain, texts = _toonfaces(device, tiny), load_domain("toonfaces").truth.prompts
    together = [(max(prompts), k) for k in prompts_at_once if k > 1]
    for count, k in [(count, 1) for count in prompts] + together:
        config = MultiPromptConfig(prompts=texts[:count], prompts_at_once=k, batch=8, train_latents=8)
        start = time.perf_counter()
        run = MapperTrainer(domain, config)
        preparing = time.perf_counter() - start
        row = {"name": "prompts at once", "value": k} if k > 1 else {"name": "prompts", "value": count}
        row |= {"prompts": count, "prompts_at_once": k, "preparing": preparing}
        yield row | _repeated(run, repeats=repeats, warm=1)


def growing_pack(device: str, values: Sequence[int], dtype: str, repeats: int, tiny: bool) -> Rows:
    """A step of packs of ``values`` trainings on toonfaces, with the settings of its preset.

    They have eight prompts in turn, and a new seed after every eight. ``tiny``: on tiny random networks.
    """
    domain = _toonfaces(device, tiny)
    settings = load_preset(NOTEBOOKS / "presets" / "toonfaces.yaml")["settings"]
    settings |= {"dtype": dtype, "train_latents": 2 * settings["batch"]}
    prompts, networks = load_domain("toonfaces").truth.prompts[:8], cache(partial(FrozenNetworks, domain))
    for count in values:
        reset_peak(device)
        configs = [configure("cfclip", prompts[k % 8], **settings, seed=k // 8) for k in range(count)]
        members = [MapperTrainer(domain, config, networks=networks) for config in configs]
        pack, steps = Pack(), iter(range(settings["steps"]))

        def take(members: list[MapperTrainer] = members, pack: Pack = pack, steps: Iterator = steps) -> None:
            i = next(steps)
            pack.step({run: Request(i, generator_for(k, i), False) for k, run in enumerate(members)})

        measured = stats(timed(take, device, repeats, warm=2))
        row = {"name": "pack", "value": count, "dtype": dtype, "steps": settings["steps"]}
        yield row | {"peak_gb": peak_gb(device)} | measured


def growing_sweep(device: str, runs: Sequence[int], repeats: int) -> Rows:
    """The overhead of sweeps of ``runs`` runs: the plan (``--dry-run``), and a restart after the end."""
    for count in runs:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as executor:
            out = Path(folder, "runs")
            out.mkdir()
            block = {"notebook": "02_training", "prompt": PROMPT, "seed": list(range(count))}
            spec = Spec("bench", Path(folder), (block,))
            planned, _ = plan(spec, out)
            seconds = timed(partial(plan, spec, out), device, repeats, warm=1)
            yield {"name": "sweep, plan", "value": count} | stats(seconds)
            for run in planned:
                write_record(run, out / run.id, "finished")
            seconds = timed(partial(sweep, spec, out, out, executor), device, repeats, warm=1)
            yield {"name": "sweep, resume", "value": count} | stats(seconds)


# ---- (f) what the fast ways change ----


@torch.no_grad()
def pictures(device: str, faces: int) -> Rows:
    """Toonfaces' pictures of ``faces`` held-out latents against those of the reference operators in float32.

    The mean and maximum difference in grey levels of 255, per dtype, with and without folded FIR filters.
    """
    domain = load_domain("toonfaces", device)
    w = domain.latents(faces, "test")
    with using("reference"):
        exact = domain.generator.synthesis(w)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, fold in (("unfolded", False), ("folded", True)):
            images, draw = [], _ours(domain.generator, dtype, fold)
            measured = stats(timed(lambda: images.append(draw(w)), device))  # noqa: B023 (called here)
            error = (images[0] - exact).abs() * 127.5
            row = {"name": name, "dtype": name_of(dtype), "faces": faces}
            yield row | {"mean": error.mean().item(), "most": error.max().item()} | measured


def success(
    device: str, prompt: str, operators: str, dtype: str, seed: int, steps: int, faces: int, **given: Any
) -> Rows:
    """A mapper trained as in the paper's tables: success rate and identity of its edits of held-out faces.

    Success is that of the faces that have the part; if none has it, the row has no success.
    ``operators``: "reference" or "ours". ``given``: more settings of the training.
    """
    domain = load_domain("toonfaces", device)
    settings = load_preset(NOTEBOOKS / "presets" / "toonfaces.yaml")["settings"]
    settings |= {"steps": steps, "seed": seed, "dtype": dtype} | given
    start = time.perf_counter()
    with using("reference" if operators == "reference" else None):
        editor = fit("cfclip", domain, prompt, progress=False, **settings)
    seconds = time.perf_counter() - start
    rows = metrics.over_strengths(domain, prompt, editor.edit, domain.latents(faces, "test", seed), [1.0])
    known = {name: [row[name] for row in rows if name in row] for name in ("success_after", "identity")}
    means = {name: sum(values) / len(values) for name, values in known.items() if values}
    row = {"name": operators, "dtype": dtype, "prompt": prompt, "seed": seed, "steps": steps, "faces": faces}
    yield row | means | stats([seconds])


# ---- the profile ----


class Phases:
    """Splits ``run``'s step into phases: seconds, and dtype -> [FLOP, bytes], of each.

    A phase is everything between the previous mark and the mark that names it.
    """

    def __init__(self, run: MapperTrainer, device: str):
        self.device, self.work, self.run = device, Work(), run
        networks, identity = run.networks, run.domain.identity
        draw = networks.synthesise

        def watched(w: Tensor) -> Tensor:
            pictures = draw(w)
            if pictures.requires_grad:
                pictures.register_hook(lambda _: self.mark("CLIP, identity and views, backward"))
            return pictures

        networks.synthesise = self._around(watched, "mapper", "generator, forward")
        networks.encode = self._around(networks.encode, "generator, forward", "views and CLIP, forward")
        run.losses = self._around(run.losses, "mapper", "losses")
        run.optimizer.step = self._around(run.optimizer.step, "generator and mapper, backward", "optimiser")
        identity.register_forward_pre_hook(lambda *_: self.mark("losses"))
        identity.register_forward_hook(lambda *_: self.mark("identity, forward"))

    def _around(self, call: Callable, before: str, after: str) -> Callable:
        def wrapped(*args: Any) -> Any:
            self.mark(before)
            result = call(*args)
            self.mark(after)
            return result

        return wrapped

    def mark(self, phase: str) -> None:
        """Mark the end of ``phase``, or of a part of it."""
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
        for dtype, counted in self.work.take().items():
            before = self.counted.setdefault(phase, {}).get(dtype, (0.0, 0.0))
            self.counted[phase][dtype] = [a + b for a, b in zip(before, counted, strict=True)]

    def take(self, count: bool = False) -> None:
        """Take one step; with ``count`` also count its arithmetic, which takes time."""
        self.seconds: Counter[str] = Counter()
        self.counted: dict[str, dict[str, list[float]]] = {}
        synchronise(self.device)
        self.last = time.perf_counter()
        with self.work if count else nullcontext():
            self.run.step(0, generator_for(0, 0))


def profile(device: str, resolution: int, tiny: bool, dtype: str, repeats: int, top: int) -> Rows:
    """Our step by phase, and the ``top`` operators by their own time."""
    phases = Phases(_trainer(device, resolution, tiny, dtype=dtype), device)
    phases.take(count=True)
    counted, seconds = phases.counted, {}
    for _ in range(repeats):
        phases.take()
        for phase, taken in phases.seconds.items():
            seconds.setdefault(phase, []).append(taken)
    sizes = {"dtype": dtype, "resolution": resolution}
    for phase, taken in seconds.items():
        yield {"name": phase, "kind": "phase", "work": counted.get(phase, {})} | sizes | stats(taken)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        phases.take()
    own_time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"  # microseconds
    events = [(getattr(event, own_time) / 1e6, event.key, event.count) for event in profiler.key_averages()]
    total = sum(taken for taken, _, _ in events)
    for taken, name, calls in sorted(events, reverse=True)[:top]:
        row = {"name": name, "kind": "operator", "share": taken / total, "calls": calls}
        yield row | sizes | stats([taken])
