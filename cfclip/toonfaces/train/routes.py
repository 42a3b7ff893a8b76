"""Compares routes to one mapper for many prompts, which are trained without the unseen pairs of ``multi``.

Words: CF-CLIP's objective with many prompts per step, see :func:`.multi.heldout_config`. Whole: the same for
a mapper that reads CLIP's feature of the whole prompt. Teachers: an offset in W+ is trained for each seen
prompt, then a mapper that reads words learns the offsets by regression. Teachers, then words: some steps of
CF-CLIP's objective follow. Pairs (DeltaEdit, Lyu et al. 2023): no prompts in training. The input is the
difference of two pictures of the generator in CLIP's space, the output is the move in W+ between them; in use
the input is the difference of two texts. Alone: for comparison, a separate mapper for each prompt of
:func:`own_prompts`.
"""

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.baselines.offset import OffsetTrainer
from cfclip.domain import Domain
from cfclip.evaluation.ablation import ROWS
from cfclip.evaluation.many_prompts import compare, faces_for
from cfclip.evaluation.metrics import kept
from cfclip.evaluation.report import commit
from cfclip.files import slug
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.loop import run_loop
from cfclip.method.trainer import mapper_sizes, train_mapper
from cfclip.models.clip import ClipGuide
from cfclip.models.mapper import RESIDUAL_SCALE, Mapper, MapperConfig, WordMapper, level_slices
from cfclip.models.stylegan2 import max_batch
from cfclip.toonfaces.captions import claim_of, phrase
from cfclip.toonfaces.factors import COUNTERFACTUAL, PARTS
from cfclip.toonfaces.train import multi
from cfclip.toonfaces.train.moved import random_moves

ALONE = {"steps": 300, "batch": 4, "lr": 15.0, "lambda_l2": 0.1, "levels": ("fine",), "train_latents": 256}
ALONE |= ROWS["pixels held"]
TEACHER = {"steps": 60, "batch": 4, "lr": 0.3, "lambda_l2": 0.06, "levels": ("fine",), "num_views": 4}
TEACHER |= {"train_latents": 64}
TAUGHT = 0.5
"""A teacher with less success than this on training faces is left out."""
PAIRS = 8_000
STRENGTHS = (1.0, 1.2, 1.4, 2.0, 4.0)
"""Strengths of a route's edits, from which :func:`best_strength` chooses on training faces."""


class PairMapper(Mapper):
    """A mapper that reads how a prompt differs from the source text: a direction in CLIP's space."""

    source_text = "face"

    def read(self, clip: ClipGuide, texts: str | Sequence[str]) -> Tensor:
        """The unit difference [P, E] between the unit features of each text and of the source text."""
        words, source = (F.normalize(clip.encode_text(one), dim=-1) for one in (texts, self.source_text))
        return F.normalize(words - source, dim=-1)


class Trained(NamedTuple):
    """A mapper of a route."""

    route: str
    seed: int
    mapper: Mapper
    seconds: float  # of its training
    taught: Sequence[str]  # the prompts that it was trained on


# ---- trainings ----


def teach(domain: Domain, prompts: Sequence[str], out: Path, seed: int) -> tuple[dict[str, Tensor], float]:
    """Prompt -> the offset [L, D] that CF-CLIP's objective finds, if it succeeds; the seconds taken."""
    teachers, seconds = {}, 0.0
    for prompt, faces in faces_for(domain, prompts, 16, "train", 1).items():
        c = CFCLIPConfig(prompt=prompt, seed=seed, optimizer="adam", dtype="auto", **TEACHER)
        offset, rows = train_mapper(domain, c, out / slug(prompt), trainer=OffsetTrainer, progress=False)
        seconds += rows[-1]["seconds"]
        if compare(domain, offset, {prompt: faces})["success_after"].fillna(0).mean() >= TAUGHT:
            teachers[prompt] = RESIDUAL_SCALE * (offset.delta * offset.edited).detach()
    return teachers, seconds


def learn(
    domain: Domain, teachers: Mapping[str, Tensor], config: MultiPromptConfig, out: Path, steps: int = 1500
) -> tuple[Mapper, float]:
    """A mapper that reads words, trained by regression on the moves of ``teachers``; the seconds taken."""
    mapper = Mapper.initialised(mapper_sizes(domain, config), torch.Generator().manual_seed(config.seed))
    mapper = mapper.to(domain.device)
    words = [mapper.read(domain.clip, [form.format(prompt) for prompt in teachers]) for form in multi.FORMS]
    moves, w = torch.stack([*teachers.values()]), domain.latents(256, "train", config.seed)

    def loss(generator: torch.Generator) -> Tensor:
        form = int(torch.randint(len(words), (), generator=generator))
        which = torch.randint(len(moves), (64,), generator=generator)
        faces = w[torch.randint(len(w), (64,), generator=generator)]
        moved = mapper.edit(faces, words[form][which]) - faces
        return (moved - moves[which]).square().mean() / moves.square().mean()

    return mapper, regress(mapper, loss, config.lr, steps, config.seed, out)


