"""Photo file -> an aligned face, as a tensor for the encoder and :mod:`cfclip.inversion.projector`.

The alignment is that of FFHQ's dataset script (Karras et al. 2019, "A Style-Based Generator Architecture for
Generative Adversarial Networks", appendix A): an oriented square around the eyes and the mouth, with mirrored
and blurred borders where it leaves the photo. It needs five points [x, y] in pixels, y downwards:

    0 left eye, 1 right eye, 2 nose, 3 left and 4 right mouth corner; *left as seen in the picture*.
"""

import io
import logging
import os
import reprlib
import warnings
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cfclip import files
from cfclip.checkpoints import sources
from cfclip.images import to_tensor

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 40_000_000
"""The largest number of pixels that is decoded: a few bytes can claim any number of pixels."""
POINTS = "left eye, right eye, nose, left mouth corner, right mouth corner"
SUPERSAMPLE = 4
"""The square is cut out at this many times the output's size, then reduced; FFHQ: 4096 for 1024."""

Points = Sequence[Sequence[float]] | np.ndarray


def read_photo(file: str | os.PathLike | BinaryIO) -> tuple[Image.Image, int]:
    """A PNG, JPEG or WebP as 8-bit RGB, rotated upright as its EXIF data say; transparency becomes white.

    Uses the first frame of an animation and ignores colour profiles. A JPEG with more than ``MAX_PIXELS`` is
    halved in width and height while it is decoded, if it is not progressive. Also returns the factor of this
    reduction, 1 or 2. Raises ValueError, with the fix, if more than ``MAX_PIXELS`` would be left, and for any
    other or damaged file.
    """
    shrink, problem = 1, ""
    name = _name_of(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            image = Image.open(file, formats=FORMATS)
            pixels = image.width * image.height
            # all coefficients of a progressive JPEG are in memory, however small its picture becomes
            if pixels > MAX_PIXELS and isinstance(image, JpegImageFile) and "progressive" not in image.info:
                shrink = 2
                image.draft(None, (image.width // shrink, image.height // shrink))
            if pixels > MAX_PIXELS * shrink**2:
                raise Image.DecompressionBombError
            image.load()
    except UnidentifiedImageError:
        problem = "is not a PNG, JPEG or WebP (or its beginning is damaged): convert it to one of them"
        if _is_empty(file):
            problem = "is empty (0 bytes): copy or download it again"
    except Image.DecompressionBombError:
        problem = f"claims to have more than {MAX_PIXELS / 1e6:g} million pixels: shrink it first"
    except PermissionError:
        problem = "may not be read: change its permissions"
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, zlib.error) as error:
        problem = f"cannot be read ({error}): it is damaged or incomplete, get it again"
    if problem:
        raise ValueError(f"{name} {problem}")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block makes Pillow raise almost anything
        logger.debug("EXIF data of %s", name, exc_info=True)
        warnings.warn(f"{name}: its EXIF data are damaged ({error}); it is not rotated", stacklevel=3)
    return _to_rgb(image), shrink


def _name_of(file: str | os.PathLike | BinaryIO) -> str:
    """The name of ``file`` in errors. ValueError if it is neither a file's path nor a file open for bytes."""
    if isinstance(file, str | os.PathLike):
        name = os.fspath(file) or "the empty path"
        if os.path.isfile(file):
            return name
        if os.path.isdir(file):
            raise ValueError(f"{name} is a folder: give the path of a photo in it")
        raise ValueError(
            f"{name} {'is not a file' if os.path.exists(file) else 'does not exist'}: check the path"
        )
    if not hasattr(file, "read") or isinstance(file, io.TextIOBase):
        raise ValueError(f"a photo must be a path, or a file opened with mode 'rb', not {reprlib.repr(file)}")
    return getattr(file, "name", "the photo")


def _is_empty(file: str | os.PathLike | BinaryIO) -> bool:
    return (file.seek(0, os.SEEK_END) if hasattr(file, "read") else os.path.getsize(file)) == 0


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion would clip at 255
        grey = np.asarray(image, dtype=np.float32) / 257  # float32 is exact enough, and half the memory
        image = Image.fromarray(np.rint(grey, out=grey).clip(0, 255, out=grey).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_points(points: Points, size: tuple[int, int] | None = None) -> np.ndarray:
    """``points`` as float [5, 2].

    Raises ValueError unless they are five finite points, arranged as in a face, and inside the picture if its
    ``size`` (width, height) is given.
    """
    try:
        array = np.asarray(points, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        array = np.empty(0)
    if array.shape != (5, 2):
        given = reprlib.repr(array.shape if array.size else points)
        raise ValueError(f"points must be five [x, y] pairs ({POINTS}), not {given}")
    if np.abs(array).max() < 2 and (array % 1).any():
        raise ValueError(
            "the points look like fractions of the picture, but must be pixels: multiply each x by the "
            "photo's width and each y by its height"
        )
    for name, (x, y) in zip(POINTS.split(", "), array, strict=True):
        if not np.isfinite([x, y]).all():
            raise ValueError(f"the {name} is at [{x:g}, {y:g}]: coordinates must be finite")
        if size and not (0 <= x <= size[0] and 0 <= y <= size[1]):
            outside = f"outside the picture of {size[0]} x {size[1]}"
            raise ValueError(f"the {name} at [{x:g}, {y:g}] is {outside}: give pixels of the upright picture")
    left, right, _, mouth_left, mouth_right = array
    across, down = right - left, (mouth_left + mouth_right - left - right) / 2
    if min(np.hypot(*across), np.hypot(*down)) < 2:
        raise ValueError("the points coincide: eyes and mouth must be at least 2 pixels apart")
    area = across[0] * down[1] - across[1] * down[0]  # negative if left and right are exchanged
    if area <= 0.2 * np.hypot(*across) * np.hypot(*down) or (mouth_right - mouth_left) @ across < 0:
        raise ValueError(
            "the points are not arranged as in a face: left is the left side of the picture, not of the "
            f"person, and the order is {POINTS}"
        )
    return array


def face_quad(points: Points) -> np.ndarray:
    """The oriented square to cut out: corners [4, 2] from the upper left, counter-clockwise.

    e is the vector from the left eye to the right, m the vector from the middle of the eyes to the middle of
    the mouth. The square's x axis is along ``e - rot90(m)``, half its side is ``max(2 |e|, 1.8 |m|)``, and
    its centre is ``0.1 m`` below the eyes.
    """
    left, right, _, mouth_left, mouth_right = check_points(points)
    eyes, across = (left + right) / 2, right - left
    down = (mouth_left + mouth_right) / 2 - eyes
    x = across + np.array([down[1], -down[0]])
    x *= max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down)) / np.hypot(*x)
    y, centre = np.array([-x[1], x[0]]), eyes + 0.1 * down
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def align(photo: Image.Image, points: Points, size: int) -> Image.Image:
    """The face cut out of an RGB ``photo``: RGB, ``size`` x ``size``. Raises like :func:`check_points`."""
    quad = face_quad(check_points(points, photo.size))
    side = np.hypot(*(quad[3] - quad[0]))
    shrink = int(side / size * 0.5)
    if shrink > 1:  # much larger than needed: reduce it before cutting
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
    corners, large = (quad + 0.5).flatten().tolist(), (SUPERSAMPLE * size, SUPERSAMPLE * size)
    photo = photo.transform(large, Image.Transform.QUAD, corners, Image.Resampling.BILINEAR)
    return photo.resize((size, size), Image.Resampling.LANCZOS)


def _extend(photo: Image.Image, before: np.ndarray, after: np.ndarray, blur: float) -> Image.Image:
    """Mirror the picture beyond its edges, fading into blur and then into its median colour.

    before, after: how many pixels to add to the left and top, and to the right and bottom; [x, y].
    """
    (left, top), (right, bottom) = before, after
    pixels = np.pad(np.asarray(photo, dtype=np.float32), ((top, bottom), (left, right), (0, 0)), "reflect")
    height, width = pixels.shape[:2]
    y, x = np.ogrid[:height, :width]
    across = np.minimum(x / left, (width - 1 - x) / right)
    down = np.minimum(y / top, (height - 1 - y) / bottom)
    # 1 at the rim, 0 at the edge of the original picture, negative inside
    outside = (1 - np.minimum(across, down))[..., None].astype(np.float32)
    pixels += (gaussian_filter(pixels, [blur, blur, 0]) - pixels) * np.clip(3 * outside + 1, 0, 1)
    pixels += (np.median(pixels, (0, 1)) - pixels) * np.clip(outside, 0, 1)
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def _warn_if_small(side: float, size: int, shrink: int) -> None:
    """Warn if a face of ``side`` pixels must be enlarged more than twice; shrink: see :func:`read_photo`."""
    if 2 * side < size:
        larger = "crop the photo to the face first" if shrink > 1 else "use a larger photo"
        warnings.warn(
            f"the face is only {side:.0f} pixels wide, but the generator draws {size}: it is enlarged, and "
            f"its inversion will be blurred; {larger}",
            stacklevel=3,
        )


def detector_file(folder: Path = files.DOWNLOADS) -> Path | None:
    """The file of YuNet, a face detector, if it is in ``folder`` and OpenCV is installed; otherwise None.

    Raises ValueError if the file is not the documented one.
    """
    source = next(one for one in sources.SOURCES if one.role == "detector")
    path = sources.locate(source, folder)
    if path is None or find_spec("cv2") is None:
        return None
    row = sources.inspect(source, folder)
    if not row.good:
        raise ValueError(row.detail)
    return path


def detect_points(photo: Image.Image) -> np.ndarray:
    """The five points [5, 2] of the largest face, found by OpenCV's YuNet.

    Raises ValueError without OpenCV or YuNet's file, and if there is no face.
    """
    if (file := detector_file()) is None:
        raise ValueError(
            "finding the face needs OpenCV (pip install opencv-python-headless) and YuNet's file "
            f"(cfclip fetch ffhq --all); or give five points by hand: {POINTS}"
        )
    import cv2  # optional: the five points can also be given by hand

    scale = min(1.0, 1024 / max(photo.size))
    small = photo.resize([max(1, round(length * scale)) for length in photo.size], Image.Resampling.BILINEAR)
    detector = cv2.FaceDetectorYN.create(os.fspath(file), "", small.size, 0.6)
    _, faces = detector.detect(np.ascontiguousarray(np.asarray(small)[..., ::-1]))  # BGR
    if faces is None or not len(faces):
        size = f"{photo.width} x {photo.height}"
        raise ValueError(f"no face was found in the photo of {size}; give five points by hand: {POINTS}")
    # a row is x, y, width, height, then the points; eyes and mouth corners are in order from left to right
    face = max(faces, key=lambda row: row[2] * row[3])
    points = np.asarray(face[4:14], dtype=np.float64).reshape(5, 2) / scale
    return np.clip(points, 0, photo.size)


def load_photo(
    file: str | os.PathLike | BinaryIO, size: int, points: Points = (), detect: bool = False
) -> Tensor:
    """A photo file for a generator of resolution ``size``: [1, 3, size, size] in [-1, 1].

    The photo is aligned by ``points``, or with ``detect`` by the result of :func:`detect_points`. With
    neither it should be aligned already; if it is not square, its middle is used, with a warning. A face
    smaller than half of ``size`` causes a warning too. Raises ValueError as :func:`read_photo`,
    :func:`check_points` and :func:`detect_points` do.
    """
    try:
        given = len(points) > 0
    except TypeError:
        raise ValueError(
            f"points must be five [x, y] pairs ({POINTS}), or [] for a photo that is aligned already, not "
            f"{points!r}"
        ) from None
    photo, shrink = read_photo(file)
    if given:
        points = check_points(points, (photo.width * shrink, photo.height * shrink)) / shrink
    elif detect:
        points = detect_points(photo)
    if given or detect:
        quad = face_quad(points)
        _warn_if_small(np.hypot(*(quad[3] - quad[0])), size, shrink)
        photo = align(photo, points, size)
    else:
        _warn_if_small(min(photo.size), size, shrink)
        if abs(photo.width - photo.height) > 0.01 * max(photo.size):
            warnings.warn(
                f"the photo is not square ({photo.width} x {photo.height}), so it does not look aligned; its "
                "inversion will be poor: align it by its points first",
                stacklevel=2,
            )
            side = min(photo.size)
            photo = ImageOps.fit(photo, (side, side))
    return to_tensor([np.asarray(photo.resize((size, size), Image.Resampling.LANCZOS))])
