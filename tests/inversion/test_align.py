"""Reading and aligning photos: against hand-computed numbers, drawn dots, and files of every kind."""

import io
import struct
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from cfclip.checkpoints import sources
from cfclip.inversion import align
from cfclip.inversion.align import read_photo

FACE = [[400, 300], [600, 300], [500, 400], [430, 500], [570, 500]]
"""Upright: eyes 200 apart, the mouth 200 below them."""


def turned(points, degrees, centre=(500, 400), scale=1.0, move=(0, 0)):
    a = np.deg2rad(degrees)
    rotation = scale * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    return (np.asarray(points, dtype=float) - centre) @ rotation.T + centre + move


def test_quad_by_hand():
    # e = (200, 0), m = (0, 200): x ~ e - (-200, 0) = (400, 0), length max(400, 360); centre (500, 300) + 0.1 m = (500, 320)
    assert np.abs(align.face_quad(FACE) - [[100, -80], [100, 720], [900, 720], [900, -80]]).max() < 1e-6
    # a long face: m = (0, 300), 1.8 |m| = 540 > 400; centre (500, 330)
    long = [[400, 300], [600, 300], [500, 450], [430, 600], [570, 600]]
    assert np.abs(align.face_quad(long) - [[-40, -210], [-40, 870], [1040, 870], [1040, -210]]).max() < 1e-6
    # turned by 90 degrees: e = (0, 200), m = (-200, 0): x ~ (0, 200) - (0, -200) = (0, 400); centre (500, 400) + (-20, 0)
    down = [[500, 300], [500, 500], [400, 400], [300, 330], [300, 470]]
    assert np.abs(align.face_quad(down) - [[880, 0], [80, 0], [80, 800], [880, 800]]).max() < 1e-6
    # oblique: e = (30, 40), m = (-60, 50); x ~ (30 + 50, 40 + 60) = (80, 100) / 128.06, length max(100, 140.58) = 140.58 -> (87.82, 109.77)
    oblique = [[200, 200], [230, 240], [180, 240], [140, 260], [170, 280]]
    centre, x, y = np.array([209, 225]), np.array([87.82, 109.77]), np.array([-109.77, 87.82])
    assert (
        np.abs(
            align.face_quad(oblique) - [centre - x - y, centre - x + y, centre + x + y, centre + x - y]
        ).max()
        < 1
    )


def dots(points, size=(1000, 800), radius=10):
    """Red, green, blue, yellow and white discs on grey."""
    y, x = np.ogrid[: size[1], : size[0]]
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    for (px, py), colour in zip(
        points, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)], strict=True
    ):
        image[(x - px) ** 2 + (y - py) ** 2 <= radius**2] = colour
    return Image.fromarray(image)


def centres(image):
    """Where the five discs lie, as centroids."""
    r, g, b = np.asarray(image).astype(int).transpose(2, 0, 1)
    weights = [
        np.clip(w, 0, None)
        for w in (
            r - np.maximum(g, b),
            g - np.maximum(r, b),
            b - np.maximum(r, g),
            np.minimum(r, g) - b,
            np.minimum(np.minimum(r, g), b) - 130,
        )
    ]
    weights = [w * (w > 40) for w in weights]
    y, x = np.mgrid[: image.height, : image.width]
    return np.array([[(w * x).sum() / w.sum(), (w * y).sum() / w.sum()] for w in weights])


@pytest.mark.parametrize("size", [64, 256, 512])
@pytest.mark.parametrize(
    ("degrees", "scale", "move"),
    [(0, 1, (0, 0)), (20, 0.7, (30, 20)), (-35, 0.8, (-60, 10)), (180, 0.6, (0, 0)), (10, 1.0, (-250, -60))],
)
def test_the_points_land_where_the_formula_says(size, degrees, scale, move):
    points = turned(FACE, degrees, scale=scale, move=move)
    image = align.align(dots(points), points, size)
    assert image.size == (size, size) and image.mode == "RGB"
    # the same for every similarity of FACE, whose square is [100, 900] x [-80, 720]
    wanted = (np.array(FACE) - [100, -80]) / 800 * size - 0.5
    assert np.abs(centres(image) - wanted).max() < 1
    assert np.abs(align.aligned_points(points, size) - wanted - 0.5).max() < 1e-6