def learn_pairs(domain: Domain, out: Path, seed: int, steps: int = 3000) -> tuple[PairMapper, float]:
    """A mapper from differences in CLIP's space to moves of the colouring layers; the seconds taken."""
    begun = time.perf_counter()
    g, first = domain.generator, level_slices(domain.level_split)["fine"].start
    random = torch.Generator(domain.device).manual_seed(seed)
    with torch.no_grad():
        w, moved = random_moves(g, PAIRS, random)
        moved = torch.cat([w[:, :first], moved[:, first:]], 1)

        def features(codes: Tensor) -> Tensor:
            images = (g.synthesis(part).clamp(-1, 1) for part in codes.split(max_batch(g)))
            return torch.cat([F.normalize(domain.clip.encode_image(one), dim=-1) for one in images])

        differs = F.normalize(features(moved) - features(w), dim=-1)
    sizes = MapperConfig(g.num_ws, g.w_dim, domain.clip.embed_dim, ("fine",), "channel", domain.level_split)
    mapper = PairMapper(sizes)
    mapper.reset(torch.Generator().manual_seed(seed))
    mapper, mapper.source_text = mapper.to(domain.device), domain.source_text
    scale = (moved - w)[:, first:].square().mean()

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(PAIRS, (128,), generator=generator)
        return (mapper.edit(w[rows], differs[rows]) - moved[rows])[:, first:].square().mean() / scale

    drawn = time.perf_counter() - begun
    return mapper, drawn + regress(mapper, loss, 1.0, steps, seed, out)  # weights have a spread of 100


def regress(
    mapper: Mapper, loss: Callable[[torch.Generator], Tensor], lr: float, steps: int, seed: int, out: Path
) -> float:
    """Train ``mapper`` with Adam, one ``loss`` per step, while the rate falls to 0; returns the seconds."""
    optimizer = torch.optim.Adam(mapper.parameters(), lr)

    def step(i: int, generator: torch.Generator) -> dict[str, Tensor]:
        optimizer.param_groups[0]["lr"] = lr * (1 - i / steps)
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return {"loss": value.detach()}

    state = {"mapper": mapper, "optimizer": optimizer}
    rows = run_loop(step, steps, state=state, seed=seed, out=out, desc="regression")
    mapper.eval().requires_grad_(False)
    return rows[-1]["seconds"]


# ---- comparison ----


def own_prompts() -> tuple[str, ...]:
    """Prompts with a separate mapper: all unseen ones, and the first seen counterfactual one of each part."""
    seen, unseen = multi.split()
    counterfactual = [[phrase(part, name) for name in COUNTERFACTUAL[part]] for part in PARTS]
    firsts = [next(one for one in prompts if one in seen) for prompts in counterfactual if prompts]
    return (*firsts, *unseen)


ROUTES = ("alone", "words", "teachers", "teachers, then words", "pairs", "whole")


def trained(
    domain: Domain, out: Path, seeds: Sequence[int], only: Collection[str] = ROUTES
) -> Iterator[Trained]:
    """The mappers of the routes ``only``, one by one. Those in ``out`` already are not trained again."""
    seed = seeds[0]  # of all routes except words
    config = multi.heldout_config(seed=seed)
    for prompt in own_prompts() if "alone" in only else ():
        c = CFCLIPConfig(prompt=prompt, seed=seed, dtype="auto", **ALONE)
        mapper, rows = train_mapper(domain, c, out / f"alone-{slug(prompt)}-{seed}", progress=False)
        yield Trained("alone", seed, mapper, rows[-1]["seconds"], [prompt])
    for one in seeds if "words" in only else ():
        mapper, rows = train_mapper(domain, multi.heldout_config(seed=one), out / f"words-{one}")
        yield Trained("words", one, mapper, rows[-1]["seconds"], config.prompts)
    if {"teachers", "teachers, then words"} & set(only):
        teachers, seconds = teach(domain, config.prompts, out / f"teachers-{seed}", seed)
        start, more = learn(domain, teachers, config, out / f"taught-{seed}")
        seconds += more
    if "teachers" in only:
        # a copy: best_strength changes the slots
        yield Trained("teachers", seed, copy.deepcopy(start), seconds, [*teachers])
    if "teachers, then words" in only:
        config = multi.heldout_config(seed=seed, steps=500, lr=0.01, ramp_down=1.0)
        mapper, rows = train_mapper(domain, config, out / f"teachers-words-{seed}", start=start)
        seconds += rows[-1]["seconds"]
        yield Trained("teachers, then words", seed, mapper, seconds, config.prompts)
    if "pairs" in only:
        mapper, seconds = learn_pairs(domain, out / f"pairs-{seed}", seed)
        yield Trained("pairs", seed, mapper, seconds, config.prompts)  # prompts only choose its strength
    if "whole" in only:
        mapper, rows = train_mapper(domain, multi.pooled_config(seed=seed), out / f"whole-{seed}")
        yield Trained("whole", seed, mapper, rows[-1]["seconds"], config.prompts)


