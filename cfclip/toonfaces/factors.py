"""The factors of a toon face: what varies, in which range, and the names of the colours.

Every colour factor has a *natural* support, on which the generator is trained, and a *counterfactual* one,
which only CLIP, the identity network and the readout see in training. In both supports a shirt has any of the
named colours, and a background has any hue.
"""

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr
from skimage.color import rgb2lab

RGB = tuple[float, float, float]  # 0 … 255

_VIVID: dict[str, RGB] = {
    "red": (214, 36, 42), "orange": (247, 134, 24), "yellow": (247, 224, 40), "green": (38, 168, 62),
    "cyan": (32, 206, 214), "blue": (36, 74, 220), "purple": (138, 40, 182), "pink": (248, 112, 176),
    "white": (246, 246, 246), "black": (26, 24, 26), "brown": (108, 66, 34), "grey": (146, 146, 150),
}  # fmt: skip
_HAIR: dict[str, RGB] = {
    "black": (30, 26, 27), "brown": (98, 62, 36), "ginger": (186, 84, 34), "blonde": (224, 188, 112),
    "grey": (146, 146, 150),
}  # fmt: skip

NATURAL: dict[str, dict[str, RGB]] = {
    "skin": {
        "pale": (250, 222, 200), "fair": (240, 198, 164), "tan": (212, 160, 118), "brown": (158, 106, 72),
        "dark": (104, 68, 46),
    },
    "hair": _HAIR,
    "eyebrows": _HAIR,
    "eyes": {"blue": (66, 128, 208), "brown": (108, 66, 34), "green": (84, 150, 84)},
    "lipstick": {"pink": (226, 128, 142), "red": (196, 44, 54), "rose": (176, 88, 100)},
    "beard": _HAIR,
    "glasses": {"black": (40, 34, 36), "brown": (108, 66, 34), "grey": (146, 146, 150)},
    "shirt": _VIVID,
}  # fmt: skip
"""part -> colour name -> RGB that the generator is trained on. Natural brows and beards follow the hair.

The order matters: a mixture of two neighbours also has a natural name. A mapping network is smooth, so it
passes through such mixtures.
"""

COUNTERFACTUAL: dict[str, dict[str, RGB]] = {
    part: {name: rgb for name, rgb in _VIVID.items() if name not in natural}
    for part, natural in NATURAL.items()
}
"""part -> colour name -> RGB that the generator never sees. A shirt has none: all its colours are natural."""

PARTS: tuple[str, ...] = tuple(NATURAL)
"""The parts whose colour a prompt can name."""

HELD_OUT: frozenset[tuple[str, str]] = frozenset({
    ("skin", "purple"), ("hair", "cyan"), ("eyebrows", "yellow"), ("eyes", "orange"), ("lipstick", "cyan"),
    ("beard", "pink"), ("glasses", "green"),
})  # fmt: skip
"""(part, colour) pairs that CLIP never sees in training: it knows both words, but not their combination."""

HAIR_STYLES: tuple[str, ...] = ("short", "long", "bob", "curly", "bald")


def colours(part: str) -> dict[str, RGB]:
    """Every named colour of ``part``, natural ones first."""
    return NATURAL[part] | COUNTERFACTUAL[part]


@dataclass(frozen=True)
class Colour:
    """A named colour and the exact RGB (0 … 255) drawn for it."""

    name: str
    rgb: RGB


def _person(*limits: float) -> Any:
    """A number that all pictures of a person share, drawn uniformly between its ``limits``."""
    return field(metadata={"limits": limits, "person": True})


def _pose(*limits: float) -> Any:
    """A number that differs from picture to picture, drawn uniformly between its ``limits``."""
    return field(metadata={"limits": limits})


