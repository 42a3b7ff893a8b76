"""Reading and aligning photos: against numbers computed by hand, drawn discs, and files of every kind."""

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


SQUARES = {  # points, centre, half axis x; e is the vector between the eyes, m the one down to the mouth
    # e = (200, 0), m = (0, 200): x ~ e - (-200, 0) = (400, 0), length max(400, 360); centre 0.1 m below
    "upright": (FACE, (500, 320), (400, 0)),
    # m = (0, 300): 1.8 |m| = 540 > 400
    "long": ([*FACE[:2], [500, 450], [430, 600], [570, 600]], (500, 330), (540, 0)),
    # e = (0, 200), m = (-200, 0): x ~ (0, 200) - (0, -200) = (0, 400)
    "turned": ([[500, 300], [500, 500], [400, 400], [300, 330], [300, 470]], (480, 400), (0, 400)),
    # e = (30, 40), m = (-60, 50): x ~ (80, 100), length max(100, 1.8 * 78.10) = 140.58
    "oblique": ([[200, 200], [230, 240], [180, 240], [140, 260], [170, 280]], (209, 225), (87.82, 109.78)),
}


@pytest.mark.parametrize("name", SQUARES)
def test_the_square_is_that_of_the_formula(name):
    points, centre, x = SQUARES[name]
    centre, x, y = np.array(centre), np.array(x), np.array([-x[1], x[0]])
    corners = [centre - x - y, centre - x + y, centre + x + y, centre + x - y]
    assert np.abs(align.face_quad(points) - corners).max() < (0.02 if name == "oblique" else 1e-6)


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)]


def discs(points, size=(1000, 800), radius=10):
    """Red, green, blue, yellow and white discs on grey."""
    y, x = np.ogrid[: size[1], : size[0]]
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    for (px, py), colour in zip(points, COLOURS, strict=True):
        image[(x - px) ** 2 + (y - py) ** 2 <= radius**2] = colour
    return Image.fromarray(image)


def centres(image):
    """The centroids of the five discs."""
    r, g, b = np.asarray(image).astype(int).transpose(2, 0, 1)
    yellow, white = np.minimum(r, g), np.minimum(np.minimum(r, g), b)
    weights = [r - np.maximum(g, b), g - np.maximum(r, b), b - np.maximum(r, g), yellow - b, white - 130]
    weights = [w * (w > 40) for w in weights]
    y, x = np.mgrid[: image.height, : image.width]
    return np.array([[(w * x).sum() / w.sum(), (w * y).sum() / w.sum()] for w in weights])


def aligned(size):
    """Where the points of FACE, whose square is [100, 900] x [-80, 720], are in an aligned picture."""
    return (np.array(FACE) - [100, -80]) / 800 * size - 0.5


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize(
    ("degrees", "scale", "move"),
    [(0, 1, (0, 0)), (20, 0.7, (30, 20)), (-35, 0.8, (-60, 10)), (180, 0.6, (0, 0)), (10, 1.0, (-250, -60))],
)
def test_the_points_land_where_the_formula_says(size, degrees, scale, move):
    points = turned(FACE, degrees, scale=scale, move=move)
    image = align.align(discs(points), points, size)
    assert image.size == (size, size) and image.mode == "RGB"
    assert np.abs(centres(image) - aligned(size)).max() < 1


def test_what_is_outside_the_photo_is_mirrored_and_blurred():
    rng = np.random.default_rng(0)
    stripes = Image.fromarray(np.repeat(rng.integers(0, 255, (1, 1000, 3), dtype=np.uint8), 800, 0))
    image = np.asarray(align.align(stripes, FACE, 400)).astype(float)  # the square begins 80 above the photo
    roughness = np.abs(np.diff(image, axis=1)).mean((1, 2))
    assert roughness[:3].mean() < 0.4 * roughness[200:300].mean()
    assert image[:20].mean() > 60  # not black


def test_a_huge_photo_is_reduced_first():
    points = np.array(FACE) * 4
    image = align.align(discs(points, (4000, 3200), 40), points, 64)
    assert np.abs(centres(image) - aligned(64)).max() < 1


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "five .* pairs"),
        ([[1, 2]] * 4, r"five .* pairs .*not \(4, 2\)"),
        ("abcde", "five .* pairs .*not 'abcde'"),
        ([[0, 0]] * 5, "coincide"),
        ([*FACE[:4], [float("nan"), 1]], "right mouth corner is at .* must be finite"),
        ([*FACE[:4], [1001, 10]], "right mouth corner at .* outside the picture of 1000 x 800"),
        ([FACE[i] for i in (1, 0, 2, 3, 4)], "left is the left side"),
        ([FACE[i] for i in (0, 1, 2, 4, 3)], "not arranged as in a face"),
        ([[400, 300], [600, 300], [1, 1], [700, 300], [720, 300]], "not arranged as in a face"),
    ],
)
def test_wrong_points_are_named(points, words):
    with pytest.raises(ValueError, match=words):
        align.align(Image.new("RGB", (1000, 800)), points, 64)


def stored(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def read_back(image, form="PNG", **options):
    return np.asarray(read_photo(stored(image, form, **options)))


GRADIENT = np.add.outer(np.arange(12) * 10, np.arange(16) * 8).astype(np.uint8)
COLOUR = Image.fromarray(np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], -1))
JPEG = {"quality": 95, "subsampling": 0}


