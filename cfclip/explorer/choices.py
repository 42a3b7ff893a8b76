"""Which editor edits by a prompt, and which prompts work. Pure functions.

``trained``: the editors that :func:`find` found in the explorer's folders.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cfclip.baselines.library import Trained, committed, plain, preferred, scan
from cfclip.domain import Domain
from cfclip.evaluation.confidence import predicted_success
from cfclip.explorer.advice import WORKS
from cfclip.explorer.recipe import any_text


def find(folders: Iterable[Path], domain: str) -> list[Trained]:
    """The editors in the folders that were trained in ``domain``."""
    found = scan(*folders, skip_damaged=True)
    return [one for one in found if one.domain == domain and any_text(one.prompt) is None]


def place(one: Trained) -> str:
    """The value of a recipe's ``mapper`` for this editor: a mapper's file, or another editor's folder."""
    return str(one.path if one.kind == "mapper" else one.path.parent)


def editor_for(domain: Domain, trained: Iterable[Trained], prompt: str) -> str | None:
    """The :func:`place` of an editor for this prompt; otherwise "" if the domain has a mapper, else None."""
    own = domain.mapper is not None or plain(prompt) in committed(domain)
    found = preferred(prompt, [one for one in trained if one.kind == "mapper" or not own])
    return place(found) if found else "" if own else None


def editors_for(domain: Domain, trained: Iterable[Trained], prompts: Sequence[str]) -> str | tuple[str, ...]:
    """The value of a recipe's ``mapper`` that edits by each of these single prompts with its own editor."""
    each = [editor_for(domain, trained, prompt) or "" for prompt in prompts]
    if len(each) > 1:  # the folder of an editor edits by one prompt only
        each = ["" if Path(path).is_dir() else path for path in each]
    return each[0] if len(set(each)) == 1 else tuple(each) if each else ""


def success_of(domain: Domain, trained: Iterable[Trained], prompt: str) -> float | None:
    """The share of faces on which ``prompt`` succeeds here, measured or predicted; None if it is unknown."""
    if path := editor_for(domain, trained, prompt):
        return next((one.success for one in trained if place(one) == path), None)
    if own := committed(domain).get(plain(prompt)):
        return own.success
    return predicted_success(domain, prompt)


def working(domain: Domain, trained: Sequence[Trained]) -> dict[str, float | None]:
    """Prompts that work -> the share of faces on which they do, None if unknown. Examples come first."""
    known = (*domain.prompts, *sorted(committed(domain)), *(one.prompt for one in trained))
    sure = dict.fromkeys(prompt for prompt in known if editor_for(domain, trained, prompt) is not None)
    claims = domain.truth.prompts if domain.truth else ()
    success = {prompt: success_of(domain, trained, prompt) for prompt in (*sure, *claims)}
    return {p: share for p, share in success.items() if (p in sure if share is None else share >= WORKS)}
