"""The factors of a toon face: what varies, over which support, and which colours carry which name.

Every colour factor has a *natural* support (what the generator is trained on) and a *counterfactual* one (what only
CLIP, the identity network and the readout ever see). Background and shirt range over all hues in both.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
from scipy.special import ndtr
from skimage.color import rgb2lab

RGB = tuple[float, float, float]  # 0 … 255

_VIVID: dict[str, RGB] = {
    "red": (214, 36, 42), "orange": (247, 134, 24), "yellow": (247, 224, 40), "green": (38, 168, 62),
    "cyan": (32, 206, 214), "blue": (36, 74, 220), "purple": (138, 40, 182), "pink": (248, 112, 176),
    "white": (246, 246, 246), "black": (26, 24, 26),
}
_HAIR: dict[str, RGB] = {
    "black": (30, 26, 27), "brown": (98, 62, 36), "blonde": (224, 188, 112), "ginger": (186, 84, 34),
    "grey": (146, 146, 150),
}


def _vivid(*names: str) -> dict[str, RGB]:
    return {name: _VIVID[name] for name in names}


NATURAL: dict[str, dict[str, RGB]] = {
    "skin": {"pale": (250, 222, 200), "fair": (240, 198, 164), "tan": (212, 160, 118), "brown": (158, 106, 72),
             "dark": (104, 68, 46)},
    "hair": _HAIR,
    "eyebrows": _HAIR,
    "eyes": {"blue": (66, 128, 208), "brown": (108, 66, 34), "green": (84, 150, 84)},
    "lipstick": {"pink": (226, 128, 142), "red": (196, 44, 54), "rose": (176, 88, 100)},
    "beard": _HAIR,
}
"""part -> colour name -> RGB seen by the generator. Eyebrows and beard follow the hair in natural faces.