def test_what_the_photo_lacks_is_mirrored_and_blurred():
    rng = np.random.default_rng(0)
    stripes = Image.fromarray(np.repeat(rng.integers(0, 255, (1, 1000, 3), dtype=np.uint8), 800, 0))
    image = np.asarray(align.align(stripes, FACE, 400)).astype(float)  # its square begins 80 above the photo
    roughness = np.abs(np.diff(image, axis=1)).mean((1, 2))
    assert roughness[:3].mean() < 0.4 * roughness[200:300].mean()
    assert image[:20].mean() > 60  # not black


def test_a_huge_photo_is_shrunk_first():
    big = dots(np.array(FACE) * 4, (4000, 3200), 40)
    points = np.array(FACE) * 4
    wanted = (np.array(FACE) - [100, -80]) / 800 * 64 - 0.5
    assert np.abs(centres(align.align(big, points, 64)) - wanted).max() < 1


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "five .* pairs"),
        ([[1, 2]] * 4, "five"),
        ("abcde", "five"),
        ([[0, 0]] * 5, "fall together"),
        ([*FACE[:4], [float("nan"), 1]], "no place"),
        ([*FACE[:4], [1001, 10]], "right mouth corner at .* outside the picture of 1000 x 800"),
        ([FACE[i] for i in (1, 0, 2, 3, 4)], "left is the left side"),
        ([FACE[i] for i in (0, 1, 2, 4, 3)], "no face"),
        ([[400, 300], [600, 300], [1, 1], [700, 300], [720, 300]], "no face"),
    ],
)
def test_wrong_points_are_told(points, words):
    with pytest.raises(ValueError, match=words):
        align.align(Image.new("RGB", (1000, 800)), points, 64)


def test_looks_aligned():
    image = align.align(dots(FACE), FACE, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert align.looks_aligned(image) and align.looks_aligned(image, align.aligned_points(FACE, 256))
    with pytest.warns(UserWarning, match=r"not square \(1000 x 800\)"):
        assert not align.looks_aligned(dots(FACE))
    with pytest.warns(UserWarning, match=r"% of the width off"):
        assert not align.looks_aligned(image, align.aligned_points(FACE, 256) * 0.8)


def stored(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


GRADIENT = np.add.outer(np.arange(12) * 10, np.arange(16) * 8).astype(np.uint8)
COLOUR = Image.fromarray(np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], -1))


@pytest.mark.parametrize(
    ("form", "options", "off"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("MPO", {"quality": 95, "subsampling": 0, "save_all": True, "append_images": [COLOUR]}, 12),
    ],
)
def test_formats(form, options, off):
    read = read_photo(stored(COLOUR, form, **options))
    assert read.mode == "RGB" and np.abs(np.asarray(read).astype(int) - np.asarray(COLOUR)).max() <= off


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    a = np.asarray(COLOUR)
    upright = {
        1: a,
        2: a[:, ::-1],
        3: a[::-1, ::-1],
        4: a[::-1],
        5: a.transpose(1, 0, 2),
        6: np.rot90(a, -1),
        7: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90(a),
    }[orientation]
    assert np.array_equal(np.asarray(read_photo(stored(COLOUR, exif=exif))), upright)


def test_damaged_exif_is_no_reason_to_fail():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_photo(stored(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (16, 12)


def test_transparency_is_laid_on_white():
    rgba = np.dstack([np.asarray(COLOUR), np.full(GRADIENT.shape, 51, np.uint8)])  # a fifth
    wanted = 0.2 * np.asarray(COLOUR) + 0.8 * 255
    assert np.abs(np.asarray(read_photo(stored(Image.fromarray(rgba)))) - wanted).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert np.asarray(read_photo(stored(palette, transparency=0))).tolist() == [
        [[255, 255, 255], [0, 0, 255]]
    ]
    assert np.asarray(read_photo(stored(palette))).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    grey = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)])
    assert np.asarray(read_photo(stored(grey))).tolist() == [[[255, 255, 255]]]


