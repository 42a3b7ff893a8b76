"""The mapper for every prompt, which the explorer uses, and mappers that are trained without some prompts.

The second kind shows what a mapper can do with prompts that it was not trained on, see :mod:`.routes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.domain import GROUPS, Domain
from cfclip.evaluation.confidence import predicted_success
from cfclip.evaluation.many_prompts import compare, faces_for
from cfclip.evaluation.metrics import CLEAN_LEAKAGE, kept, natural_spread
from cfclip.method.config import MultiPromptConfig
from cfclip.method.trainer import train_mapper
from cfclip.models.clip import TEMPLATES
from cfclip.models.mapper import Mapper, WordMapper
from cfclip.toonfaces.captions import caption, claim_of, facts_of, phrase
from cfclip.toonfaces.domain import load_toonfaces
from cfclip.toonfaces.factors import PARTS, colours, sample_face
from cfclip.toonfaces.readout import VISIBLE

UNSEEN: dict[str, tuple[str, ...]] = {
    "skin": ("purple", "cyan", "orange"),
    "hair": ("cyan", "pink", "green"),
    "eyebrows": ("yellow", "purple", "red"),
    "eyes": ("orange", "yellow", "white"),
    "lipstick": ("cyan", "blue", "black"),
    "beard": ("pink", "blue", "white"),
    "glasses": ("green", "purple", "brown"),
    "shirt": ("grey", "red", "black"),
}
"""part -> colours that no seen prompt combines with it: 24 of the 107 pairs, with all of HELD_OUT."""


SHAPES: dict[tuple[str, str], tuple[str, ...]] = {
    ("smile", "yes"): ("smiling", "a smile", "a smiling face"),
    ("smile", "no"): ("not smiling", "no smile"),
    ("glasses?", "yes"): ("glasses", "wearing glasses", "spectacles"),
    ("glasses?", "no"): ("no glasses", "without glasses"),
    ("beard?", "yes"): ("beard", "a moustache", "bearded"),
    ("beard?", "no"): ("no beard", "clean-shaven", "without a beard"),
    ("style", "bald"): ("bald", "a bald head", "no hair"),
    ("style", "long"): ("long hair", "a face with long hair"),
    ("style", "short"): ("short hair", "a face with short hair"),
    ("style", "curly"): ("curly hair", "curls"),
    ("style", "bob"): ("a bob", "a bob haircut"),
}
"""Fact about a shape that a prompt can ask for -> its wordings."""


FORMS = (
    *(4 * ("{}",)),
    *(f"a {who} with {{}}" for who in ("face", "person", "man", "woman")),
    *(template("face with {}") for template in TEMPLATES[::10]),
)
"""Sentences that a prompt is put into; from them the mapper learns which words ask for nothing."""


def split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(seen, unseen) prompts, such as "green lipstick": together every colour of every part.

    The seen prompts contain every part and every colour, though not every pair.
    """
    pairs = [(part, colour) for part in PARTS for colour in colours(part)]
    seen = tuple(phrase(part, colour) for part, colour in pairs if colour not in UNSEEN[part])
    return seen, tuple(phrase(part, colour) for part, colour in pairs if colour in UNSEEN[part])


def config(**overrides: Any) -> MultiPromptConfig:
    """How the domain's mapper is trained: with every colour of every part, and with :data:`SHAPES`."""
    shapes = sum(SHAPES.values(), ())
    prompts = {"prompts": sum(split(), ()) + shapes, "shapes": shapes, "forms": FORMS}
    prompts |= {"shape_share": 0.5, "steps": 3000}  # a shape is learned more slowly than a colour
    return heldout_config(**prompts | overrides)


def heldout_config(**overrides: Any) -> MultiPromptConfig:
    """How a mapper is trained on the seen prompts only."""
    settings: dict[str, Any] = {"prompts": split()[0], "text": "tokens", "levels": ("fine",)}
    settings |= {"prompts_at_once": 8, "batch": 8, "steps": 2000, "num_views": 4}
    settings |= {"optimizer": "adam", "lr": 0.02, "ramp_down": 0.5, "lambda_l2": 0.06}
    settings |= {"lambda_perc": 1.0, "perc_limit": 0.2}
    settings |= {"train_latents": 256, "applicable_only": True, "dtype": "auto"}
    return MultiPromptConfig(**settings | overrides)