@dataclass(frozen=True)
class Face:
    """All factors of one face. Coordinates: the picture is [-1, 1] x [-1, 1], y downwards."""

    # colours that a prompt can name
    skin: Colour
    hair: Colour
    eyebrows: Colour
    eyes: Colour
    lipstick: Colour
    beard: Colour
    glasses: Colour  # the frame
    shirt: Colour
    # a free colour
    background: RGB
    # presence and style
    hair_style: str  # one of HAIR_STYLES
    has_beard: bool
    has_glasses: bool
    # geometry
    face_width: float = _person(0.47, 0.57)
    face_height: float = _person(0.58, 0.68)
    jaw: float = _person(0, 1)  # 0: pointed, 1: square
    eye_spacing: float = _person(0.205, 0.265)
    eye_size: float = _person(0.85, 1.15)
    eye_height: float = _person(-0.10, -0.02)
    nose_length: float = _person(0.13, 0.22)
    nose_width: float = _person(0.05, 0.10)
    brow_thickness: float = _person(0.058, 0.092)
    brow_tilt: float = _person(-0.035, 0.045)
    mouth_width: float = _person(0.155, 0.235)
    lip_fullness: float = _person(0.125, 0.185)
    hairline: float = _person(-0.48, -0.38)
    parting: float = _person(-0.3, 0.3)
    # what changes from photo to photo
    smile: float = _pose(-0.3, 1)
    shift: tuple[float, float]
    roll: float = _pose(-0.12, 0.12)  # radians
    yaw: float = _pose(-1, 1)  # moves the features across the head
    zoom: float = _pose(0.92, 1.06)

    def has(self, part: str) -> bool:
        """Whether the face has ``part``; hair, beard and glasses can be absent."""
        flags = {"hair": self.hair_style != "bald", "beard": self.has_beard, "glasses": self.has_glasses}
        return flags.get(part, True)

    def with_colour(self, part: str, name: str) -> "Face":
        """The true counterfactual: the same face with the colour ``name`` on ``part``."""
        return replace(self, **{part: Colour(name, colours(part)[name])})

    def in_the_colours_of(self, other: "Face") -> "Face":
        """This face in every colour of ``other``."""
        return replace(self, **{name: getattr(other, name) for name in COLOURED})

    def of_person(self, other: "Face") -> "Face":
        """This picture with the person of ``other`` on it: their :data:`IDENTITY_FACTORS`."""
        return replace(self, **{name: getattr(other, name) for name in IDENTITY_FACTORS})


_LIMITS = {one.name: one.metadata["limits"] for one in fields(Face) if "limits" in one.metadata}

COLOURED: tuple[str, ...] = (*PARTS, "background")
"""Everything with a separate colour, in the order of :func:`colour_array`."""

GEOMETRY: tuple[str, ...] = tuple(one.name for one in fields(Face) if one.metadata.get("person"))
"""The numbers that all pictures of a person share."""

IDENTITY_FACTORS: tuple[str, ...] = ("hair_style", *GEOMETRY)
"""The factors that all pictures of a person share. All other factors, such as colours, may differ."""


def colour_array(face: Face) -> np.ndarray:
    """RGB (0 … 255) of each of :data:`COLOURED`. float32 [9, 3]."""
    return np.array([*(getattr(face, part).rgb for part in PARTS), face.background], dtype=np.float32)


def shape_vector(face: Face) -> np.ndarray:
    """All factors except colours, in about [-1, 1]: styles and presence, geometry, pose. float32 [27]."""
    flags = [face.hair_style == style for style in HAIR_STYLES] + [face.has_beard, face.has_glasses]
    lengths = [(getattr(face, name) - low) / (high - low) for name, (low, high) in _LIMITS.items()]
    place = [face.shift[0] / 0.12 + 0.5, face.shift[1] / 0.1 + 0.5]
    return 2 * np.array([*flags, *lengths, *place], dtype=np.float32) - 1


def geometry(face: Face) -> list[float]:
    """The values of :data:`GEOMETRY`, scaled to [-1, 1]."""
    limits = [_LIMITS[name] for name in GEOMETRY]
    pairs = zip(GEOMETRY, limits, strict=True)
    return [2 * (getattr(face, name) - low) / (high - low) - 1 for name, (low, high) in pairs]


def _jitter(rng: np.random.Generator, rgb: RGB, amount: float) -> RGB:
    light = 1 + amount * rng.uniform(-1, 1)
    tint = amount * 60 * rng.uniform(-1, 1, 3)
    r, g, b = np.clip(np.asarray(rgb) * light + tint, 0, 255)
    return (float(r), float(g), float(b))


def _pick(rng: np.random.Generator, table: dict[str, RGB]) -> Colour:
    name = list(table)[rng.integers(len(table))]
    return Colour(name, _jitter(rng, table[name], 0.07))


def _any_hue(rng: np.random.Generator, saturation: tuple[float, float]) -> RGB:
    h, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(0.45, 0.98)
    r, g, b = (255 * v * (1 - s * np.clip(1 - np.abs((h - k) % 6 - 3) + 1, 0, 1)) for k in (3, 5, 1))
    return (float(r), float(g), float(b))


