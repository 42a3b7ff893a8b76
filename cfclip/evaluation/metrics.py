"""Metrics of an edit: functions from an :class:`Edit` to columns with one number per picture.

N pictures, P parts of a picture, E the width of CLIP features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.domain import Claim, Domain, GroundTruth, Measurement
from cfclip.images import at_once
from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import max_batch

Columns = dict[str, np.ndarray]
"""Name of a column -> its values [N]."""
Draw = Callable[[Tensor, float], Tensor]
"""(w [N, L, D], strength) -> pictures [N, 3, R, R], e.g. an editor's ``edit``."""
METRIC_DIRECTIONS: dict[str, str] = {
    "area": "↑",
    "clean": "↑",
    "success_before": "",
    "success_after": "↑",
    "success_inverted": "↑",
    "progress": "↑",
    "truth_distance": "↓",
    "truth_floor": "",
    "leakage": "↓",
    "leakage_beyond": "↓",
    "identity": "↑",
    "lpips_*": "↓",
    "clip_before": "",
    "clip_after": "↑",
    "clip_direction": "↑",
    "heldout_clip_before": "",
    "heldout_clip_after": "↑",
    "heldout_direction": "↑",
    "kid_natural": "↓",
    "kid_counterfactual": "↓",
    "round_trip_*": "",
}
"""Column (or pattern) -> which way is better, "" for neither; in the order in which tables show them."""
PERCENT = ("area", "clean", "success_before", "success_after", "success_inverted")
"""Columns that are shares of pictures, or a mean of such shares (:func:`.tables.area`)."""
MAIN = (
    "prompt", "group", "n", "n_with_part", *PERCENT, "progress", "leakage",
    "clip_before", "clip_after", "heldout_clip_after", "clip_direction", "heldout_direction",
    "identity", "lpips_alex", "lpips_readout", "kid_counterfactual", "truth_distance", "round_trip_identity",
)  # fmt: skip
"""The columns of a report's page, in order; its files have all columns."""
CLEAN_IDENTITY, CLEAN_LEAKAGE = 0.85, 0.25
"""A clean success has at least this identity and at most this leakage, where 1 is another person's.

The mean leakage of the generator's best possible edits is 0.18 (``cfclip toonfaces ceiling``).
"""
TOGETHER = 8
"""How many of the generator's batches are measured at once; their strengths may differ."""
LEAST_SPREAD = 10.0
"""The least CIELAB distance that counts as another person's, for parts such as the white of the eye."""


