"""What is measured. Every part yields rows, each with its ``name`` and what :func:`cfclip.bench.measure.stats` says."""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity

from cfclip.baselines.methods import fit
from cfclip.bench.measure import Work, dtypes, forget_peak, peak_gb, stats, synchronise, timed, work_of
from cfclip.bench.networks import random_domain, random_generator
from cfclip.bench.published import NAMES, PlainGenerator, Published, Wastes
from cfclip.domains import load_domain
from cfclip.evaluation import metrics
from cfclip.experiments.runs import write_record
from cfclip.experiments.spec import Spec, load_preset
from cfclip.experiments.sweep import plan, sweep
from cfclip.files import NOTEBOOKS
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.loop import generator_for
from cfclip.method.trainer import MapperTrainer
from cfclip.models.ops import HALF, folding, name_of, using
from cfclip.models.stylegan2 import Generator

Rows = Iterator[dict[str, Any]]

PROMPT = "green lipstick"


# ---- the floors of the device ----


def floors(device: str, side: int, copied: int, repeats: int) -> Rows:
    """Arithmetic (TFLOP/s) of a matrix product of ``side`` and of a 3x3 convolution, per dtype; bandwidth (GB/s) of a copy of ``copied`` bytes."""
    for dtype in (
        (torch.float32, torch.bfloat16, torch.float16)
        if device == "cuda"
        else (torch.float32, torch.bfloat16)
    ):
        n = side if dtype in dtypes(device) else side // 4  # what is slow there would take minutes
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        channels = max(16, n // 16)
        x = (
            torch
            .randn(4, channels, 64, 64, device=device)
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
        )
        k = (
            torch
            .randn(channels, channels, 3, 3, device=device)
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
        )
        for name, call in (
            ("matrix product", lambda a=a, b=b: a @ b),
            ("convolution", lambda x=x, k=k: F.conv2d(x, k, padding=1)),
        ):
            flop = sum(entry[0] for entry in work_of(call).values())
            found = stats(timed(call, device, repeats))
            yield {"name": name, "dtype": name_of(dtype), "tflops": flop / found["low"] / 1e12} | found
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = stats(timed(lambda: target.copy_(source), device, repeats))
    yield {"name": "copy", "gb_per_second": 2 * copied / found["low"] / 1e9} | found


# ---- (a) the generator ----


def _passes(draw: Callable, g: Generator, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """The two passes of ``draw`` (w -> pictures): without graph, and with the gradient with respect to w."""
    torch.manual_seed(0)
    with torch.no_grad():
        w = g.mapping(torch.randn(batch, g.z_dim, device=device))
    leaf = w.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            draw(w)

    def both() -> None:
        leaf.grad = None
        draw(leaf).square().mean().backward()

    return {"forward": forward, "forward + backward": both}


def _ours(
    g: Generator, dtype: torch.dtype, fold: bool | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """w -> pictures in ``dtype``; with every FIR filter in its convolution's kernel, or with none, or as we choose."""

    def draw(w: torch.Tensor) -> torch.Tensor:
        with nullcontext() if fold is None else folding(fold):
            return g.synthesis(w, dtype=None if dtype == torch.float32 else dtype)

    return draw


def generator(device: str, sizes: Sequence[tuple[int, int]], repeats: int, tiny: bool) -> Rows:
    """Pictures a second at each (resolution, batch): ours per dtype, with filters folded and not as we chose, and in plain operators; all take turns."""
    for resolution, batch in sizes:
        draws = {("plain", "float32"): PlainGenerator(g := random_generator(resolution, tiny).to(device))}
        for dtype in dtypes(device):
            draws |= {
                (name, name_of(dtype)): _ours(copy.deepcopy(g), dtype, fold)  # a copy keeps its own kernels
                for name, fold in (
                    ("ours", None),
                    ("folded", True),
                    *((("unfolded", False),) if dtype in HALF else ()),
                )
            }
        calls = {
            (*key, name): call
            for key, draw in draws.items()
            for name, call in _passes(draw, g, batch, device).items()
        }
        work = {key: work_of(call) for key, call in calls.items()}  # it warms up as well
        seconds = {key: [] for key in calls}
        for _ in range(repeats):
            for key, call in calls.items():
                seconds[key] += timed(call, device, 1, warm=0)
        for (name, dtype, which), taken in seconds.items():
            flop, moved = (sum(entry[i] for entry in work[name, dtype, which].values()) for i in (0, 1))
            yield {
                "name": name,
                "dtype": dtype,
                "pass": which,
                "resolution": resolution,
                "batch": batch,
                "tflop": flop / 1e12,
                "moved_gb": moved / 1e9,
            } | stats(taken)


def compiled(device: str, resolution: int, batch: int, repeats: int, tiny: bool) -> Rows:
    """``torch.compile`` of the plain operators, and what compiling took."""
    g = random_generator(resolution, tiny).to(device)
    for which, call in _passes(torch.compile(PlainGenerator(g).__call__), g, batch, device).items():
        begun = time.perf_counter()
        call()
        synchronise(device)
        compiling = time.perf_counter() - begun
        yield {
            "name": "torch.compile of plain",
            "dtype": "float32",
            "pass": which,
            "resolution": resolution,
            "batch": batch,
            "compiling": compiling,
        } | stats(timed(call, device, repeats))


def generator_memory(device: str, resolution: int, batch: int, dtype: str, plain: bool, tiny: bool) -> Rows:
    """The peak of one forward + backward, in a process that does nothing else."""
    g = random_generator(resolution, tiny).to(device)
    draw = PlainGenerator(g) if plain else _ours(g, getattr(torch, dtype))
    found = stats(timed(_passes(draw, g, batch, device)["forward + backward"], device, 1, warm=0))
    yield {
        "name": "plain" if plain else "ours",
        "dtype": dtype,
        "resolution": resolution,
        "batch": batch,
        "peak_gb": peak_gb(device),
    } | found


# ---- (b) the mapper's step ----


def _run(
    device: str,
    resolution: int,
    tiny: bool,
    dtype: str = "float32",
    batch: int = 2,
    micro_batch: int | None = None,
) -> MapperTrainer:
    config = CFCLIPConfig(
        PROMPT, batch=batch, train_latents=max(4, batch), dtype=dtype, micro_batch=micro_batch
    )
    return MapperTrainer(random_domain(resolution, tiny, device), config)


def _measured(
    run: MapperTrainer, step: Callable[[int, torch.Generator], dict], device: str, repeats: int, warm: int = 1
) -> dict[str, Any]:
    """The same step again and again: from the same mapper, on the same draws. Its losses and the norm of the mapper's gradient with it."""
    start = {name: value.clone() for name, value in run.mapper.state_dict().items()}
    seconds = []
    for _ in range(warm + repeats):
        run.mapper.load_state_dict(start)
        synchronise(device)
        begun = time.perf_counter()
        losses = step(0, generator_for(0, 0))
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    run.mapper.load_state_dict(start)
    norm = torch.stack([p.grad.norm() for p in run.mapper.parameters()]).norm().item()
    return stats(seconds[warm:]) | {"losses": losses | {"gradient": norm}}


def step(
    device: str,
    resolution: int,
    tiny: bool,
    dtype: str,
    repeats: int,
    sources: bool = False,
    again: bool = False,
    batch: int = 2,
    micro_batch: int | None = None,
) -> Rows:
    """Our step; with ``sources``: though the source pictures are drawn and encoded in every step. ``again``: later, to see what has drifted."""
    run = _run(device, resolution, tiny, dtype, batch, micro_batch)
    forget_peak(device)
    take = Published(run, Wastes.none(sources=True)).step if sources else run.step
    found = _measured(run, take, device, repeats)
    name = (
        "ours"
        + (", sources drawn" if sources else "")
        + (f", {micro_batch} at a time" if micro_batch else "")
        + (" (again)" if again else "")
    )
    yield {
        "name": name,
        "dtype": dtype,
        "resolution": resolution,
        "batch": batch,
        "peak_gb": peak_gb(device),
    } | found


def ladder(device: str, resolution: int, tiny: bool, repeats: int, batch: int = 2) -> Rows:
    """The published step, and then its wastes turned off one after the other until it is ours. The first is warmed up, and its memory known."""
    run = _run(device, resolution, tiny, batch=batch)
    forget_peak(device)
    wastes, known = Wastes(), {"dtype": "float32", "resolution": resolution, "batch": batch}
    found = _measured(run, Published(run, wastes).step, device, repeats)
    yield {"name": "published", "off": None, "peak_gb": peak_gb(device)} | known | found
    copy_gb = sum(p.numel() * p.element_size() for p in run.domain.clip.parameters()) / 1e9
    for name in NAMES:
        wastes = replace(wastes, **{name: False})
        if name == "gram" and run.domain.perceptual is None:
            continue
        if name == "second_clip":  # it takes no time
            yield {"name": f"- {name}", "off": name, "saves_gb": copy_gb} | known
            continue
        yield (
            {"name": f"- {name}", "off": name}
            | known
            | _measured(run, Published(run, wastes).step, device, 1, warm=0)
        )


def wastes(device: str, resolution: int, tiny: bool, rounds: int) -> Rows:
    """Each waste turned off alone, and turned on alone, in turns: published, without texts, …, only texts, …, none."""
    run = _run(device, resolution, tiny)
    timely = [
        name
        for name in NAMES
        if name != "second_clip" and (name != "gram" or run.domain.perceptual is not None)
    ]
    variants = {("all", None): Wastes()} | {
        ("off", name): replace(Wastes(), **{name: False}) for name in timely
    }
    variants |= {
        ("on", name): Wastes.none(**{name: True}, **({"sources": True} if name == "source_views" else {}))
        for name in timely
    }
    variants |= {("none", None): Wastes.none()}
    found = {key: [] for key in variants}
    _measured(run, Published(run).step, device, 1, warm=0)
    for _ in range(rounds):
        for key, what in variants.items():
            found[key].append(_measured(run, Published(run, what).step, device, 1, warm=0))
    for (kind, name), measured in found.items():
        yield {
            "name": f"{kind} {name}" if name else kind,
            "kind": kind,
            "waste": name,
            "dtype": "float32",
            "resolution": resolution,
            "batch": 2,
            "losses": measured[0]["losses"],
        } | stats([row["median"] for row in measured])


# ---- (e) how cost grows ----


def growing_resolution(device: str, resolutions: Sequence[int], tiny: bool, dtype: str, repeats: int) -> Rows:
    """Our step from small to large, so that the peak so far is each one's own."""
    for resolution in resolutions:
        run = _run(device, resolution, tiny, dtype)
        forget_peak(device)
        found = _measured(run, run.step, device, repeats)
        yield {
            "name": "resolution",
            "value": resolution,
            "dtype": dtype,
            "batch": 2,
            "peak_gb": peak_gb(device),
        } | found


def growing_batch(
    device: str, resolution: int, batches: Sequence[int], tiny: bool, dtype: str, repeats: int
) -> Rows:
    """Our step from small to large batches."""
    for batch in batches:
        run = _run(device, resolution, tiny, dtype, batch)
        forget_peak(device)
        found = _measured(run, run.step, device, repeats)
        yield {
            "name": "batch",
            "value": batch,
            "dtype": dtype,
            "resolution": resolution,
            "peak_gb": peak_gb(device),
        } | found


def growing_prompts(
    device: str, prompts: Sequence[int], prompts_at_once: Sequence[int], tiny: bool, repeats: int
) -> Rows:
    """One mapper of many prompts on toonfaces (``tiny``: random networks), batch 8: prompts to draw from, and prompts in one step."""
    domain = random_domain(16, True, device) if tiny else load_domain("toonfaces", device)
    texts = load_domain("toonfaces").truth.prompts if tiny else domain.truth.prompts
    for count, together in [(count, 1) for count in prompts] + [
        (max(prompts), k) for k in prompts_at_once if k > 1
    ]:
        begun = time.perf_counter()
        run = MapperTrainer(
            domain,
            MultiPromptConfig(
                prompts=tuple(texts[:count]), prompts_at_once=together, batch=8, train_latents=8
            ),
        )
        prepared = time.perf_counter() - begun
        found = _measured(run, run.step, device, repeats)
        yield {
            "name": "prompts" if together == 1 else "prompts at once",
            "value": count if together == 1 else together,
            "prompts": count,
            "prompts_at_once": together,
            "dtype": "float32",
            "batch": 8,
            "preparing": prepared,
        } | found


def growing_sweep(device: str, runs: Sequence[int], repeats: int) -> Rows:
    """What a sweep of so many runs costs by itself: its plan (``--dry-run``), and starting it again when all is finished."""
    for count in runs:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as executor:
            out = Path(folder, "runs")
            out.mkdir()
            spec = Spec(
                "bench",
                Path(folder),
                ({"notebook": "02_training", "prompt": PROMPT, "seed": list(range(count))},),
            )
            planned, _ = plan(spec, out)
            yield {"name": "sweep, plan", "value": count} | stats(
                timed(lambda spec=spec, out=out: plan(spec, out), device, repeats)
            )
            for run in planned:
                write_record(run, out / run.id, "finished")
            again = timed(
                lambda spec=spec, out=out, executor=executor: sweep(spec, out, out, executor), device, repeats
            )
            yield {"name": "sweep, resume", "value": count} | stats(again)


# ---- (f) what the fast ways change ----


@torch.no_grad()
def pictures(device: str, faces: int) -> Rows:
    """How far toonfaces' pictures of ``faces`` held-out latents are, in grey levels of 255, from the reference operators' in float32."""
    domain = load_domain("toonfaces", device)
    w = domain.latents(faces, "test")
    with using("reference"):
        exact = domain.generator.synthesis(w)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for fold in (False, True):
            drawn, draw = [], _ours(domain.generator, dtype, fold)
            found = stats(timed(lambda: drawn.append(draw(w)), device, 1, warm=0))  # noqa: B023 (called here)
            apart = (drawn[0] - exact).abs() * 127.5
            yield {
                "name": "folded" if fold else "unfolded",
                "dtype": name_of(dtype),
                "faces": faces,
                "mean": apart.mean().item(),
                "most": apart.max().item(),
            } | found


def success(device: str, prompts: Sequence[str], seeds: Sequence[int], steps: int, faces: int) -> Rows:
    """Mappers trained as in the paper's tables, by the reference operators and by ours: how often held-out faces' edits succeed, and identity."""
    domain = load_domain("toonfaces", device)
    settings = load_preset(NOTEBOOKS / "presets" / "toonfaces.yaml")["settings"]
    ways = [("reference", "float32"), *(("ours", name_of(dtype)) for dtype in dtypes(device))]
    for seed in seeds:
        for prompt in prompts:
            for operators, dtype in ways:
                begun = time.perf_counter()
                with using("reference") if operators == "reference" else nullcontext():
                    editor = fit(
                        "cfclip",
                        domain,
                        prompt,
                        progress=False,
                        **settings | {"steps": steps, "seed": seed, "dtype": dtype},
                    )
                taken = time.perf_counter() - begun
                rows = metrics.over_strengths(
                    domain, prompt, editor.edit, domain.latents(faces, "test", seed), [1.0]
                )
                yield {
                    "name": operators,
                    "dtype": dtype,
                    "prompt": prompt,
                    "seed": seed,
                    "steps": steps,
                    "faces": faces,
                    **{
                        name: sum(row[name] for row in rows) / len(rows)
                        for name in ("success_after", "identity")
                    },
                } | stats([taken])


# ---- the profile ----


class Phases:
    """Splits ``run``'s step: seconds, and dtype -> [FLOP, bytes], of each phase. Everything until a mark belongs to the phase that the mark names."""

    def __init__(self, run: MapperTrainer, device: str):
        self.device, self.work, self.run = device, Work(), run
        networks, optimizer, identity = run.networks, run.optimizer, run.domain.identity
        networks.synthesise = self._around(networks.synthesise, "mapper", "generator, forward", self._watch)
        networks.clip = self._around(networks.clip, "generator, forward", "views and CLIP, forward")
        optimizer.zero_grad = self._around(optimizer.zero_grad, "losses", "losses")
        optimizer.step = self._around(optimizer.step, "generator and mapper, backward", "optimiser")
        identity.register_forward_pre_hook(lambda *_: self.mark("losses"))
        identity.register_forward_hook(lambda *_: self.mark("identity, forward"))

    def _around(self, call: Callable, before: str, after: str, then: Callable = lambda _: None) -> Callable:
        def wrapped(*args: Any) -> Any:
            self.mark(before)
            result = call(*args)
            then(result)
            self.mark(after)
            return result

        return wrapped

    def _watch(self, pictures: torch.Tensor) -> None:
        if pictures.requires_grad:
            pictures.register_hook(lambda _: self.mark("CLIP, identity and views, backward"))

    def mark(self, phase: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
        for dtype, (flop, moved) in self.work.take().items():
            entry = self.counted.setdefault(phase, {}).setdefault(dtype, [0.0, 0.0])
            entry[0] += flop
            entry[1] += moved

    def take(self, count: bool = False) -> None:
        """One step."""
        self.seconds: Counter[str] = Counter()
        self.counted: dict[str, dict[str, list[float]]] = {}
        generator = generator_for(0, 0)
        synchronise(self.device)
        self.last = time.perf_counter()
        if count:
            with self.work:
                self.run.step(0, generator)
        else:
            self.run.step(0, generator)


def profile(device: str, resolution: int, tiny: bool, dtype: str, repeats: int, top: int) -> Rows:
    """Our step by phase and by operator."""
    run = _run(device, resolution, tiny, dtype)
    phases = Phases(run, device)
    phases.take(count=True)
    counted, seconds = phases.counted, {}
    for _ in range(repeats):
        phases.take()
        for phase, taken in phases.seconds.items():
            seconds.setdefault(phase, []).append(taken)
    for phase, taken in seconds.items():
        yield {
            "name": phase,
            "kind": "phase",
            "dtype": dtype,
            "resolution": resolution,
            "work": counted.get(phase, {}),
        } | stats(taken)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as found:
        phases.take()
    events = [
        (
            event.key,
            (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6,
            event.count,
        )
        for event in found.key_averages()
    ]
    total = sum(taken for _, taken, _ in events)
    for name, taken, count in sorted(events, key=lambda event: -event[1])[:top]:
        yield {
            "name": name,
            "kind": "operator",
            "dtype": dtype,
            "resolution": resolution,
            "share": taken / total,
            "calls": count,
        } | stats([taken])