In an order in which what lies between two neighbours has a natural name too: a mapping network goes through it, as it is smooth.
"""

COUNTERFACTUAL: dict[str, dict[str, RGB]] = {
    "skin": _vivid("green", "blue", "purple", "yellow", "cyan", "red"),
    "hair": _vivid("green", "blue", "purple", "cyan", "pink", "red", "white"),
    "eyebrows": _vivid("green", "blue", "purple", "yellow", "orange", "cyan", "pink", "red", "white"),
    "eyes": _vivid("red", "purple", "yellow", "orange", "cyan", "pink"),
    "lipstick": _vivid("green", "blue", "purple", "yellow", "orange", "cyan", "white", "black"),
    "beard": _vivid("green", "blue", "purple", "cyan", "pink", "red", "white"),
}
"""part -> colour name -> RGB that the generator never sees."""

PARTS: tuple[str, ...] = tuple(NATURAL)
"""The parts whose colour a prompt can name."""

HELD_OUT: frozenset[tuple[str, str]] = frozenset({("skin", "cyan"), ("beard", "cyan")})
"""(part, colour) pairs that CLIP never sees in training: each word is known, the composition is not."""

HAIR_STYLES: tuple[str, ...] = ("short", "long", "bob", "curly", "bald")


def colours(part: str) -> dict[str, RGB]:
    """Every named colour of ``part``, natural ones first."""
    return NATURAL[part] | COUNTERFACTUAL[part]


@dataclass(frozen=True)
class Colour:
    """A named colour and the exact RGB (0 … 255) drawn for it."""

    name: str
    rgb: RGB


@dataclass(frozen=True)
class Face:
    """All factors of one face. Lengths are in half image widths: the picture is [-1, 1] x [-1, 1], y downwards."""

    # colours a prompt can name
    skin: Colour
    hair: Colour
    eyebrows: Colour
    eyes: Colour
    lipstick: Colour
    beard: Colour
    # free colours
    background: RGB
    shirt: RGB
    frame: RGB            # of the glasses
    # presence and style
    hair_style: str       # one of HAIR_STYLES
    has_beard: bool
    has_glasses: bool
    # geometry: what makes a person, together with the hair style
    face_width: float
    face_height: float
    jaw: float            # 0 pointed … 1 square
    eye_spacing: float
    eye_size: float
    eye_height: float
    nose_length: float
    nose_width: float
    brow_thickness: float
    brow_tilt: float
    mouth_width: float
    lip_fullness: float
    hairline: float
    parting: float
    # what changes from photo to photo
    smile: float          # -0.3 … 1
    shift: tuple[float, float]
    roll: float           # radians
    yaw: float            # -1 … 1, moves the features across the head
    zoom: float

    @property
    def has_hair(self) -> bool:
        return self.hair_style != "bald"

    def has(self, part: str) -> bool:
        """Whether ``part`` can be seen at all."""
        return {"hair": self.has_hair, "beard": self.has_beard}.get(part, True)

    def with_colour(self, part: str, name: str) -> "Face":
        """The true counterfactual: the same face, one colour changed to the named one."""
        return replace(self, **{part: Colour(name, colours(part)[name])})


UNIT = {"face_width": (0.47, 0.57), "face_height": (0.58, 0.68), "jaw": (0, 1), "eye_spacing": (0.205, 0.265), "eye_size": (0.85, 1.15),
         "eye_height": (-0.10, -0.02), "nose_length": (0.13, 0.22), "nose_width": (0.05, 0.10), "brow_thickness": (0.058, 0.092),
         "brow_tilt": (-0.035, 0.045), "mouth_width": (0.155, 0.235), "lip_fullness": (0.125, 0.185), "hairline": (-0.52, -0.40),
         "parting": (-0.3, 0.3), "smile": (-0.3, 1), "roll": (-0.12, 0.12), "yaw": (-1, 1), "zoom": (0.92, 1.06)}
"""Ranges of the uniform factors."""


def factor_vector(face: Face) -> np.ndarray:
    """All factors as numbers in about [-1, 1]: nine colours, styles and presence, geometry, pose. [54]."""
    colour = [c for part in PARTS for c in getattr(face, part).rgb] + [*face.background, *face.shirt, *face.frame]
    flags = [face.hair_style == style for style in HAIR_STYLES] + [face.has_beard, face.has_glasses]
    lengths = [(getattr(face, name) - low) / (high - low) for name, (low, high) in UNIT.items()]
    place = [face.shift[0] / 0.12 + 0.5, face.shift[1] / 0.1 + 0.5]
    return 2 * np.array([*np.asarray(colour) / 255, *flags, *lengths, *place], dtype=np.float32) - 1


IDENTITY_FACTORS: tuple[str, ...] = (
    "hair_style", "face_width", "face_height", "jaw", "eye_spacing", "eye_size", "eye_height",
    "nose_length", "nose_width", "brow_thickness", "brow_tilt", "mouth_width", "lip_fullness", "hairline", "parting",
)
"""What makes a person, and no colour is among it; everything else may differ between two pictures of them."""


def _jitter(rng: np.random.Generator, rgb: RGB, amount: float) -> RGB:
    light = 1 + amount * rng.uniform(-1, 1)
    tint = amount * 60 * rng.uniform(-1, 1, 3)
    r, g, b = np.clip(np.asarray(rgb) * light + tint, 0, 255)
    return (float(r), float(g), float(b))


def _pick(rng: np.random.Generator, table: dict[str, RGB], amount: float = 0.07) -> Colour:
    name = list(table)[rng.integers(len(table))]
    return Colour(name, _jitter(rng, table[name], amount))


def _any_hue(rng: np.random.Generator, saturation: tuple[float, float] = (0.15, 0.75)) -> RGB:
    h, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(0.45, 0.98)
    r, g, b = (255 * v * (1 - s * np.clip(1 - np.abs((h - k) % 6 - 3) + 1, 0, 1)) for k in (3, 5, 1))
    return (float(r), float(g), float(b))


def repainted(face: Face, like: Face) -> Face:
    """``face`` in every colour of ``like``."""
    return replace(face, **{name: getattr(like, name) for name in (*PARTS, "background", "shirt", "frame")})


def _lab(rgb: np.ndarray) -> np.ndarray:
    return rgb2lab(np.asarray(rgb) / 255)


@lru_cache
def _palette(part: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of all colours of ``part`` and their CIELAB."""
    return tuple(colours(part)), _lab(np.array(list(colours(part).values())))