def to_lab(rgb: ArrayLike) -> np.ndarray:
    """sRGB 0 … 255 [..., 3] -> CIELAB (D65) [..., 3]."""
    return rgb2lab(np.asarray(rgb) / 255)


@lru_cache
def lab_palette(part: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of all colours of ``part`` and their CIELAB."""
    return tuple(colours(part)), to_lab(list(colours(part).values()))


def nearest_colour(part: str, rgb: RGB) -> str:
    """The named colour of ``part`` that is nearest to ``rgb`` in CIELAB."""
    names, palette = lab_palette(part)
    return names[np.linalg.norm(palette - to_lab(rgb), axis=1).argmin()]


def independent_colours(face: Face, rng: np.random.Generator) -> Face:
    """``face`` with an independent natural colour for every part: a mixture of two named ones.

    Natural faces have few colours, and brows and beard follow the hair. A network that learns from natural
    faces alone learns one colour for three parts.
    """

    def draw(part: str) -> Colour:
        table = list(NATURAL[part].values())
        for _ in range(100):
            a, b = (np.asarray(table[rng.integers(len(table))]) for _ in range(2))
            mixed = (a + rng.uniform() * (b - a)) * rng.uniform(0.85, 1.15) + rng.uniform(-12, 12, 3)
            rgb = tuple(float(c) for c in np.clip(mixed, 0, 255))
            if (name := nearest_colour(part, rgb)) in NATURAL[part]:
                return Colour(name, rgb)
        raise RuntimeError(f"no natural colour of {part} in 100 draws: its palette leaves them no room")

    return replace(face, **{part: draw(part) for part in PARTS})


class LatentDraws:
    """Replaces numpy's generator in :func:`sample_face` by a code z [D]: draw k is the normal CDF of z_k."""

    def __init__(self, z: np.ndarray):
        self._u = iter(np.clip(ndtr(z), 1e-6, 1 - 1e-6))

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | None = None):
        u = next(self._u) if size is None else np.array([next(self._u) for _ in range(size)])
        return low + (high - low) * u

    def integers(self, n: int) -> int:
        return int(next(self._u) * n)

    def choice(self, n: int, p) -> int:
        return int(np.searchsorted(np.cumsum(p), next(self._u)).clip(0, n - 1))


def sample_face(seed: int | tuple[int, ...] | LatentDraws, support: str = "natural") -> Face:
    """A face; the same one for the same ``seed``.

    support: "natural", on which the generator is trained, or "both": the colour of each part is replaced by a
        counterfactual one with probability ½ (for a shirt by any), and by an independent natural one
        with probability ¼: eyebrows and beard seldom follow the hair. Raises ValueError for any other.
    """
    if support not in ("natural", "both"):
        raise ValueError(f"support must be 'natural' or 'both', not {support!r}")
    rng = seed if isinstance(seed, LatentDraws) else np.random.default_rng(seed)
    colour = {part: _pick(rng, NATURAL[part]) for part in PARTS}
    darker = tuple(0.82 * c for c in colour["hair"].rgb)
    colour["eyebrows"] = Colour(colour["hair"].name, _jitter(rng, darker, 0.03))
    colour["beard"] = Colour(colour["hair"].name, _jitter(rng, colour["hair"].rgb, 0.03))
    if support == "both":
        for part in PARTS:
            odd = _pick(rng, COUNTERFACTUAL[part] or NATURAL[part])
            independent = _pick(rng, NATURAL[part])
            draw = rng.uniform()
            if draw < 0.5:
                colour[part] = odd
            elif draw < 0.75:
                colour[part] = independent
    # edits may make a background vivid: a CLIP that has not seen vivid ones takes them for hair
    saturation = (0.15, 0.75) if support == "natural" else (0.0, 1.0)
    style = HAIR_STYLES[rng.choice(5, p=(0.26, 0.24, 0.18, 0.18, 0.14))]
    u = rng.uniform
    return Face(
        **colour,
        background=_any_hue(rng, saturation),
        hair_style=style,
        has_beard=bool(u() < (0.12 if style in ("long", "bob") else 0.4)),
        has_glasses=bool(u() < 0.25),
        shift=(u(-0.06, 0.06), u(-0.05, 0.05)),
        **{name: u(low, high) for name, (low, high) in _LIMITS.items()},
    )


LATENT_DRAWS = 74
"""How many numbers of z a natural face needs, see :class:`LatentDraws`."""
