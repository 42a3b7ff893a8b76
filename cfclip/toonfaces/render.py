"""Draws a :class:`~cfclip.toonfaces.factors.Face`.

A *label map* is painted at four times the resolution. Colours are looked up in a palette and masks are
one-hot lookups of the same map; both are averaged down. So the picture is antialiased, the masks are exact
coverages that sum to one, and a face in which one colour changed has exactly the edges of the original.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from cfclip.images import to_tensor
from cfclip.toonfaces.factors import COLOURED, Face, colour_array

SUPERSAMPLE = 4

LABELS: dict[str, str] = {
    "background": "background", "shirt": "shirt", "shirt_shade": "shirt", "skin": "skin",
    "skin_shade": "skin", "blush": "skin", "hair": "hair", "hair_shade": "hair", "eyebrows": "eyebrows",
    "eye_white": "eye_white", "eyes": "eyes", "pupil": "pupil", "lipstick": "lipstick", "mouth_line": "mouth",
    "teeth": "mouth", "beard": "beard", "glasses": "glasses",
}  # fmt: skip
"""Label -> the part it belongs to; a label's position is its index."""

MASKS: tuple[str, ...] = tuple(dict.fromkeys(LABELS.values()))
"""The parts that have a mask, in channel order."""

ERASABLE: dict[str, tuple[str, ...]] = {
    "eyebrows": ("eyebrows",),
    "eyes": ("eye_white", "eyes", "pupil"),
    "lipstick": ("lipstick", "mouth_line", "teeth"),
}
"""Parts that every face has but an edit may remove -> their labels."""

_INDEX = {name: i for i, name in enumerate(LABELS)}
_PART_OF_LABEL = np.array([MASKS.index(part) for part in LABELS.values()])
_CIRCLE = np.linspace(0, 2 * np.pi, 33)[:-1]


@dataclass(frozen=True)
class Rendering:
    """``image`` uint8 [R, R, 3]; ``masks`` float32 [len(MASKS), R, R], coverage in [0, 1], summing to 1."""

    image: np.ndarray
    masks: np.ndarray

    def area(self, part: str) -> float:
        """Visible area of ``part`` in pixels of a 64 x 64 picture."""
        return float(self.masks[MASKS.index(part)].mean() * 64 * 64)


def _ellipse(cx, cy, rx, ry, power: float = 2.0) -> np.ndarray:
    c, s = np.cos(_CIRCLE), np.sin(_CIRCLE)
    e = 2 / power
    return np.stack([cx + rx * np.sign(c) * np.abs(c) ** e, cy + ry * np.sign(s) * np.abs(s) ** e], 1)


def _mirrored(half: list[tuple[float, float]], x: float = 0.0) -> list[tuple[float, float]]:
    """A polygon symmetric about the vertical line at ``x``; ``half``: one side, relative to the line."""
    return [(x + dx, y) for dx, y in half] + [(x - dx, y) for dx, y in reversed(half)]


