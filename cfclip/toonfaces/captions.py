"""Plain-English captions of toon faces, which captions are true of which face, and what a prompt says.

A caption claims *facts* such as ("lipstick", "green"). A caption written for one face may be true of others,
and the contrastive training knows every true (image, caption) pair of a batch.
"""

import re
from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from cfclip.toonfaces.factors import HAIR_STYLES, PARTS, Face, colours

Fact = tuple[str, str]
T = TypeVar("T")

GROUPS: dict[str, tuple[str, ...]] = {
    **{part: tuple(colours(part)) for part in PARTS},
    "style": HAIR_STYLES,
    **dict.fromkeys(("beard?", "glasses?", "smile"), ("yes", "no")),
    "person": ("man", "woman"),
}
"""Key of a fact -> its values; at most one of them is true of a face."""

FACTS: tuple[Fact, ...] = tuple((key, value) for key, values in GROUPS.items() for value in values)
"""Everything that a caption can claim; the order of :func:`fact_vector`."""

COLOUR_NAMES: tuple[str, ...] = tuple(dict.fromkeys(name for part in PARTS for name in colours(part)))
"""The name of every colour that some part can have."""

_NOUNS: dict[str, tuple[str, ...]] = {
    "skin": ("skin",),
    "hair": ("hair",),
    "eyebrows": ("eyebrows", "eyebrows", "brows"),
    "eyes": ("eyes", "eyes", "eyes", "irises"),
    "lipstick": (*(3 * ("lipstick", "lips")), "mouth"),
    "beard": ("beard", "beard", "beard", "moustache", "mustache"),
    "glasses": ("glasses", "glasses", "glasses", "spectacles"),
    "shirt": ("shirt", "shirt", "shirt", "sweater", "t-shirt"),
}
"""Part -> nouns for it, repeated in proportion to their use; the first is the plainest.

The drawn beard includes a moustache.
"""

_SAME = {
    "grey": ("grey", "gray"), "blonde": ("blonde", "blond"), "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"), "tan": ("tan", "tanned"),
}  # fmt: skip
"""Colour -> words for it, repeated in proportion to their use."""

_WORDINGS: dict[Fact, tuple[tuple[str, str], ...]] = {
    ("style", "short"): (("with", "short hair"),),
    ("style", "long"): (("with", "long hair"),),
    ("style", "bob"): (("with", "a bob"), ("with", "a bob haircut")),
    ("style", "curly"): (("with", "curly hair"), ("with", "curly hair"), ("with", "curls")),
    ("style", "bald"): (
        *(6 * (("before", "bald"),)), ("with", "a bald head"), ("with", "no hair"), ("without", "hair"),
    ),
    ("beard?", "yes"): (
        *(3 * (("with", "a beard"),)), ("with", "a moustache"), ("with", "a mustache"), ("before", "bearded"),
    ),
    ("beard?", "no"): (
        *(2 * (("with", "no beard"), ("without", "a beard"), ("before", "clean-shaven"))),
        ("with", "no moustache"), ("without", "a moustache"), ("without", "a mustache"),
    ),
    ("glasses?", "yes"): (
        *(4 * (("with", "glasses"),)), ("with", "spectacles"), ("after", "wearing glasses"),
    ),
    ("glasses?", "no"): (
        *(3 * (("with", "no glasses"), ("without", "glasses"))), ("without", "spectacles"),
        ("after", "not wearing glasses"),
    ),
    ("smile", "yes"): (*(3 * (("before", "smiling"),)), *(2 * (("with", "a smile"),))),
    ("smile", "no"): (*(3 * (("after", "not smiling"),)), ("with", "no smile"), ("without", "a smile")),
}  # fmt: skip
"""Fact -> pairs (place in the sentence, words), repeated in proportion to their use."""

_OF_A_PERSON = ("blonde", "blond", "ginger")
"""Hair colours that can describe a person: "a blonde woman" has blonde hair, "a green woman" need not."""

_COUNTS = (0, *(16 * (1,)), *(7 * (2,)), *(4 * (3,)), *(2 * (4,)), 5, 6)
"""Numbers of claims in a caption, repeated in proportion to their frequency."""

SMILING, SERIOUS = 0.5, 0.3
"""A face smiles above the first number and does not smile below the second; in between it is undecided."""


