"""The user's photos: each is inverted to a code, which is stored beside the aligned picture."""

import hashlib
import io
import warnings
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cfclip.domain import Domain
from cfclip.explorer.recipe import brief
from cfclip.files import atomic_write
from cfclip.images import to_uint8
from cfclip.inversion import projector
from cfclip.inversion.align import detector_file, load_photo

CANNOT_DRAW = 25.0
"""PSNR in dB below which a reconstruction shows another person; held-out toonfaces renders reach 33 to 38."""


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo that was inverted, as it looks after alignment."""

    name: str
    psnr: float  # of its reconstruction, dB
    original: np.ndarray  # uint8 [R, R, 3]

    @property
    def advice(self) -> str:
        """How good the reconstruction is, in words."""
        poor = "; this domain cannot draw such a picture, and edits another one"
        return f"its reconstruction has {self.psnr:.1f} dB{poor if self.psnr < CANNOT_DRAW else ''}"


def is_aligned(domain: Domain) -> bool:
    """Whether the pictures of the domain are photos of faces, aligned by their eyes and mouths."""
    return domain.truth is None and domain.identity is not None


def finds_points(domain: Domain) -> bool:
    """Whether the five points of a photo can be detected. Raises ValueError for a wrong detector file."""
    return is_aligned(domain) and detector_file() is not None


def asks_for_points(domain: Domain) -> bool:
    """Whether the user must point at the face in a photo. True if the detector's file is damaged, too."""
    try:
        return is_aligned(domain) and not finds_points(domain)
    except ValueError:  # shown when a photo comes without points
        return True


def find_photo(path: str, resolution: int) -> Photo | None:
    """The photo beside a file of codes; None if :func:`invert` did not write it at this resolution."""
    file = Path(path).with_suffix(".png")
    return _read(file, resolution) if file.is_file() else None


@lru_cache(maxsize=64)
def _read(file: Path, resolution: int) -> Photo | None:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            original = np.asarray(image.convert("RGB"))
            photo = Photo(brief(image.text["name"], 40), float(image.text["psnr"]), original)
    except Exception:  # the picture was not written by invert, or is damaged in whatever way
        return None
    return photo if original.shape[:2] == (resolution, resolution) else None


def invert(
    domain: Domain, content: bytes, points: Sequence[Sequence[float]], name: str, steps: int, folder: Path
) -> tuple[str, list[str]]:
    """Invert a photo into a file of codes in ``folder``; returns the path of this file, and warnings.

    :func:`cfclip.inversion.align.load_photo` aligns the photo, and raises ValueError if it cannot.
    """
    size = domain.generator.resolution
    detect = isinstance(points, Sized) and not len(points) and finds_points(domain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        photo = load_photo(io.BytesIO(content), size, points, detect=detect).to(domain.device)
    start = projector.encode(domain, photo) if domain.encoder is not None else None
    config = projector.InversionConfig(steps=steps, noise_maps=False)
    if domain.distance() is None:
        config = replace(config, perceptual=0.0)
    found = projector.invert(domain, photo, config, start, progress=False)
    stem = hashlib.sha256(content + repr((domain.name, points, name)).encode()).hexdigest()[:12]
    code, about = found.w_plus.cpu(), PngInfo()
    about.add_itxt("name", brief(name, 40))
    about.add_itxt("psnr", str(found.metrics[0]["psnr"]))
    picture = Image.fromarray(to_uint8(photo)[0])
    atomic_write(folder / f"{stem}.png", lambda part: picture.save(part, format="PNG", pnginfo=about))
    path = atomic_write(folder / f"{stem}.pt", lambda part: torch.save(code, part))
    return str(path), [str(warning.message) for warning in caught]