def test_grey_sixteen_bits_one_bit_and_cmyk():
    assert np.array_equal(
        np.asarray(read_photo(stored(Image.fromarray(GRADIENT)))), np.repeat(GRADIENT[..., None], 3, 2)
    )
    deep = GRADIENT.astype(np.uint16) * 257
    assert np.array_equal(np.asarray(read_photo(stored(Image.fromarray(deep))))[..., 0], GRADIENT)
    assert np.asarray(read_photo(stored(Image.new("1", (2, 2), 1)))).min() == 255
    read = np.asarray(read_photo(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert read[..., 0].min() > 200 and read[..., 1:].max() < 60  # red


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", b"")
    + chunk(b"IEND", b"")
)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no PNG, JPEG or WebP"),
        (b"<!DOCTYPE html>", "no PNG, JPEG or WebP"),
        (stored(COLOUR, "GIF").read(), "no PNG, JPEG or WebP"),
        (BOMB, "million pixels"),
        *(
            (stored(NOISE, form).read()[:1500], "damaged or cut short|no PNG")
            for form in ("PNG", "JPEG", "WEBP")
        ),
    ],
    ids=["empty", "page", "gif", "bomb", "png", "jpeg", "webp"],
)
def test_what_is_no_photo_is_told(content, words, tmp_path):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"photo\.png.*({words})"):
        read_photo(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="the photo"):
        read_photo(io.BytesIO(content))


def test_paths_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png does not exist"):
        read_photo(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_photo(tmp_path)


def test_load_photo(tmp_path):
    path = tmp_path / "photo.png"
    dots(FACE).save(path)
    x = align.load_photo(path, 64, FACE)
    assert x.shape == (1, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(
        ((x[0].permute(1, 2, 0).numpy() + 1) * 127.5).round(), np.asarray(align.align(dots(FACE), FACE, 64))
    )
    with pytest.warns(UserWarning, match="not square"):
        assert align.load_photo(path, 64).shape == (1, 3, 64, 64)
    Image.new("RGB", (1, 1), "red").save(path)
    assert align.load_photo(path, 16)[0, :, 3, 3].tolist() == [1, -1, -1]


class Detector:
    """Stands for cv2.FaceDetectorYN: a small face, and a large one whose points are those of FACE in the picture it was given."""

    def __init__(self, file, size):
        self.scale, self.size, self.file = size[0] / 2000, size, file

    def detect(self, image):
        assert image.shape == (self.size[1], self.size[0], 3) and image[0, 0].tolist() == [3, 2, 1]  # BGR
        if self.file == "blind":
            return 0, None
        large = np.concatenate([[0, 0, 500, 500], 2 * np.array(FACE).flatten(), [0.9]]) * self.scale
        return 1, np.stack([np.full(15, 5), large]).astype(np.float32)


def test_the_detectors_points(monkeypatch):
    factory = types.SimpleNamespace(create=lambda file, config, size, score: Detector(file, size))
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(FaceDetectorYN=factory))
    photo = Image.new("RGB", (2000, 1600), (1, 2, 3))
    assert np.abs(align.detect_points(photo, "yunet.onnx") - 2 * np.array(FACE)).max() < 0.01
    with pytest.raises(ValueError, match="no face was found in the photo of 2000 x 1600"):
        align.detect_points(photo, "blind")


def test_without_a_detector(monkeypatch, tmp_path):
    monkeypatch.setattr(align, "detector_file", lambda: None)
    with pytest.raises(ValueError, match=r"OpenCV .*cfclip fetch ffhq --all.*five points"):
        align.detect_points(Image.new("RGB", (8, 8)))


def test_only_the_documented_detector_is_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(align, "find_spec", lambda name: object())
    assert align.detector_file(tmp_path) is None
    (source,) = (s for s in sources.SOURCES if s.role == "detector")
    (tmp_path / source.name).write_bytes(b"\x08\x06other")
    with pytest.raises(ValueError, match="not the documented file"):
        align.detector_file(tmp_path)
    (tmp_path / source.name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"pointer|Git LFS"):
        align.detector_file(tmp_path)
