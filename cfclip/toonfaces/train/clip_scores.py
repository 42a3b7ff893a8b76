"""Which colours and shapes the embedded CLIPs name correctly, on held-out renders and moved samples."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import Generator
from cfclip.toonfaces.captions import FACTS, Fact, facts_of, phrase
from cfclip.toonfaces.factors import HAIR_STYLES, HELD_OUT, NATURAL, PARTS, colours, sample_face
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.render import pictures
from cfclip.toonfaces.train.moved import moved_samples


def _named(guide: ClipGuide, features: Tensor, texts: Sequence[str]) -> np.ndarray:
    """For each unit image feature the index [N] of the nearest of ``texts``, under the 79 templates."""
    means = [F.normalize(guide.template_features(text).mean(0), dim=-1) for text in texts]
    return (features @ torch.stack(means).t()).argmax(1).cpu().numpy()


@torch.no_grad()
def _features(guide: ClipGuide, images: Tensor) -> Tensor:
    """Unit image features of pictures [N, 3, R, R], in [-1, 1] or uint8."""
    batches = []
    for batch in images.split(100):
        batch = batch.to(guide.mean.device)
        batch = batch.float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch
        batches.append(F.normalize(guide.encode_image(batch), dim=-1))
    return torch.cat(batches)


def _hits(guide: ClipGuide, part: str, features: Tensor, true: Sequence[str]) -> dict[str, np.ndarray]:
    """Column of :func:`colour_accuracy` -> whether each picture is named correctly. true: the names."""
    names, true = np.array(list(colours(part))), np.array(true, str)
    right = names[_named(guide, features, [f"face with {phrase(part, name)}" for name in names])] == true
    natural = np.isin(true, list(NATURAL[part]))
    held_out = np.array([(part, name) in HELD_OUT for name in true], bool)
    return {"accuracy": right[~natural & ~held_out], "natural": right[natural], "held_out": right[held_out]}


def _row(part: str, hits: Mapping[str, np.ndarray]) -> dict:
    """A row of the table: column -> share of hits, NaN without pictures; n_column -> number of pictures."""
    row = {"part": part}
    for name, right in hits.items():
        row |= {name: float(np.mean(right)) if len(right) else float("nan"), f"n_{name}": len(right)}
    return row


@torch.no_grad()
def colour_accuracy(guide: ClipGuide, faces: int = 1000, seed: int = 10_000) -> list[dict]:
    """Zero-shot colour naming on held-out renders, one row per part.

    The colour is chosen among *all* colours of the part, by "face with <colour> <part>" under the 79
    templates. ``accuracy``: over faces whose part has a counterfactual colour that training showed;
    ``natural``: a natural colour; ``held_out``: a (part, colour) pair that training never showed, given
    to a tenth of the faces. ``n_…``: the number of faces of each column.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    features, rows = _features(guide, pictures(people)), []
    for part in PARTS:
        have = [k for k, face in enumerate(people) if face.has(part)]
        hits = _hits(guide, part, features[have], [getattr(people[k], part).name for k in have])
        hits["held_out"] = np.empty(0)
        if have and (secret := dict(HELD_OUT).get(part)):
            shown = [people[k].with_colour(part, secret) for k in have[: max(1, faces // 10)]]
            given = _hits(guide, part, _features(guide, pictures(shown)), [secret] * len(shown))
            hits["held_out"] = given["held_out"]
        rows.append(_row(part, hits))
    return rows


@torch.no_grad()
def moved_accuracy(
    guide: ClipGuide, generator: Generator, readout: Readout, n: int = 2000, seed: int = 11_000
) -> list[dict]:
    """Like :func:`colour_accuracy`, on moved samples of the generator whose colour the readout is sure of."""
    images, true, _ = moved_samples(generator, readout, n, seed, held_out=True)
    features, rows = _features(guide, images), []
    for part in PARTS:
        names = np.array(list(colours(part)))
        sure = true[:, [FACTS.index((part, name)) for name in names]]
        some = np.flatnonzero(sure.any(1))
        chosen = features[torch.from_numpy(some).to(features.device)]
        rows.append(_row(part, _hits(guide, part, chosen, names[sure[some].argmax(1)])))
    return rows


CONTRASTS: dict[str, dict[Fact, str]] = {
    "hair style": {
        ("style", "short"): "face with short hair",
        ("style", "long"): "face with long hair",
        ("style", "bob"): "face with a bob",
        ("style", "curly"): "face with curly hair",
        ("style", "bald"): "bald face",
    },
    "smile": {("smile", "yes"): "smiling face", ("smile", "no"): "face not smiling"},
    "glasses": {("glasses?", "yes"): "face with glasses", ("glasses?", "no"): "face without glasses"},
    "beard": {("beard?", "yes"): "face with a beard", ("beard?", "no"): "face without a beard"},
}
"""Kind of shape -> fact -> the prompt for this fact."""


@torch.no_grad()
def shape_accuracy(guide: ClipGuide, faces: int = 1000, seed: int = 12_000) -> list[dict]:
    """Zero-shot naming of styles, smiles, glasses and beards by contrasting prompts, on held-out renders.

    An accuracy is the mean over the answers of the share of faces that are named correctly. ``bald``: whether
    "bald face" is chosen, among the prompts of all styles, exactly for the bald faces.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    features, facts = _features(guide, pictures(people)), [facts_of(face) for face in people]
    rows = []

    def add(what: str, right: np.ndarray, answer: np.ndarray) -> None:
        """Add a row; all answers count equally, however many faces have them."""
        shares = [right[answer == one].mean() for one in np.unique(answer)]
        rows.append({"shape": what, "accuracy": float(np.mean(shares)), "n": len(right)})

    for what, prompts in CONTRASTS.items():
        guess, asked = _named(guide, features, list(prompts.values())), list(prompts)
        known = [k for k, true in enumerate(facts) if true & set(asked)]
        answer = np.array([next(i for i, fact in enumerate(asked) if fact in facts[k]) for k in known])
        add(what, guess[known] == answer, answer)
        if what == "hair style":
            bald = HAIR_STYLES.index("bald")
            add("bald", (guess[known] == bald) == (answer == bald), answer == bald)
    return rows
