"""Photo file -> a face aligned as FFHQ's are, and as a tensor: what the encoder and :mod:`cfclip.inversion` expect.

The alignment is that of FFHQ's dataset script ("A Style-Based Generator Architecture …", Karras et al. 2019, appendix A): an oriented
square from the eyes and the mouth, with mirrored and blurred borders where it leaves the picture. Five points are enough for it:

    0 left eye, 1 right eye, 2 nose, 3 left and 4 right mouth corner; [x, y] in pixels, y downwards, *left as one sees the picture*.
"""

import os
import warnings
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cfclip import files
from cfclip.checkpoints import sources
from cfclip.images import to_tensor

FORMATS = ("PNG", "JPEG", "WEBP")

MAX_PIXELS = 150_000_000
"""Of a photo: more is taken for a decompression bomb."""

POINTS = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")

SUPERSAMPLE = 4
"""The square is cut out at this many times the output's size, then averaged down; FFHQ: 4096 for 1024."""

TOLERANCE = 0.08
"""How far, in widths of the picture, a corner of the aligned square may be off before :func:`looks_aligned` warns."""

Points = Sequence[Sequence[float]] | np.ndarray


def read_photo(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """A PNG, JPEG or WebP as upright 8-bit RGB: turned as its EXIF says, transparency laid on white, 16 bits rounded to 8.

    Grey, palette and CMYK pictures become RGB; of an animation the first picture counts; colour profiles are ignored.
    Raises ValueError that names the file and the fix for anything else, for a damaged file and for one over ``MAX_PIXELS``.
    """
    name = getattr(file, "name", "the photo") if hasattr(file, "read") else os.fspath(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            image.load()
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist: check the path") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is no PNG, JPEG or WebP (or its beginning is damaged): convert it to one of them"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{name} has more than {MAX_PIXELS / 1e6:g} million pixels, or claims to: shrink it first"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, zlib.error) as error:
        raise ValueError(
            f"{name} cannot be read ({error}): it is damaged or cut short, get it again"
        ) from None
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a damaged EXIF block makes Pillow raise
        warnings.warn(f"{name}: its EXIF data are damaged ({error}); it is taken as it lies", stacklevel=2)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        return Image.fromarray(
            np.rint(np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_points(points: Points, size: tuple[int, int] | None = None) -> np.ndarray:
    """``points`` as float [5, 2]. ValueError if they are not five, not finite, outside a picture of ``size`` (w, h), or no face."""
    try:
        array = np.asarray(points, dtype=np.float64)
    except (ValueError, TypeError):
        array = np.empty(0)
    if array.shape != (5, 2):
        raise ValueError(
            f"points must be five [x, y] pairs ({', '.join(POINTS)}), not {np.shape(array) if array.size else points!r}"
        )
    for name, (x, y) in zip(POINTS, array, strict=True):
        if not np.isfinite([x, y]).all():
            raise ValueError(f"the {name} is at [{x:g}, {y:g}], which is no place")
        if size and not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise ValueError(
                f"the {name} at [{x:g}, {y:g}] is outside the picture of {size[0]} x {size[1]}: points are in pixels of the picture "
                "as one sees it, turned upright"
            )
    left, right, _, mouth_left, mouth_right = array
    across, down = right - left, (mouth_left + mouth_right - left - right) / 2
    if min(np.hypot(*across), np.hypot(*down)) < 2:
        raise ValueError("the points fall together: eyes and mouth must be at least 2 pixels apart")
    if (
        across[0] * down[1] - across[1] * down[0] <= 0.2 * np.hypot(*across) * np.hypot(*down)
        or (mouth_right - mouth_left) @ across < 0
    ):
        raise ValueError(
            "the points are no face: left is the left side of the picture, not of the person, and the order is "
            + ", ".join(POINTS)
        )
    return array


def face_quad(points: Points) -> np.ndarray:
    """The oriented square to cut out: corners [4, 2], upper left, lower left, lower right, upper right.

    With e the vector from eye to eye and m from between the eyes to the mouth: its x axis is along ``e - rot90(m)``, its half side
    ``max(2 |e|, 1.8 |m|)``, its centre ``0.1 m`` below the eyes.
    """
    centre, x, y = _frame(check_points(points))
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def _frame(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, and the half axes to the right and downwards, of the square."""
    left, right, _, mouth_left, mouth_right = points
    eyes, across = (left + right) / 2, right - left
    down = (mouth_left + mouth_right) / 2 - eyes
    x = across + np.array([down[1], -down[0]])
    x *= max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down)) / np.hypot(*x)
    return eyes + 0.1 * down, x, np.array([-x[1], x[0]])


def aligned_points(points: Points, size: int) -> np.ndarray:
    """Where ``points`` [5, 2] of a photo come to lie in its aligned picture of ``size``², [5, 2]."""
    points = check_points(points)
    centre, x, y = _frame(points)
    return ((points - centre) @ np.stack([x, y], 1) / (x @ x) + 1) * (size / 2)


def align(photo: Image.Image, points: Points, size: int) -> Image.Image:
    """Cut the face out of an RGB ``photo``: RGB, ``size``². Raises ValueError as :func:`check_points`."""
    quad = face_quad(check_points(points, photo.size))
    side = np.hypot(*(quad[3] - quad[0]))
    shrink = int(side / size * 0.5)
    if shrink > 1:  # far larger than needed: average down before cutting
        small = [max(1, round(length / shrink)) for length in photo.size]
        photo = photo.resize(small, Image.Resampling.LANCZOS)
        quad, side = quad / shrink, side / shrink

    border = max(round(side * 0.1), 3)
    low, high = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
    box = (*np.maximum(low - border, 0).tolist(), *np.minimum(high + border, photo.size).tolist())
    photo, quad = photo.crop(box), quad - box[:2]

    before = np.maximum(border - np.floor(quad.min(0)).astype(int), 0)
    after = np.maximum(np.ceil(quad.max(0)).astype(int) + border - photo.size, 0)
    if max(*before, *after) > border - 4:
        rim = round(side * 0.3)
        before, after = np.maximum(before, rim), np.maximum(after, rim)
        photo, quad = _extend(photo, before, after, side * 0.02), quad + before
    large = SUPERSAMPLE * size
    photo = photo.transform(
        (large, large), Image.Transform.QUAD, (quad + 0.5).flatten().tolist(), Image.Resampling.BILINEAR
    )
    return photo.resize((size, size), Image.Resampling.LANCZOS)


def _extend(photo: Image.Image, before: np.ndarray, after: np.ndarray, blur: float) -> Image.Image:
    """Mirror the picture ``before`` and ``after`` its edges ([x, y], pixels), fading into blur and then into its median colour."""
    (left, top), (right, bottom) = before, after
    pixels = np.pad(np.asarray(photo, dtype=np.float32), ((top, bottom), (left, right), (0, 0)), "reflect")
    height, width = pixels.shape[:2]
    y, x = np.ogrid[:height, :width]
    outside = 1 - np.minimum(
        np.minimum(x / left, (width - 1 - x) / right), np.minimum(y / top, (height - 1 - y) / bottom)
    )
    outside = outside[..., None].astype(
        np.float32
    )  # 1 at the rim, 0 where the picture begins, negative inside
    pixels += (gaussian_filter(pixels, [blur, blur, 0]) - pixels) * np.clip(3 * outside + 1, 0, 1)
    pixels += (np.median(pixels, (0, 1)) - pixels) * np.clip(outside, 0, 1)
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def looks_aligned(photo: Image.Image, points: Points | None = None) -> bool:
    """Whether ``photo`` can be taken as it is; a warning says why not.

    With ``points`` their square must be the whole picture, to ``TOLERANCE``. Without, only the shape can be judged.
    """
    width, height = photo.size
    problem = (
        "" if abs(width - height) <= 0.01 * max(width, height) else f"it is not square ({width} x {height})"
    )
    if points is not None and not problem:
        corners = np.array([[0, 0], [0, height], [width, height], [width, 0]])
        off = np.abs(face_quad(check_points(points, photo.size)) - corners).max() / width
        problem = (
            ""
            if off <= TOLERANCE
            else f"an aligned face has its eyes and mouth elsewhere: its square is {off:.0%} of the width off"
        )
    if problem:
        warnings.warn(
            f"the photo does not look aligned: {problem}; an inversion will be poor, align it by its points first",
            stacklevel=2,
        )
    return not problem


def detector_file(folder: Path = files.DOWNLOADS) -> Path | None:
    """YuNet's file if it is in ``folder`` and OpenCV is installed, else None. ValueError if the file is not the documented one."""
    (source,) = (s for s in sources.SOURCES if s.role == "detector")
    path = sources.locate(source, folder)
    if path is None or find_spec("cv2") is None:
        return None
    row = sources.inspect(source, folder)
    if not row.good:
        raise ValueError(row.detail)
    return path


def detect_points(photo: Image.Image, file: str | os.PathLike | None = None) -> np.ndarray:
    """The five points of the largest face, [5, 2], by OpenCV's YuNet (``file``: its ONNX, default :func:`detector_file`).

    ValueError without OpenCV or the file, and if there is no face.
    """
    file = file or detector_file()
    if file is None:
        raise ValueError(
            "finding the face needs OpenCV (pip install opencv-python-headless) and YuNet's file (cfclip fetch ffhq --all); "
            f"or give five points by hand: {', '.join(POINTS)}"
        )
    import cv2  # no dependency: most people click five points once

    scale = min(1.0, 1024 / max(photo.size))
    small = photo.resize([max(1, round(length * scale)) for length in photo.size], Image.Resampling.BILINEAR)
    detector = cv2.FaceDetectorYN.create(os.fspath(file), "", small.size, 0.6)
    _, faces = detector.detect(np.ascontiguousarray(np.asarray(small)[..., ::-1]))  # BGR
    if faces is None or not len(faces):
        raise ValueError(
            f"no face was found in the photo of {photo.width} x {photo.height}: give its five points by hand ({', '.join(POINTS)})"
        )
    face = max(
        faces, key=lambda row: row[2] * row[3]
    )  # x, y, w, h, then the points, from the picture's left to its right
    points = np.asarray(face[4:14], dtype=np.float64).reshape(5, 2) / scale
    return np.clip(points, 0, photo.size)


def load_photo(
    file: str | os.PathLike | BinaryIO, size: int, points: Points = (), detect: bool = False
) -> Tensor:
    """A photo file for a generator of ``size``: [1, 3, size, size] in [-1, 1].

    Aligned by ``points``, or with ``detect`` by those that :func:`detect_points` finds; else it is taken as aligned already, with a
    warning if it does not look so. Raises ValueError as :func:`read_photo`, :func:`check_points` and :func:`detect_points`.
    """
    photo = read_photo(file)
    if len(points):
        photo = align(photo, points, size)
    elif detect:
        photo = align(photo, detect_points(photo), size)
    elif not looks_aligned(photo):
        side = min(photo.size)  # its middle, unstretched
        photo = ImageOps.fit(photo, (side, side))
    return to_tensor([np.asarray(photo.resize((size, size), Image.Resampling.LANCZOS))])