def pooled_config(**overrides: Any) -> MultiPromptConfig:
    """The same for a mapper that reads CLIP's feature of the whole prompt, as published."""
    settings = {"text": "pooled", "optimizer": "ranger", "lr": 40.0, "steps": 1500, "num_views": 8}
    return heldout_config(**settings | overrides)


def train(
    config: MultiPromptConfig, out: Path, device: torch.device | str = "cpu", domain: Domain | None = None
) -> Mapper:
    """Train for ``domain`` (default: toonfaces), or resume in ``out``; then :func:`finish` it."""
    domain = (domain or load_toonfaces()).to(device)
    return finish(domain, train_mapper(domain, config, out)[0])


def finish(domain: Domain, mapper: WordMapper) -> WordMapper:
    """Improve a trained ``mapper`` on training faces: :func:`purify`, then :func:`calibrate`."""
    return calibrate(domain, purify(domain, mapper))


def slots_of(domain: Domain, mapper: WordMapper, faces: Mapping[str, Tensor]) -> dict[str, int]:
    """Prompt -> the colouring slot that it moves most, on its ``faces``."""
    slots = mapper.groups[-1]
    return {
        prompt: int(slots.sizes(w, mapper.read(domain.clip, prompt)).mean(0).argmax())
        for prompt, w in faces.items()
    }


def purify(
    domain: Domain,
    mapper: WordMapper,
    n: int = 48,
    own: float = 16.0,
    pixels: float = 10.0,
    keep: float = 0.03,
) -> WordMapper:
    """Reduce the move of each colouring slot, in place, to what colours its own part, evenly.

    The part p of a slot is the most frequent part of the prompts that move this slot most. The slot then
    moves v instead of u, where to first order

        v = argmin own (v - u)' A_p (v - u) + sum_{q != p} v' A_q v
                   + pixels (sum_{q != p} v' S_q v + v' V_p v) + eps |v - u|^2
          = (own A_p + held_p + eps)^-1 (own A_p + eps) u,    held_p: the matrix of the three sums.

    A_q, S_q and V_q come from :func:`colour_gradients` over ``n`` training faces. A_q is divided by the
    square of the natural spread of the colour. S and V are scaled by one number that gives sum_q S_q the
    trace of sum_q A_q. eps is ``keep`` times the mean eigenvalue of sum_q A_q. No colour is named here: the
    ground truth says where the parts are, and the words still say which colour a part gets.
    """
    prompts, slots = split()[0], mapper.groups[-1]
    by_slot: dict[int, list[str]] = {}
    for prompt, k in slots_of(domain, mapper, faces_for(domain, prompts, 2, "train")).items():
        by_slot.setdefault(k, []).append(claim_of(prompt)[0])
    draw, random, sums = np.random.default_rng(0), torch.Generator(domain.device).manual_seed(0), 0.0
    for w in domain.latents(n, "train", 1).split(8):
        with torch.no_grad():  # codes half way along an edit
            w = torch.cat([domain.edited(one[None], str(draw.choice(prompts)), mapper, 0.5) for one in w])
        sums = sums + torch.stack(colour_gradients(domain, w, slots.layers, random))
    colour, change, uneven = sums
    colour = colour / torch.from_numpy(natural_spread(domain.truth)[0]).to(colour)[:, None, None] ** 2
    mean = colour.sum(0).diagonal().mean()
    scale = pixels * mean / change.sum(0).diagonal().mean()
    eps = keep * mean * torch.eye(len(colour[0])).to(colour)
    for k, parts in by_slot.items():
        part = domain.truth.parts.index(max(set(parts), key=parts.count))
        held = colour.sum(0) - colour[part] + scale * (change.sum(0) - change[part] + uneven[part])
        kept_of = torch.linalg.solve(own * colour[part] + held + eps, own * colour[part] + eps)
        with torch.no_grad():
            slots.move[k] = (slots.move[k].double() @ kept_of.T).to(slots.move)
    return mapper


