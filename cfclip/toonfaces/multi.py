"""The prompts of toonfaces' mapper for many, and those that it never sees."""

from .captions import phrase
from .factors import PARTS, colours

UNSEEN: dict[str, tuple[str, ...]] = {
    "skin": ("cyan", "purple"),
    "hair": ("blue", "pink", "blonde"),
    "eyebrows": ("purple", "orange", "cyan"),
    "eyes": ("purple", "yellow"),
    "lipstick": ("blue", "black", "red"),
    "beard": ("cyan", "blue", "white"),
}
"""part -> colours that no training prompt gives it: nearly all counterfactual, the pairs held out from CLIP among them."""


def split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(seen, unseen) prompts: every colour of every part, as "green lipstick". Every colour and every part is among the seen ones."""
    texts = {(part, colour): phrase(part, colour) for part in PARTS for colour in colours(part)}
    seen, unseen = (tuple(text for (part, colour), text in texts.items() if (colour in UNSEEN[part]) == held) for held in (False, True))
    return seen, unseen