@torch.no_grad()
def best_strength(domain: Domain, mapper: Mapper, faces: Mapping[str, Tensor]) -> float:
    """The smallest of :data:`STRENGTHS` within a percentage point of the one that keeps most of ``faces``.

    A mapper that reads words gets a strength for each slot instead, see :func:`.multi.finish`; 1 is returned.
    """
    if isinstance(mapper, WordMapper):
        multi.finish(domain, mapper)
        return 1.0
    found = {strength: kept(compare(domain, mapper, faces, strength)).mean() for strength in STRENGTHS}
    return multi.least_of_the_best(pd.Series(found))


MEASURED = ("kept", "success_after", "progress", "leakage", "identity")


def compared(
    domain: Domain, out: Path, seeds: Sequence[int] = (0, 1, 2), n: int = 32, only: Collection[str] = ROUTES
) -> pd.DataFrame:
    """Edits of the routes ``only`` by :func:`own_prompts` of ``n`` test faces each that have the part.

    Means per route, seed and prompt. ``kept``: see :func:`.metrics.kept`. ``seen``: whether the prompt is
    among the seen ones of :func:`.multi.split`. ``strength``: that of the edits, chosen on training faces.
    ``n_judged``: number of faces that have the part. ``failed``: the prompts whose teachers failed and were
    left out. ``commit``: that of the code.
    """
    rows, seen = [], multi.split()[0]
    every = dict.fromkeys((*seen[::2], *own_prompts()))
    training, test = (faces_for(domain, every, n, split) for split in ("train", "test"))
    for route, seed, mapper, seconds, taught in trained(domain, out, seeds, only):
        alone = route == "alone"
        tried = {prompt: training[prompt] for prompt in (taught if alone else seen[::2])}
        strength = best_strength(domain, mapper, tried)
        asked = taught if alone else own_prompts()
        faces = compare(domain, mapper, {prompt: test[prompt] for prompt in asked}, strength)
        faces["kept"] = kept(faces)
        each = faces.groupby("prompt", sort=False)
        means = each[list(MEASURED)].mean().assign(n_judged=each["success_after"].count()).reset_index()
        failed = ", ".join(prompt for prompt in seen if prompt not in taught) if route == "teachers" else ""
        about = {"route": route, "seed": seed, "strength": strength, "seconds": seconds, "failed": failed}
        rows.append(means.assign(**about))
    table = pd.concat(rows, ignore_index=True).assign(commit=commit(), device=str(domain.device))
    claims = table["prompt"].map(claim_of)
    table.insert(0, "seen", table["prompt"].isin(seen))
    table.insert(0, "group", [domain.truth.group(claim) for claim in claims])
    table.insert(0, "part", [part for part, _ in claims])
    return table


def by_route(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`compared`, one line per route and ``seen``: means over prompts, then over seeds.

    share_of_own: ``kept``, divided by that of separate mappers (the route "alone").
    """
    each = table.groupby(["seen", "route", "seed"], sort=False)[[*MEASURED, "seconds"]].mean()
    lines = each.groupby(["seen", "route"], sort=False).mean().reset_index()
    alone = lines[lines["route"] == "alone"].set_index("seen")["kept"]
    lines.insert(3, "share_of_own", lines["kept"] / lines["seen"].map(alone))
    counts = table.groupby(["seen", "route"], sort=False)[["seed", "prompt"]].nunique().add_suffix("s")
    lines = lines.join(counts, on=["seen", "route"])
    lines["seen"] = lines["seen"].map({True: "yes", False: "no"})
    return lines.sort_values("seen", kind="stable", ignore_index=True)


def by_part(table: pd.DataFrame) -> pd.DataFrame:
    """Means of ``kept`` over the unseen prompts of each part, a column per route."""
    unseen = table[~table["seen"]].groupby(["part", "route"], sort=False)["kept"].mean().unstack("route")
    return unseen[table["route"].unique()].rename_axis(columns=None).reset_index()