def nearest_colour(part: str, rgb: RGB) -> str:
    """The named colour of ``part`` that is nearest to ``rgb`` in CIELAB."""
    names, palette = _palette(part)
    return names[np.linalg.norm(palette - _lab(np.array(rgb)), axis=1).argmin()]


def independent_colours(face: Face, rng: np.random.Generator, tint: float = 12.0) -> Face:
    """``face`` with a colour of its own for every part: still one that has a natural name there, but anywhere between two of them.

    Natural faces have few colours, and brows and beard follow the hair: whoever learns from them alone learns one colour for three parts,
    and no third dimension of any.
    """
    def draw(part: str) -> Colour:
        table = list(NATURAL[part].values())
        for _ in range(100):
            a, b = (np.asarray(table[rng.integers(len(table))]) for _ in range(2))
            mixed = a + rng.uniform() * (b - a)
            rgb = tuple(float(c) for c in np.clip(mixed * rng.uniform(0.85, 1.15) + rng.uniform(-tint, tint, 3), 0, 255))
            if (name := nearest_colour(part, rgb)) in NATURAL[part]:
                return Colour(name, rgb)
        raise RuntimeError(f"no natural colour of {part} in 100 draws: its palette leaves them no room")
    return replace(face, **{part: draw(part) for part in PARTS})


class LatentDraws:
    """Feeds :func:`sample_face` from a latent code z [D] instead of a random stream: draw k is the normal CDF of z_k."""

    def __init__(self, z: np.ndarray):
        self._u = iter(np.clip(ndtr(z), 1e-6, 1 - 1e-6))

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | None = None):
        """As numpy's."""
        u = next(self._u) if size is None else np.array([next(self._u) for _ in range(size)])
        return low + (high - low) * u

    def integers(self, n: int) -> int:
        """As numpy's."""
        return int(next(self._u) * n)

    def choice(self, n: int, p) -> int:
        """As numpy's."""
        return int(np.searchsorted(np.cumsum(p), next(self._u)).clip(0, n - 1))


def sample_face(seed: int | tuple[int, ...] | LatentDraws, support: str = "natural") -> Face:
    """A face, the same one for the same ``seed``.

    ``support``: "natural" (the generator's), or "both" (every colour factor is counterfactual with probability ½,
    and eyebrows and beard no longer follow the hair).
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
            odd, independent = _pick(rng, COUNTERFACTUAL[part]), _pick(rng, NATURAL[part])
            draw = rng.uniform()
            if draw < 0.5:
                colour[part] = odd
            elif draw < 0.75:
                colour[part] = independent
    # "both" must cover what an edit may do to a background, or CLIP takes a vivid one for hair
    saturation = (0.15, 0.75) if support == "natural" else (0.0, 1.0)
    style = HAIR_STYLES[rng.choice(5, p=(0.26, 0.24, 0.18, 0.18, 0.14))]
    u = rng.uniform
    return Face(
        **colour, background=_any_hue(rng, saturation), shirt=_any_hue(rng, saturation), frame=_jitter(rng, (40, 34, 36), 0.15),
        hair_style=style, has_beard=bool(u() < (0.12 if style in ("long", "bob") else 0.4)),
        has_glasses=bool(u() < 0.25),
        shift=(u(-0.06, 0.06), u(-0.05, 0.05)), **{name: u(low, high) for name, (low, high) in UNIT.items()},
    )


def new_photo(face: Face, seed: int | tuple[int, ...], support: str = "both") -> Face:
    """Another picture of the same person: identity factors kept, everything else drawn afresh from ``support``."""
    other = sample_face(seed, support)
    kept = {name: getattr(face, name) for name in IDENTITY_FACTORS}
    return replace(other, **kept)


assert set(IDENTITY_FACTORS) < {f.name for f in fields(Face)}

FACTORS: int = factor_vector(sample_face(0)).size
"""Length of :func:`factor_vector`."""

LATENT_DRAWS = 71
"""How many numbers of z a natural face takes (see :class:`LatentDraws`)."""