def shape_facts(face: Face) -> tuple[set[Fact], set[Fact]]:
    """(true, known): the shape facts that are true of ``face``, and those whose truth is certain.

    A face with short or curly hair and no beard may be a man or a woman. Half a smile is undecided.
    """
    true = {("style", face.hair_style)}
    if face.has_beard or face.hair_style == "bald":
        true.add(("person", "man"))
    elif face.hair_style in ("long", "bob"):
        true.add(("person", "woman"))
    true |= {("beard?", "yes" if face.has_beard else "no"), ("glasses?", "yes" if face.has_glasses else "no")}
    if not SERIOUS <= face.smile <= SMILING:
        true.add(("smile", "yes" if face.smile > SMILING else "no"))
    keys = {key for key, _ in true}
    return true, {fact for fact in FACTS if fact[0] in keys and fact[0] not in PARTS}


def colour_facts(face: Face) -> set[Fact]:
    """The colours of all parts of ``face``, including parts that it does not have."""
    return {(part, getattr(face, part).name) for part in PARTS}


def facts_of(face: Face) -> set[Fact]:
    """All facts true of ``face`` that a caption can claim, without colours of parts that it does not have."""
    return shape_facts(face)[0] | {fact for fact in colour_facts(face) if face.has(fact[0])}


def fact_vector(facts: Collection[Fact]) -> np.ndarray:
    """``facts`` as a multi-hot vector, bool [len(FACTS)]."""
    return np.array([fact in facts for fact in FACTS])


def matches(true: Tensor, known: Tensor, claims: Tensor) -> tuple[Tensor, Tensor]:
    """Which captions are true of which faces, and which are false; the other pairs are unknown.

    Args:
        true, known: bool [N, F]: the facts that are true of face n, and the facts whose truth is known.
        claims: bool [M, F]: the facts that caption m claims.

    Returns two bool [N, M]: all claims are true of the face; at least one is known to be false.
    """
    claimed = claims.float().t()
    holds = (~true).float() @ claimed == 0
    return holds, (known & ~true).float() @ claimed > 0


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]  # ten times as fast as integers() and choice()


def phrase(part: str, colour: str, rng: np.random.Generator | None = None) -> str:
    """A coloured part in words: the plainest, "green lipstick", or with ``rng`` perhaps "green lips"."""
    if rng is None:
        return f"{colour} {_NOUNS[part][0]}"
    return f"{_pick(rng, _SAME.get(colour, (colour,)))} {_pick(rng, _NOUNS[part])}"


# ---- writing ----


def caption(facts: Collection[Fact], rng: np.random.Generator) -> tuple[str, set[Fact]]:
    """A caption that claims some of ``facts``, and the facts that it claims.

    It claims 0 to 6 facts, half of the time one, and sometimes also a hair style or "man" or "woman". It is
    bare ("green lips and no beard") or has a subject ("a smiling woman with long blue hair"). Most captions
    are put into a template of CLIP.
    """
    count = _pick(rng, _COUNTS)
    weighted = [
        (rng.random() * (1.0 if f[0] in PARTS else 0.7), f) for f in sorted(facts) if f[0] != "person"
    ]
    claims = [fact for _, fact in sorted(weighted, reverse=True)[:count]]  # in random order
    coloured, true = dict(claims).get("hair"), dict(facts)
    style = dict(claims).get("style")
    if coloured and style is None and rng.random() < 0.25:
        style = true.get("style")
        claims += [("style", style)] if style else []
    together = coloured and style  # "long blue hair"
    said: dict[str, list[str]] = {"before": [], "with": [], "without": [], "after": []}
    for key, value in claims:
        colour = _pick(rng, _SAME.get(value, (value,)))
        if key == "style" and together:
            continue
        if key == "hair" and together:
            said["with"].append(f"a {colour} bob" if style == "bob" else f"{style} {colour} hair")
        elif key == "hair" and colour in _OF_A_PERSON and rng.random() < 0.15:
            said["before"].append(colour)
        elif key in PARTS:
            article = "a " if key in ("beard", "shirt") and rng.random() < 0.7 else ""
            said["with"].append(article + phrase(key, value, rng))
        else:
            place, words = _pick(rng, _WORDINGS[key, value])
            said[place].append(words)
    said["before"].sort(key=lambda word: word in _OF_A_PERSON)  # "a smiling blonde woman"
    subject = "face" if rng.random() < 0.6 else "person"
    if "person" in true and rng.random() < 0.15:
        subject = true["person"]
        claims.append(("person", subject))
    bare = subject in ("face", "person") and not set(said["before"]) & set(_OF_A_PERSON)
    if any(said.values()) and bare and rng.random() < 0.4:
        text = ", ".join(filter(None, [" ".join(said["before"]), _listed(said["with"]), *_ends(said)]))
    else:
        text = " ".join([*said["before"], subject])
        text += f" with {_listed(said['with'])}" if said["with"] else ""
        text += "".join(f" {end}" for end in _ends(said))
        text = f"a {text}" if rng.random() < 0.3 else text
    if rng.random() < 0.7:
        text = _pick(rng, OPENAI_IMAGENET_TEMPLATES)(text)
    return text, set(claims)


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _ends(said: dict[str, list[str]]) -> list[str]:
    lack = ["without " + " and ".join(said["without"])] if said["without"] else []
    return lack + said["after"]