def _feature(compute: Callable[["Pictures"], Any]) -> cached_property:
    """A property that is computed once; with ``together``, for all pictures of that larger set at once."""

    def values(self: "Pictures") -> Any:
        if self.together is None:
            return compute(self)
        every, rows = self.together
        return getattr(every, compute.__name__)[rows]

    values.__doc__ = compute.__doc__
    return cached_property(values)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures [N, 3, R, R] in [-1, 1] and their features, each computed when it is first needed."""

    domain: Domain
    images: Tensor
    together: tuple["Pictures", slice] | None = None  # a larger set, and the rows of it that these are

    def split(self, n: int) -> list["Pictures"]:
        """Parts of ``n`` pictures. A feature that one part needs is computed for all, in large batches."""
        parts = [slice(i, i + n) for i in range(0, len(self.images), n)]
        return [Pictures(self.domain, self.images[rows], (self, rows)) for rows in parts]

    @torch.no_grad()
    def _encode(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([network(batch) for batch in self.images.split(at_once(self.images))])

    @_feature
    def clip(self) -> Tensor:
        """Unit CLIP features [N, E]."""
        return F.normalize(self._encode(self.domain.clip.encode_image), dim=-1)

    @_feature
    def heldout_clip(self) -> Tensor:
        """Unit features [N, E'] of the CLIP that no edit was optimised with."""
        return F.normalize(self._encode(self.domain.heldout_clip.encode_image), dim=-1)

    @_feature
    def identity(self) -> Tensor:
        """Unit identity features, one row per picture."""
        return self._encode(self.domain.identity)

    @_feature
    def seen(self) -> Measurement:
        """What the ground truth measures in the pictures."""
        return self.domain.truth.measure(self.images)


class Edit:
    """The pictures ``before`` and ``after`` an edit by ``prompt``.

    source, edited: [N, 3, R, R] in [-1, 1]. Features are reused if ``source`` is the
    ``before`` of another edit.
    """

    def __init__(self, domain: Domain, prompt: str, source: Tensor | Pictures, edited: Tensor | Pictures):
        self.domain, self.prompt = domain, prompt
        self.before = source if isinstance(source, Pictures) else Pictures(domain, source)
        self.after = edited if isinstance(edited, Pictures) else Pictures(domain, edited)

    @cached_property
    def moved(self) -> np.ndarray:
        """:func:`movement` of each part, colours then shapes [N, 2 P], in units of :func:`natural_spread`."""
        moved, spread = movement(self.before.seen, self.after.seen), natural_spread(self.domain.truth)
        return np.concatenate([values / unit for values, unit in zip(moved, spread, strict=True)], 1)


def _clip_scores(guide: ClipGuide, edit: Edit, before: Tensor, after: Tensor) -> list[np.ndarray]:
    """``100 cos(image, text)`` before and after, and the directional score; 0 for a null edit.

    text: the mean of the prompt's unit template features. Directional: ``100 cos(edited - source image,
    target - source text)``.
    """
    target, source = guide.template_features(edit.prompt), guide.template_features(edit.domain.source_text)
    text = F.normalize(target.mean(0), dim=-1)
    moved = F.cosine_similarity(after - before, (target - source).mean(0)[None])
    return [score.cpu().numpy() for score in (100 * before @ text, 100 * after @ text, 100 * moved)]


def clip(edit: Edit) -> Columns:
    """The scores of :func:`_clip_scores` by the first guide."""
    names = ("clip_before", "clip_after", "clip_direction")
    scores = _clip_scores(edit.domain.clip, edit, edit.before.clip, edit.after.clip)
    return dict(zip(names, scores, strict=True))


def heldout_clip(edit: Edit) -> Columns:
    """The same scores by the held-out CLIP, because those by the CLIP that guided the edit are biased."""
    if (guide := edit.domain.heldout_clip) is None:
        return {}
    names = ("heldout_clip_before", "heldout_clip_after", "heldout_direction")
    scores = _clip_scores(guide, edit, edit.before.heldout_clip, edit.after.heldout_clip)
    return dict(zip(names, scores, strict=True))


def judged_direction(edit: Edit) -> np.ndarray:
    """The directional score [N] in [-1, 1] by the held-out CLIP; by the first guide where there is none."""
    *_, direction = (heldout_clip(edit) or clip(edit)).values()
    return direction / 100


def identity(edit: Edit) -> Columns:
    """Cosine of the identity features of source and edit, in [-1, 1]; 1 for the same person."""
    if edit.domain.identity is None:
        return {}
    return {"identity": (edit.before.identity * edit.after.identity).sum(1).cpu().numpy()}


@torch.no_grad()
def distances(domain: Domain, a: Tensor, b: Tensor) -> tuple[str, np.ndarray] | None:
    """(name, [N]) of the domain's perceptual distance between a and b [N, 3, R, R]; None if it has none."""
    if (distance := domain.distance()) is None:
        return None
    batches = zip(a.split(at_once(a)), b.split(at_once(b)), strict=True)
    return distance.name, torch.cat([distance.between(x, y) for x, y in batches]).cpu().numpy()


def perceptual(edit: Edit) -> Columns:
    """Perceptual distance of edit and source; the column's name says which distance it is."""
    named = distances(edit.domain, edit.before.images, edit.after.images)
    return {} if named is None else dict([named])


def ground_truth(edit: Edit) -> Columns:
    """Success, progress and leakage, if the prompt names the colour of a part or is a null edit.

    success: 1 if the part is visible and its nearest colour, in CIELAB, is the one asked for, else 0.
    progress: how far the part's colour has come from its own to the one asked for, by CIELAB distance:
        ``1 - after / before``, in [-1, 1]; 1 = there, 0 = no nearer, or the part is gone. NaN where the part
        had the colour already, or was too small to measure.
    leakage: how far the *other* parts moved, the mean of their colours (CIELAB distance) and shapes (1 - soft
        Dice), each divided by its :func:`natural_spread`: 0 = unchanged, 1 = as another person's.

    On a face without the part, success and progress are NaN. A face that loses the part by the edit fails. A
    null edit has no success and no progress, and all parts count in its leakage.
    """
    truth = edit.domain.truth
    claim = truth and truth.claim(edit.prompt)
    if truth is None or (claim is None and edit.prompt != edit.domain.source_text):
        return {}
    part, _ = claim or (None, None)
    others = np.array([name != part for name in truth.parts] * 2)
    columns = _towards(edit.before.seen, edit.after.seen, claim) if claim else {}
    return columns | {"leakage": np.nanmean(edit.moved[:, others], 1)}


def _towards(before: Measurement, after: Measurement, claim: Claim) -> Columns:
    """Success before and after, and progress, see :func:`ground_truth`."""
    (part, colour), has = claim, before.has(claim[0])
    first, last = (np.array([one == colour for one in seen.colour(part)], float) for seen in (before, after))
    was, is_now = before.distance(part, colour), after.distance(part, colour)
    away = has & (first == 0) & ~np.isnan(was)  # these have another colour, so was > 0
    progress = np.full(len(has), np.nan)
    progress[away] = np.nan_to_num((1 - is_now[away] / was[away]).clip(-1, 1), nan=0.0)
    return {
        "success_before": np.where(has, first, np.nan),
        "success_after": np.where(has, last, np.nan),
        "progress": progress,
    }


def kept(scores: Mapping[str, Any], leakage: float | None = None) -> Any:
    """Success, set to 0 on faces whose identity is below :data:`CLEAN_IDENTITY`; NaN where success is NaN.

    scores: the columns of :func:`ground_truth` and :func:`identity`, or a table of them. leakage: the limit
    above which success is 0 too; None: no limit.
    """
    good = scores["identity"] >= CLEAN_IDENTITY
    if leakage is not None:
        good = good & (scores["leakage"] <= leakage)
    return scores["success_after"] * good


def clean(edit: Edit) -> Columns:
    """1 where success, identity and leakage are good on the same face, otherwise 0; NaN where success is NaN.

    Identity is at least :data:`CLEAN_IDENTITY`, leakage at most :data:`CLEAN_LEAKAGE`.
    """
    scores = ground_truth(edit) | identity(edit)
    if not {"success_after", "identity"} <= scores.keys():
        return {}
    return {"clean": kept(scores, CLEAN_LEAKAGE)}


METRICS: tuple[Callable[[Edit], Columns], ...] = (
    clip,
    heldout_clip,
    identity,
    perceptual,
    ground_truth,
    clean,
)
"""Each returns {} where it does not apply."""


def leakage_by_part(edit: Edit) -> Columns:
    """part -> how far it moved [N], as in :func:`ground_truth`; NaN where it is not visible."""
    if edit.domain.truth is None:
        return {}
    colour, shape = np.split(edit.moved, 2, 1)
    both = np.where(np.isnan(colour), shape, np.where(np.isnan(shape), colour, (colour + shape) / 2))
    return dict(zip(edit.domain.truth.parts, both.T, strict=True))


def movement(before: Measurement, after: Measurement) -> tuple[np.ndarray, np.ndarray]:
    """CIELAB distance of mean colours, and 1 - soft Dice of masks: [N, P] each, NaN where not visible."""
    colour = np.linalg.norm(after.lab - before.lab, axis=-1)
    common = 2 * np.minimum(before.masks, after.masks).sum((2, 3))
    overlap = common / (before.masks + after.masks).sum((2, 3))
    seen = (before.area > 4) | (after.area > 4)
    return colour, np.where(seen, 1 - overlap, np.nan)


@lru_cache(maxsize=4)
def natural_spread(truth: GroundTruth) -> tuple[np.ndarray, np.ndarray]:
    """Median :func:`movement` between two random natural renders, per part: colours [P], shapes [P].

    The median of a colour is raised to at least :data:`LEAST_SPREAD`.
    """
    images = truth.renders(512)
    colour, shape = movement(truth.measure(images[:256]), truth.measure(images[256:]))
    return np.fmax(np.nanmedian(colour, 0), LEAST_SPREAD), np.nanmedian(shape, 0)


def evaluate(edit: Edit) -> Columns:
    """All :data:`METRICS` of ``edit``: column -> [N]."""
    columns: Columns = {}
    for function in METRICS:
        columns |= function(edit)
    return columns


def edits(
    domain: Domain, prompt: str, edit: Draw, w: Tensor, strengths: Sequence[float]
) -> Iterator[tuple[float, Edit]]:
    """(strength, edit) for each strength; the features of the sources are computed once."""
    most, source = max_batch(domain.generator), Pictures(domain, domain.pictures(w))
    group = max(1, TOGETHER * most // len(w))
    for some in (strengths[i : i + group] for i in range(0, len(strengths), group)):
        edited = torch.cat([edit(part, strength) for strength in some for part in w.split(most)])
        for strength, after in zip(some, Pictures(domain, edited).split(len(w)), strict=True):
            yield strength, Edit(domain, prompt, source, after)


def rows(columns: Mapping[str, np.ndarray], **labels: Any) -> list[dict]:
    """Columns [N] as N rows: ``labels``, the ``index`` and numbers with six digits; NaN is left out."""
    lines = []
    for i, values in enumerate(zip(*columns.values(), strict=True)):
        defined = {name: float(f"{v:.6g}") for name, v in zip(columns, values, strict=True) if v == v}
        lines.append(labels | {"index": i} | defined)
    return lines


def over_strengths(
    domain: Domain, prompt: str, edit: Draw, w: Tensor, strengths: Sequence[float]
) -> list[dict]:
    """:func:`evaluate` at each strength, one row per strength and picture; arguments as for :func:`edits`.

    :func:`cfclip.evaluation.measure` measures more.
    """
    lines = []
    for strength, one in edits(domain, prompt, edit, w, strengths):
        lines += rows(evaluate(one), strength=strength)
    return lines
