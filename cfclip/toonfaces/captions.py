"""Plain-English captions of toon faces, and which captions are true of which face.

A caption claims *facts* such as ("lipstick", "green"). A caption written for one face may be true of others,
and the contrastive training knows every true (image, caption) pair of a batch.
"""

import re

import numpy as np
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from cfclip.toonfaces.factors import HAIR_STYLES, HELD_OUT, PARTS, Face, colours, sample_face

Fact = tuple[str, str]

FACTS: tuple[Fact, ...] = (
    *((part, name) for part in PARTS for name in colours(part)),
    *(("style", style) for style in HAIR_STYLES),
    *(("beard?", "yes"), ("glasses", "yes"), ("smile", "yes"), ("person", "man"), ("person", "woman")),
)
"""Everything that a caption can claim; the order of :func:`fact_vector`."""

_NOUNS = {part: (part,) for part in PARTS} | {
    "lipstick": ("lipstick", "lipstick", "lips"),
    "eyebrows": ("eyebrows", "eyebrows", "brows"),
}
_STYLES = {
    "short": ("short hair",),
    "long": ("long hair",),
    "bob": ("a bob", "a bob haircut"),
    "curly": ("curly hair", "curls"),
    "bald": ("a bald head",),
}


def facts_of(face: Face) -> set[Fact]:
    """Everything true of ``face`` that a caption can say."""
    facts: set[Fact] = {(part, getattr(face, part).name) for part in PARTS if face.has(part)}
    facts.add(("style", face.hair_style))
    if face.has_beard or face.hair_style == "bald":
        facts.add(("person", "man"))
    elif face.hair_style in ("long", "bob"):
        facts.add(("person", "woman"))
    flags = {"beard?": face.has_beard, "glasses": face.has_glasses, "smile": face.smile > 0.5}
    return facts | {(name, "yes") for name, holds in flags.items() if holds}


def fact_vector(facts: set[Fact]) -> np.ndarray:
    """Multi-hot bool [len(FACTS)]."""
    return np.array([fact in facts for fact in FACTS])


def matches(faces: Tensor, claims: Tensor) -> Tensor:
    """faces [N, F], claims [M, F], bool -> bool [N, M]: are all claims of caption m true of face n?"""
    return (~faces).float() @ claims.float().t() == 0


def phrase(part: str, colour: str, rng: np.random.Generator | None = None) -> str:
    """ "green lipstick", or with ``rng`` perhaps "green lips"; without ``rng`` the plainest wording."""
    noun = _NOUNS[part][0 if rng is None else rng.integers(len(_NOUNS[part]))]
    return f"{colour} {noun}"


def claim_of(prompt: str) -> tuple[str, str] | None:
    """The (part, colour) that a prompt asks for, e.g. "green lipstick" or "a man with a blue beard".

    None if the prompt does not name the colour of exactly one part.
    """
    text = " ".join(prompt.lower().split())
    claims = {
        (part, colour)
        for part in PARTS
        for colour in colours(part)
        for noun in _NOUNS[part]
        if re.search(rf"\b{colour} {noun}\b", text)
    }
    return claims.pop() if len(claims) == 1 else None


def caption(face: Face, rng: np.random.Generator) -> tuple[str, set[Fact]]:
    """A true caption of ``face`` and the facts it claims: 0 to 6 part colours, bare or in a CLIP template."""
    facts = facts_of(face)
    visible = [part for part in PARTS if face.has(part)]
    count = rng.choice(7, p=(0.03, 0.32, 0.22, 0.17, 0.12, 0.08, 0.06))
    chosen = [visible[i] for i in rng.permutation(len(visible))[:count]]
    extra_kinds = {"style", "glasses", "smile"} | (set() if "beard" in chosen else {"beard?"})
    extras = [fact for fact in sorted(facts) if fact[0] in extra_kinds]
    claims: set[Fact] = set()
    words, adjectives = [], []
    for part in chosen:
        name = getattr(face, part).name
        claims.add((part, name))
        text = phrase(part, name, rng)
        words.append(f"a {text}" if part == "beard" and rng.uniform() < 0.7 else text)
    if extras and rng.uniform() < 0.35:
        fact = extras[rng.integers(len(extras))]
        claims.add(fact)
        match fact:
            case ("glasses", _):
                words.append("glasses")
            case ("beard?", _):
                words.append("a beard")
            case ("smile", _) if rng.uniform() < 0.5:
                words.append("a smile")
            case ("smile", _):
                adjectives.append("smiling")
            case ("style", "bald") if rng.uniform() < 0.8:
                adjectives.append("bald")
            case ("style", style):
                words.append(_STYLES[style][rng.integers(len(_STYLES[style]))])
    rng.shuffle(words)
    gender = next((value for key, value in facts if key == "person"), None)
    subject = "face" if rng.uniform() < 0.6 else "person"
    if gender and rng.uniform() < 0.15:
        subject = gender
        claims.add(("person", gender))
    listed = " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
    if listed and not adjectives and subject in ("face", "person") and rng.uniform() < 0.4:
        text = listed
    else:
        text = " ".join([*adjectives, subject]) + (f" with {listed}" if listed else "")
    if rng.uniform() < 0.7:
        text = OPENAI_IMAGENET_TEMPLATES[rng.integers(len(OPENAI_IMAGENET_TEMPLATES))](text)
    return text, claims


def vocabulary() -> list[str]:
    """Texts that together hold every word of every :func:`caption`."""
    parts = [text for part in PARTS for text in (*colours(part), *_NOUNS[part])]
    styles = [text for texts in _STYLES.values() for text in texts]
    templates = [template("a") for template in OPENAI_IMAGENET_TEMPLATES]
    others = ["glasses, a beard and a smile", "smiling bald face with", "person man woman"]
    return parts + styles + templates + others


def training_face(seed: tuple[int, ...]) -> Face:
    """A face of both supports that does not show a held-out (part, colour) pair."""
    for attempt in range(1000):
        face = sample_face((*seed, attempt), "both")
        if not any(face.has(part) and getattr(face, part).name == name for part, name in HELD_OUT):
            return face
    raise RuntimeError("1000 faces in a row show a pair of HELD_OUT: hold out fewer pairs")