def vocabulary() -> list[str]:
    """Texts that together hold every word of every :func:`caption`."""
    parts = [word for part in PARTS for word in (*colours(part), *_NOUNS[part])]
    same = [word for words in _SAME.values() for word in words]
    said = [words for wordings in _WORDINGS.values() for _, words in wordings]
    templates = [template("a") for template in OPENAI_IMAGENET_TEMPLATES]
    return parts + same + said + templates + ["a face with a bob, and without", "person man woman"]


# ---- reading ----

_PART_OF = {noun: part for part, nouns in _NOUNS.items() for noun in nouns}
_COLOUR_OF = {name: name for name in COLOUR_NAMES} | {
    word: name for name, words in _SAME.items() for word in words
}
_SAID = {  # word -> the fact that it claims, and the fact that its denial claims
    "bald": (("style", "bald"), None), "bob": (("style", "bob"), None), "curls": (("style", "curly"), None),
    "bearded": (("beard?", "yes"), ("beard?", "no")), "beardless": (("beard?", "no"), None),
    "clean-shaven": (("beard?", "no"), None), "smiling": (("smile", "yes"), ("smile", "no")),
    "smile": (("smile", "yes"), ("smile", "no")), "man": (("person", "man"), None),
    "woman": (("person", "woman"), None),
}  # fmt: skip
_PEOPLE = ("face", "person", "man", "woman")


def claims_of(prompt: str) -> set[Fact]:
    """Every fact that ``prompt`` claims: colours, hair style, person, and what is present or absent.

    "a man with long grey hair and no glasses" -> ("person", "man"), ("style", "long"), ("hair", "grey"),
    ("glasses?", "no").
    """
    text = re.sub(r"\bclean shaven\b", "clean-shaven", prompt.lower())
    words = re.findall(r"[a-z]+(?:-[a-z]+)*|[^a-z\s]", text)
    claims: set[Fact] = set()
    for i, word in enumerate(words):
        start = i  # where the adjectives before the word start
        while start and (words[start - 1] in _COLOUR_OF or words[start - 1] in HAIR_STYLES):
            start -= 1
        adjectives = words[start:i]
        denied = _denied(words[:start])
        names = {_COLOUR_OF[one] for one in adjectives if one in _COLOUR_OF}
        part = "hair" if word in ("bob", "curls") else _PART_OF.get(word)
        if word in _PEOPLE:
            names, part = names & set(_OF_A_PERSON), "hair"
        if word in _SAID and (fact := _SAID[word][denied]):
            claims.add(fact)
        if part is None:
            continue
        if not denied:
            claims |= {(part, name) for name in names if name in colours(part)}
            if word == "hair":
                claims |= {("style", one) for one in adjectives if one in HAIR_STYLES}
        if part in ("beard", "glasses") and not (adjectives and denied) and not (names and not denied):
            claims.add((f"{part}?", "no" if denied else "yes"))
        if word == "hair" and denied and not adjectives:
            claims.add(("style", "bald"))
    return claims


def _denied(before: Sequence[str]) -> bool:
    """Whether the words ``before`` deny the word that follows them, as "no" and "without" do."""
    rest = list(before)
    while rest and rest[-1] in ("a", "an", "any", "wearing"):
        rest.pop()
    if rest and rest[-1] == "and" and len(rest) > 1 and "without" in rest:  # "without glasses and a beard"
        between = rest[len(rest) - rest[::-1].index("without") :]
        return all(word in ("a", "any", "and", "smile", "hair") or word in _PART_OF for word in between)
    return bool(rest) and rest[-1] in ("no", "not", "without")


def claim_of(prompt: str) -> tuple[str, str] | None:
    """The (part, colour) that a prompt asks for, e.g. "green lipstick" or "a man with a violet moustache".

    None if the prompt does not name the colour of exactly one part.
    """
    claims = [fact for fact in claims_of(prompt) if fact[0] in PARTS]
    return claims[0] if len(claims) == 1 else None