@torch.enable_grad()
def colour_gradients(
    domain: Domain, w: Tensor, layers: Sequence[int], random: torch.Generator, probes: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """How a move u of ``layers`` of w [N, L, D] changes each part q.

    Returns (A, S, V), each [P, L' D, L' D] in float64. All are to first order, and sums over the faces and
    over RGB in [0, 1]. u' A_q u is the squared change of the colour of q, the mean of the pixels that q
    covers. u' S_q u is the sum of the squared changes of these pixels. u' V_q u is the same sum after
    the mean change is subtracted, so that S = V + area A. V is estimated with ``probes`` random pictures per
    face.
    """
    x = w[:, list(layers)].requires_grad_()
    images = domain.generator.synthesis(w.index_copy(1, torch.tensor(layers, device=w.device), x))
    with torch.no_grad():
        masks = domain.truth.masks(images)[:, :, None]  # [N, P, 1, H, W]
        area = masks.sum((-2, -1), keepdim=True)
        mean = masks / area.clamp_min(VISIBLE)  # a few pixels say little
        size = (probes, *masks.shape[:2], *images.shape[1:])
        noise = masks.sqrt() * torch.randn(size, device=w.device, generator=random)
        uneven = noise - masks / area.clamp_min(1e-6) * noise.sum((-2, -1), keepdim=True)

    def rows(weights: Tensor) -> Tensor:
        """Gradients of the sums of the pictures times ``weights`` [K, N, P, 3, H, W]: [P, K, N, L' D]."""
        sums = ((images * one).sum() / 2 for one in weights.transpose(1, 2).flatten(0, 1))
        found = [torch.autograd.grad(one, x, retain_graph=True)[0].flatten(1) for one in sums]
        return torch.stack(found).double().unflatten(0, (len(weights), -1)).transpose(0, 1)

    channels = torch.eye(3, device=w.device)[:, None, None, :, None, None]
    j, differ = rows(channels * mean), rows(uneven) / probes**0.5
    colour, spread = (torch.einsum("pkni,pknj->pij", one, one) for one in (j, differ))
    j = j * area.flatten(1).T[:, None, :, None].sqrt()
    return colour, spread + torch.einsum("pkni,pknj->pij", j, j), spread


GAINS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Factors by which :func:`calibrate` may multiply the move of a slot."""


@torch.no_grad()
def calibrate(domain: Domain, mapper: WordMapper, n: int = 32) -> WordMapper:
    """Strengthen each colouring slot, in place, by the gain at which most training faces are edited well.

    Losses that hold an edit back stop the small parts half way. An edit counts as 1 if it succeeds at an
    identity of 0.85, but as two thirds if it leaks. Every other seen prompt is tried on ``n`` faces, for the
    slot that it moves most. Of the gains within a percentage point of the best, the smallest is used.
    """
    faces = faces_for(domain, split()[0][::2], n, "train")
    slot = slots_of(domain, mapper, faces)
    rows = pd.concat([compare(domain, mapper, faces, gain) for gain in GAINS], ignore_index=True)
    counts = (2 * kept(rows) + kept(rows, CLEAN_LEAKAGE)) / 3
    found = counts.groupby([rows["prompt"].map(slot), rows["strength"]]).mean().unstack()
    for k, shares in found.iterrows():
        mapper.groups[-1].move[k] *= least_of_the_best(shares)
    return mapper


def least_of_the_best(shares: pd.Series) -> float:
    """The smallest strength in the index within a percentage point of the best share; 1 if all are NaN."""
    return min(shares.index[shares > shares.max() - 0.01], default=1.0)


def measure(domain: Domain, n: int = 32) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Edits by ``domain.mapper`` to every colour of every part: means by group, and means by part.

    Each colour is tried on ``n`` test faces that have the part.
    """
    faces = faces_for(domain, sum(split(), ()), n)
    table = compare(domain, domain.mapper, faces).drop(columns="strength")
    groups = table["prompt"].map(domain.group_of)
    table["group"] = pd.Categorical(groups, [one for one in GROUPS if one in set(groups)], ordered=True)
    table["part"] = [claim_of(prompt)[0] for prompt in table["prompt"]]

    def means(by: str) -> pd.DataFrame:
        grouped = table.groupby(by, observed=True, sort=by == "group")
        return grouped.mean(numeric_only=True).drop(columns="index").assign(n=grouped.size()).reset_index()

    return means("group"), means("part")


WORDINGS = 64
"""Number of captions on which predictions are tried."""


def wordings(domain: Domain, seed: int = 90_000) -> tuple[str, ...]:
    """:data:`WORDINGS` captions of random faces, with one to three measurable claims each, as people type."""
    rng = np.random.default_rng(seed)
    faces = (sample_face((seed, rng.integers(2**31)), "both") for _ in count())
    texts = (caption(facts_of(face), rng)[0] for face in faces)
    return tuple(islice((text for text in texts if 1 <= len(domain.truth.claims(text)) <= 3), WORDINGS))


@torch.no_grad()
def calibration(domain: Domain, n: int = 32) -> dict[str, Any]:
    """How well ``domain.mapper`` does what prompts say, each on ``n`` training faces that it can change.

    ``measured``: prompt -> success, for the prompts of :func:`split` and of :data:`SHAPES` except smiles,
    which cannot be measured. ``claims``: claim -> mean success. ``error``: mean absolute error of the success
    that is predicted for :func:`wordings`. ``error_of_the_mean``: the same for a constant prediction, the
    mean of ``claims``. ``wordings``: how many captions these errors are over.
    """
    truth, shapes = domain.truth, [texts for fact, texts in SHAPES.items() if fact[0] != "smile"]
    prompts, tried_on = sum([*split(), *shapes], ()), wordings(domain)
    faces = faces_for(domain, (*prompts, *tried_on), n, "train", 1)
    different = {id(w): w for w in faces.values()}
    before = {key: truth.measure(domain.pictures(w)) for key, w in different.items()}

    def success(prompt: str) -> dict[str, float]:
        w = faces[prompt]
        done = truth.done(prompt, before[id(w)], truth.measure(domain.edit(w, prompt)))
        return {claim: float(np.nanmean(hits)) for claim, hits in done.items() if not np.isnan(hits).all()}

    found = {prompt: success(prompt) for prompt in prompts}
    measured = {prompt: round(min(shares.values()), 3) for prompt, shares in found.items() if shares}
    claims = pd.DataFrame(list(found.values())).mean().round(3).to_dict()
    known = {"n": n, "measured": measured, "claims": claims}
    tried, mean = replace(domain, confidence=known), float(np.mean([*claims.values()]))
    pairs = [(predicted_success(tried, text), min(success(text).values(), default=None)) for text in tried_on]
    pairs = [(guess, share) for guess, share in pairs if guess is not None and share is not None]
    errors = [(abs(guess - share), abs(mean - share)) for guess, share in pairs]
    error, error_of_the_mean = np.mean(errors, 0).tolist()
    return {"error": error, "error_of_the_mean": error_of_the_mean, "wordings": len(pairs)} | known


def probe(domain: Domain) -> pd.DataFrame:
    """Linear probe: part and colour predicted from the text feature.

    ``min_A |X A - Y|^2 + |A|^2`` with X: raw text features [P, E], centred; Y: part and colour,
    one-hot. One row for the unseen prompts, predicted from all seen ones; one for the seen prompts, each
    predicted from the others. ``part``, ``colour`` and ``both``: shares predicted correctly.
    """
    seen, unseen = split()
    claims = [claim_of(prompt) for prompt in seen + unseen]
    known = [sorted({claim[k] for claim in claims}) for k in (0, 1)]
    x = domain.clip.encode_text(seen + unseen)
    answers = torch.tensor([[known[k].index(claim[k]) for k in (0, 1)] for claim in claims])
    y = torch.cat([F.one_hot(answers[:, k], len(known[k])).float() for k in (0, 1)], 1)

    def correct(fitted: Tensor, tested: Tensor) -> Tensor:
        """bool [T, 2]: whether part and colour of prompts ``tested`` are predicted from those ``fitted``."""
        mean, level = x[fitted].mean(0), y[fitted].mean(0)
        a = x[fitted] - mean
        solved = torch.linalg.solve(a @ a.T + torch.eye(len(a)), y[fitted] - level)
        scores = (x[tested] - mean) @ a.T @ solved + level
        guesses = [part.argmax(1) for part in scores.split([len(names) for names in known], 1)]
        return torch.stack(guesses, 1) == answers[tested]

    rows, fitted = torch.arange(len(claims)), torch.arange(len(seen))
    results = {
        "unseen": correct(fitted, rows[len(seen) :]),
        "seen, each left out": torch.cat([correct(fitted[fitted != i], rows[i : i + 1]) for i in fitted]),
    }
    table = []
    for name, right in results.items():
        shares = torch.cat([right, right.all(1, keepdim=True)], 1).float().mean(0).tolist()
        table.append([name, *shares, len(right)])
    return pd.DataFrame(table, columns=["prompts", "part", "colour", "both", "n"])