@pytest.mark.parametrize(
    ("form", "options", "off"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", JPEG, 12),
        ("MPO", {"save_all": True, "append_images": [COLOUR], **JPEG}, 12),
    ],
)
def test_each_format_is_read(form, options, off):
    read = read_photo(stored(COLOUR, form, **options))
    assert read.mode == "RGB" and np.abs(np.asarray(read).astype(int) - np.asarray(COLOUR)).max() <= off


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_rotated_as_its_exif_data_say(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    a = np.asarray(COLOUR)
    mirrored = a.transpose(1, 0, 2)
    upright = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], mirrored, np.rot90(a, -1), mirrored[::-1, ::-1]]
    upright.append(np.rot90(a))
    assert np.array_equal(read_back(COLOUR, exif=exif), upright[orientation - 1])


def test_a_photo_with_damaged_exif_data_is_read():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_photo(stored(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (16, 12)


def test_transparency_becomes_white():
    rgba = np.dstack([np.asarray(COLOUR), np.full(GRADIENT.shape, 51, np.uint8)])  # a fifth
    wanted = 0.2 * np.asarray(COLOUR) + 0.8 * 255
    assert np.abs(read_back(Image.fromarray(rgba)) - wanted).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert read_back(palette, transparency=0).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert read_back(palette).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    grey = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)])
    assert read_back(grey).tolist() == [[[255, 255, 255]]]


def test_greyscale_of_8_16_and_1_bits_and_cmyk_become_rgb():
    assert np.array_equal(read_back(Image.fromarray(GRADIENT)), np.repeat(GRADIENT[..., None], 3, 2))
    deep = GRADIENT.astype(np.uint16) * 257
    assert np.array_equal(read_back(Image.fromarray(deep))[..., 0], GRADIENT)
    assert read_back(Image.new("1", (2, 2), 1)).min() == 255
    red = read_back(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert red[..., 0].min() > 200 and red[..., 1:].max() < 60


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIZE = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", SIZE) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a PNG, JPEG or WebP"),
        (b"<!DOCTYPE html>", "not a PNG, JPEG or WebP"),
        (stored(COLOUR, "GIF").read(), "not a PNG, JPEG or WebP"),
        (BOMB, "million pixels"),
        *((stored(NOISE, form).read()[:1500], "damaged or incomplete") for form in ("PNG", "JPEG")),
        (stored(NOISE, "WEBP").read()[:1500], "not a PNG|damaged or incomplete"),
    ],
    ids=["empty", "page", "gif", "bomb", "png", "jpeg", "webp"],
)
def test_a_file_that_is_not_a_photo_is_named(content, words, tmp_path):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"photo\.png.*({words})"):
        read_photo(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="the photo"):
        read_photo(io.BytesIO(content))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png does not exist"):
        read_photo(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_photo(tmp_path)


def test_a_photo_becomes_a_tensor(tmp_path):
    path, image = tmp_path / "photo.png", align.align(discs(FACE), FACE, 64)
    discs(FACE).save(path)
    x = align.load_photo(path, 64, FACE)
    assert x.shape == (1, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(((x[0].permute(1, 2, 0).numpy() + 1) * 127.5).round(), np.asarray(image))
    Image.new("RGB", (1, 1), "red").save(path)
    assert align.load_photo(path, 16)[0, :, 3, 3].tolist() == [1, -1, -1]


def test_a_photo_that_is_not_square_is_cut_with_a_warning(tmp_path):
    path, aligned_photo = tmp_path / "photo.png", align.align(discs(FACE), FACE, 200)
    with pytest.warns(UserWarning, match=r"not square \(300 x 200\)"):
        wide = Image.new("RGB", (300, 200), "red")
        wide.paste(aligned_photo, (50, 0))
        cut = align.load_photo(stored(wide), 200)
    aligned_photo.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (cut == align.load_photo(path, 200)).all()


class Detector:
    """In place of cv2.FaceDetectorYN: finds a small face, and a large one at the points of FACE, doubled."""

    def __init__(self, file, size):
        self.scale, self.size, self.file = size[0] / 2000, size, file

    def detect(self, image):
        assert image.shape == (self.size[1], self.size[0], 3) and image[0, 0].tolist() == [3, 2, 1]  # BGR
        if self.file == "blind":
            return 0, None
        large = np.concatenate([[0, 0, 500, 500], 2 * np.array(FACE).flatten(), [0.9]]) * self.scale
        return 1, np.stack([np.full(15, 5), large]).astype(np.float32)


def test_the_detector_gives_the_points_of_the_largest_face(monkeypatch):
    factory = types.SimpleNamespace(create=lambda file, config, size, score: Detector(file, size))
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(FaceDetectorYN=factory))
    photo = Image.new("RGB", (2000, 1600), (1, 2, 3))
    assert np.abs(align.detect_points(photo, "yunet.onnx") - 2 * np.array(FACE)).max() < 0.01
    with pytest.raises(ValueError, match="no face was found in the photo of 2000 x 1600"):
        align.detect_points(photo, "blind")


def test_without_a_detector_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(align, "detector_file", lambda: None)
    with pytest.raises(ValueError, match=r"OpenCV .*cfclip fetch ffhq --all.*five points"):
        align.detect_points(Image.new("RGB", (8, 8)))


def test_only_the_documented_detector_is_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(align, "find_spec", lambda name: object())
    assert align.detector_file(tmp_path) is None
    (source,) = (s for s in sources.SOURCES if s.role == "detector")
    for content, words in (
        (b"\x08\x06other", "not the documented file"),
        (b"version https://git-lfs.github.com/spec/v1", "pointer|Git LFS"),
    ):
        (tmp_path / source.name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            align.detector_file(tmp_path)
