"""What a prompt can do here, and why an edit did nothing: sentences for the panel. Pure functions."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from cfclip.domain import Domain, null_edit
from cfclip.explorer.frames import MISSING, Frame
from cfclip.explorer.recipe import Recipe

WORKS = 0.5
"""The share of faces on which a prompt has to succeed to be suggested."""


def unclear(domain: Domain, recipe: Recipe, working: Collection[str]) -> str:
    """Warnings of unknown words, with similar prompts that work, and of null edits; "" if there are none."""
    source = recipe.source_text.strip() or domain.source_text
    clip = domain.clip
    found = [words for one in [*recipe.prompts, source] if (words := clip.describe_unknown(one))]
    if found:
        known = [prompt for prompt in working if not clip.unknown_words(prompt)]
        if near := get_close_matches(recipe.prompt, known) or known[:3]:
            found.append(f"prompts that work: {', '.join(near)}")
    found += [words for one in recipe.prompts if (words := null_edit(one, source))]
    return "; ".join(found)


def outcome(domain: Domain, frame: Frame) -> str:
    """What a measured edit did to the faces, in one line; "" before it is measured."""
    if not frame.notes:
        return ""
    prompt, truth = " and ".join(frame.recipe.prompts), domain.truth
    claim, claims = (truth.claim(prompt), truth.claims(prompt)) if truth else (None, ())
    faces, still = len(frame.notes), frame.notes.count("not changed")
    if claims and not (claim and len(claims) == 1):
        asked = [note for note in frame.notes if note != "so before"]
        if not asked:
            return "these faces showed that before: draw new faces"
        lost = [note.removeprefix(MISSING).split(", ") for note in asked if note.startswith(MISSING)]
        counts = ((name, len(asked) - sum(name in names for names in lost)) for name in claims)
        return ", ".join(f"{name} on {count} of {len(asked)} faces" for name, count in counts)
    if not claim:
        what = f"{still} of {faces} faces did not change" if still else ""
        unknown = "success is not measured: that needs a prompt that names a part's colour, or a shape"
        return "; ".join(filter(None, [what, unknown if truth else ""]))
    part, colour = claim
    without = frame.notes.count(f"no {part}")
    tip = f'try "{part} and {prompt}"' if len(truth.claims(f"{part} and {prompt}")) > 1 else ""
    if without == faces:
        return f"no face here has {part}: {' or '.join(filter(None, ['draw new faces', tip]))}"
    done = frame.notes.count("✓") + frame.notes.count(f"{colour} before")
    of = f"{faces - without} faces that have {part}" if without else f"{faces} faces"
    others = ": ".join(filter(None, [f"; {without} have none", tip])) if without else ""
    return f"{colour} {part} on {done} of {of}{others}"


def prospects(known: Iterable[float | None], frame: Frame, seconds: float) -> str:
    """What to expect of other faces, and what would help; "" if the edit works.

    known: the share of other faces on which each prompt succeeds; seconds: the most that Refine takes.
    """
    least = min((share for share in known if share is not None), default=1.0)
    here = frame.scores.get("success_after", 1.0)
    expected = f"this prompt changes about {least:.0%} of faces" if least < WORKS else ""
    helps = f"Refine takes {in_words(seconds)} at most" if min(least, here) < WORKS else ""
    return ", ".join(filter(None, [expected, helps]))


def in_words(seconds: float) -> str:
    """A duration, as precise as an estimate is."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {round(seconds / 3600)} hours"