def _band(x: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The polygon between two curves."""
    return np.concatenate([np.stack([x, upper], 1), np.stack([x, lower], 1)[::-1]])


class _Canvas:
    def __init__(self, face: Face, resolution: int):
        self.size = resolution * SUPERSAMPLE
        self.image = Image.new("L", (self.size, self.size), 0)
        self.pen = ImageDraw.Draw(self.image)
        c, s = np.cos(face.roll) * face.zoom, np.sin(face.roll) * face.zoom
        self.rotation, self.shift = np.array([[c, s], [-s, c]]), np.asarray(face.shift)

    def _pixels(self, points: np.ndarray) -> list[tuple[float, float]]:
        xy = (points @ self.rotation + self.shift + 1) * (self.size / 2)
        return [tuple(p) for p in xy.tolist()]

    def fill(self, label: str, points: np.ndarray) -> None:
        self.pen.polygon(self._pixels(np.asarray(points)), fill=_INDEX[label])

    def line(self, label: str, points: np.ndarray, width: float) -> None:
        pixels, thick = self._pixels(np.asarray(points)), max(1, round(width * self.size / 2))
        self.pen.line(pixels, fill=_INDEX[label], width=thick, joint="curve")


def _head(face: Face, grow: float = 1.0, n: int = 48) -> np.ndarray:
    """Outline of the head [n, 2], clockwise from the right ear; its jaw is between pointed and square."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    c, s = np.cos(t), np.sin(t)
    x, y = face.face_width * grow * c, face.face_height * grow * s
    below = np.clip(s, 0, 1)
    jaw = 0.1 * face.jaw * np.sin(2 * np.clip(t, 0, np.pi)) * np.sign(c) * below
    x = x * (1 + below * (0.22 * face.jaw - 0.16) + jaw)
    return np.stack([x, y + 0.06], 1)


_BACK_HAIR = {  # left outline, x in face widths
    "long": [(-1.12, -0.2), (-1.32, 0.5), (-1.25, 1.3)],
    "bob": [(-1.15, -0.2), (-1.34, 0.42), (-0.7, 0.56)],
}


def _hair_back(canvas: _Canvas, face: Face) -> None:
    w, h = face.face_width, face.face_height
    if outline := _BACK_HAIR.get(face.hair_style):
        canvas.fill("hair_shade", _mirrored([(w * x, y) for x, y in outline]))
        canvas.fill("hair_shade", _ellipse(0, -0.12, w * 1.2, h * 0.98))
    elif face.hair_style == "curly":
        for a in np.linspace(np.pi * 0.93, np.pi * 2.07, 13):
            canvas.fill("hair_shade", _ellipse(w * 1.08 * np.cos(a), -0.1 + h * 0.96 * np.sin(a), 0.2, 0.2))


def _hair_front(canvas: _Canvas, face: Face) -> None:
    w, h, line = face.face_width, face.face_height, face.hairline
    if face.hair_style == "bald":
        return
    grow = {"short": 1.14, "curly": 1.08}.get(face.hair_style, 1.12)
    drop = {"short": -0.12, "curly": -0.16, "bob": 0.18, "long": 0.3}[face.hair_style]
    outer = _head(face, grow)
    outer = outer[outer[:, 1] < -0.02]
    outer = outer[np.argsort(outer[:, 0])]  # from the left ear over the crown to the right ear
    part = face.parting * w
    right = [(w, drop), (w * 0.90, drop - 0.12), (w * 0.74, line + 0.06)]
    middle = [(part + 0.16, line - 0.05), (part, line - 0.1), (part - 0.2, line)]
    left = [(-w * 0.76, line + 0.08), (-w * 0.90, drop - 0.12), (-w, drop)]
    crown = [[(-w * grow, drop)], outer, [(w * grow, drop)]]
    canvas.fill("hair", np.concatenate([*crown, right, middle, left]))
    if face.hair_style == "curly":
        for a in np.linspace(np.pi * 1.04, np.pi * 1.96, 9):
            canvas.fill("hair", _ellipse(w * 0.95 * np.cos(a), -0.08 + h * 0.9 * np.sin(a), 0.15, 0.14))


def _mouth(canvas: _Canvas, face: Face, x: float) -> None:
    w, full, smile = face.mouth_width * (1 + 0.12 * face.smile), face.lip_fullness, face.smile
    t = np.linspace(-1, 1, 15)
    y0 = 0.40 - 0.055 * smile * t**2 + 0.01  # the line between the lips
    opening = 0.05 * max(0.0, smile - 0.35) * (1 - t**2)
    bow = 1 - t**2 + 0.22 * np.exp(-(((np.abs(t) - 0.33) / 0.2) ** 2)) - 0.12 * np.exp(-((t / 0.15) ** 2))
    upper, lower = y0 - 0.46 * full * bow - opening, y0 + 0.6 * full * (1 - t**4) + opening
    canvas.fill("lipstick", _band(x + w * t, upper, lower))
    if smile > 0.45:
        canvas.fill("teeth", _band(x + 0.8 * w * t, y0 - opening, y0 + opening))
    else:
        canvas.line("mouth_line", np.stack([x + 0.9 * w * t, y0], 1), 0.018)


def _beard(canvas: _Canvas, face: Face, x: float) -> None:
    jaw = _head(face, 1.0, 96)
    jaw = jaw[jaw[:, 1] > 0.16]
    jaw = jaw[np.argsort(-jaw[:, 0])]  # from the right cheek under the chin to the left
    w = face.mouth_width
    left = [(-face.face_width * 0.78, 0.22), (x - w - 0.12, 0.31), (x - 0.07, 0.255)]
    right = [(x + 0.07, 0.255), (x + w + 0.12, 0.31), (face.face_width * 0.78, 0.22)]
    canvas.fill("beard", np.concatenate([jaw, left, right]))


def _eye(canvas: _Canvas, face: Face, side: int, x: float) -> None:
    cx, cy, k = side * face.eye_spacing + x, face.eye_height, face.eye_size
    rx, ry = 0.148 * k, 0.116 * k
    canvas.fill("eye_white", _ellipse(cx, cy, rx, ry, 2.2))
    canvas.fill("eyes", _ellipse(cx + 0.3 * x, cy + 0.004, 0.102 * k, 0.104 * k))
    canvas.fill("pupil", _ellipse(cx + 0.3 * x, cy + 0.004, 0.036 * k, 0.038 * k))
    lid = _ellipse(cx, cy, rx, ry, 2.2)[16:]
    canvas.line("pupil", np.concatenate([lid, [(cx + rx, cy)]]), 0.022)
    t = np.linspace(-1, 1, 9)
    arch = cy - ry - 0.105 - 0.045 * (1 - t**2) - side * t * face.brow_tilt
    half = 0.5 * face.brow_thickness * (1 - 0.45 * np.clip(side * t, 0, 1) ** 2)
    canvas.fill("eyebrows", _band(cx + 0.165 * k * t, arch - half, arch + half))


def _glasses(canvas: _Canvas, face: Face, x: float) -> None:
    spacing, y = face.eye_spacing, face.eye_height
    for side in (-1, 1):
        ring = _ellipse(side * spacing + x, y, 0.19, 0.158, 3)
        canvas.line("glasses", np.concatenate([ring, ring[:2]]), 0.03)
        temple = [(side * (spacing + 0.185) + x, y - 0.03), (side * face.face_width * 0.99, y - 0.06)]
        canvas.line("glasses", temple, 0.03)
    canvas.line("glasses", [(-spacing + 0.18 + x, y - 0.02), (spacing - 0.18 + x, y - 0.02)], 0.03)


PAINT: dict[str, tuple[str, float | tuple[float, float, float]] | tuple[int, int, int]] = {
    "background": ("background", 1.0), "shirt": ("shirt", 1.0), "shirt_shade": ("shirt", 0.82),
    "skin": ("skin", 1.0), "skin_shade": ("skin", 0.86), "blush": ("skin", (1.0, 0.91, 0.90)),
    "hair": ("hair", 1.0), "hair_shade": ("hair", 0.85), "eyebrows": ("eyebrows", 1.0),
    "eye_white": (250, 250, 250), "eyes": ("eyes", 1.0), "pupil": (20, 16, 18),
    "lipstick": ("lipstick", 1.0), "mouth_line": ("lipstick", 0.55), "teeth": (252, 252, 250),
    "beard": ("beard", 1.0), "glasses": ("glasses", 1.0),
}  # fmt: skip
"""Label -> one of COLOURED whose colour it takes, and a factor for R, G and B; or a fixed RGB colour."""


def palettes(colours: np.ndarray) -> np.ndarray:
    """RGB of every label, as drawn. colours [N, 9, 3], see ``colour_array`` -> whole numbers [N, 17, 3]."""
    table = np.empty((len(colours), len(LABELS), 3), np.float32)
    for i, label in enumerate(LABELS):
        paint = PAINT[label]
        if isinstance(paint[0], str):
            table[:, i] = colours[:, COLOURED.index(paint[0])] * paint[1]
        else:
            table[:, i] = paint
    return np.rint(table.clip(0, 255))


def _label_map(face: Face, resolution: int) -> np.ndarray:
    canvas = _Canvas(face, resolution)
    w, x = face.face_width, 0.05 * face.yaw  # parallax of the features across the head
    _hair_back(canvas, face)
    canvas.fill("shirt", _ellipse(0, 1.22, 0.98, 0.48, 2.6))
    canvas.fill("skin_shade", [(-0.22, 0.5), (-0.24, 0.86), (0, 0.97), (0.24, 0.86), (0.22, 0.5)])
    canvas.line("shirt_shade", [(-0.25, 0.85), (0, 0.98), (0.25, 0.85)], 0.05)
    for side in (-1, 1):
        canvas.fill("skin", _ellipse(side * w * 1.0 - x, 0.06, 0.085, 0.125))
        canvas.fill("skin_shade", _ellipse(side * w * 1.02 - x, 0.06, 0.04, 0.07))
    canvas.fill("skin", _head(face))
    for side in (-1, 1):
        canvas.fill("blush", _ellipse(side * 0.29 + x, 0.21, 0.105, 0.065))
    if face.has_beard:
        _beard(canvas, face, x)
    n, top = face.nose_width, face.eye_height + 0.07
    tip = top + face.nose_length
    canvas.fill("skin_shade", _mirrored([(0.014, top), (n, tip - 0.02), (n * 0.5, tip + 0.012)], x))
    _mouth(canvas, face, x)
    _hair_front(canvas, face)
    for side in (-1, 1):
        _eye(canvas, face, side, x)
    if face.has_glasses:
        _glasses(canvas, face, x)
    return np.asarray(canvas.image)


def _colour(face: Face, labels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(labels)
    image.putpalette(palettes(colour_array(face)[None])[0].astype(np.uint8).tobytes())
    return np.asarray(image.convert("RGB").reduce(SUPERSAMPLE))


def render_image(face: Face, resolution: int = 64) -> np.ndarray:
    """Only the picture, uint8 [R, R, 3]; twice as fast as :func:`render`."""
    return _colour(face, _label_map(face, resolution))


def pictures(faces: Iterable[Face], resolution: int = 64) -> Tensor:
    """The :func:`render_image` of each face: [N, 3, R, R] in [-1, 1]."""
    return to_tensor([render_image(face, resolution) for face in faces])


def _erased(labels: np.ndarray, parts: Sequence[str]) -> np.ndarray:
    """The label map with skin in place of ``parts``."""
    if unknown := set(parts) - set(ERASABLE):
        raise ValueError(f"cannot leave out {', '.join(sorted(unknown))}: only {', '.join(ERASABLE)}")
    gone = [_INDEX[label] for part in parts for label in ERASABLE[part]]
    return np.where(np.isin(labels, gone), np.uint8(_INDEX["skin"]), labels)


def render(face: Face, resolution: int = 64, without: Sequence[str] = ()) -> Rendering:
    """The picture and its part masks, at any ``resolution``.

    Skin replaces the parts ``without``. Raises ValueError if one of them is not in :data:`ERASABLE`.
    """
    labels = _erased(_label_map(face, resolution), without)
    masks = _covered(_PART_OF_LABEL[labels], len(MASKS), resolution)
    return Rendering(_colour(face, labels), masks.astype(np.float32) / SUPERSAMPLE**2)


def coverage(face: Face, resolution: int = 64) -> np.ndarray:
    """How many sub-pixels of each pixel have each label; colours do not matter. uint8 [17, R, R], 0 … 16."""
    return _covered(_label_map(face, resolution), len(LABELS), resolution).astype(np.uint8)


def _covered(labels: np.ndarray, n: int, resolution: int) -> np.ndarray:
    row = np.arange(resolution * SUPERSAMPLE) // SUPERSAMPLE
    cell = row[:, None] * resolution + row
    counts = np.bincount(
        (labels.astype(np.int64) * resolution**2 + cell).ravel(), minlength=n * resolution**2
    )
    return counts.reshape(n, resolution, resolution)
