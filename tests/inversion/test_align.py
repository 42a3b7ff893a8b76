"""Reading and aligning photos: against numbers computed by hand, drawn discs, and files of every kind."""

import io
import os
import struct
import subprocess
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from cfclip.checkpoints import sources
from cfclip.inversion import align

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


def read_photo(file):
    return align.read_photo(file)[0]


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
        (b"", r"is empty \(0 bytes\): copy or download it again"),
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


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.png").write_text("words", encoding="utf-8")
    with (tmp_path / "text.png").open(encoding="utf-8") as as_text:
        for file, words in (
            (tmp_path / "nowhere.png", r"nowhere\.png does not exist: check the path"),
            ("", "the empty path does not exist"),
            ("a\0b.png", "does not exist"),
            ("x" * 5000, "does not exist"),
            (tmp_path, "is a folder: give the path of a photo in it"),
            (str(tmp_path), "is a folder"),
            (tmp_path / "pipe", "pipe is not a file"),  # opening it would wait for ever
            (None, "must be a path, or a file opened with mode 'rb', not None"),
            (stored(COLOUR).read(), "must be a path"),
            (COLOUR, "must be a path"),
            (as_text, "opened with mode 'rb'"),
        ):
            with pytest.raises(ValueError, match=words):
                read_photo(file)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    stored_file = tmp_path / "photo.png"
    COLOUR.save(stored_file)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)  # as root one may read everything
    with pytest.raises(ValueError, match=r"photo\.png may not be read: change its permissions"):
        read_photo(stored_file)


def png(width, height, depth=8, kind=2, data=b""):
    """A PNG of any size in a few bytes."""
    size = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg(width, height, progressive=False):
    """A JPEG of 16 x 16 pixels that claims another size."""
    content = stored(Image.new("RGB", (16, 16), "red"), "JPEG", progressive=progressive).read()
    marker = b"\xff\xc2" if progressive else b"\xff\xc0"
    at = content.index(marker) + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def webp(width, height):
    """A WebP that claims a canvas of this size."""
    canvas = b"\0" * 4 + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    inner = stored(COLOUR, "WEBP", lossless=True).read()[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "png": png(60000, 60000),
    "png, just too large": png(8000, 5001),
    "png, 16 bits grey": png(20000, 20000, 16, 0),
    "png, palette": png(2**31 - 1, 2**31 - 1, 8, 3),
    "png, one row": png(2**31 - 1, 1),
    "png, unpacks": png(30000, 30000, 8, 0, zlib.compress(bytes(30001 * 1000))),
    "jpeg": jpeg(65000, 65000),
    "jpeg, one row": jpeg(65000, 2600),
    "jpeg, progressive": jpeg(8000, 5001, progressive=True),
    "webp": webp(16383, 16383),
}


def test_a_file_that_claims_a_huge_size_costs_neither_memory_nor_time(tmp_path):
    for name, content in BOMBS.items():
        (tmp_path / name).write_bytes(content)
    code = """
import resource, sys, time
from cfclip.inversion.align import read_photo
for path in sys.argv[1:]:
    peak, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_photo(path)
    except ValueError as error:
        print(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 50_000, f"{path}: {grown} kB"
    assert time.process_time() - begun < 1, path
"""
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in BOMBS)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    for name, line in zip(BOMBS, lines, strict=True):
        words = "claims to have more than 40 million pixels: shrink it first"
        assert line == f"{tmp_path / name} {words}"


def test_a_large_jpeg_is_halved_while_it_is_decoded(monkeypatch):
    photo = discs(FACE)
    monkeypatch.setattr(align, "MAX_PIXELS", 500 * 400)
    for form in ("JPEG", "MPO"):
        read = read_photo(stored(photo, form, quality=95, subsampling=0))
        assert read.size == (500, 400)
        assert np.abs(centres(read) - (np.array(FACE) - 0.5) / 2).max() < 0.5
    monkeypatch.setattr(align, "MAX_PIXELS", 500 * 400 - 1)
    for options in ({}, {"progressive": True}):
        with pytest.raises(ValueError, match="shrink it first"):
            read_photo(stored(photo, "JPEG", **options))
    monkeypatch.setattr(align, "MAX_PIXELS", 1000 * 800 - 1)
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"progressive": True})):
        with pytest.raises(ValueError, match="shrink it first"):
            read_photo(stored(photo, form, **options))


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_points_of_a_halved_photo_are_those_of_the_photo(monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {1: lambda image: image, 6: lambda image: image.transpose(Image.Transpose.ROTATE_90)}[orientation]
    content = stored(turn(discs(FACE)), "JPEG", exif=exif, **JPEG).read()
    whole = align.load_photo(io.BytesIO(content), 64, FACE)
    monkeypatch.setattr(align, "MAX_PIXELS", 300_000)
    halved = align.load_photo(io.BytesIO(content), 64, FACE)
    assert (whole - halved).abs().mean() < 0.02 and not (whole == halved).all()
    with pytest.raises(ValueError, match="outside the picture of 1000 x 800"):
        align.load_photo(io.BytesIO(content), 64, [*FACE[:4], [1003, 10]])


FRACTIONS = np.array(FACE) / (1000, 800)


@pytest.mark.parametrize(
    "points", [FRACTIONS, FRACTIONS.tolist(), 2 * FRACTIONS - 1, np.clip(1.4 * FRACTIONS, 0, 1)]
)
def test_points_as_fractions_are_told_to_be_pixels(points):
    with pytest.raises(
        ValueError, match=r"fractions .* must be pixels: multiply each x by the photo's width"
    ):
        align.load_photo(stored(discs(FACE)), 64, points)


@pytest.mark.parametrize("points", [None, 5, 0.5, True])
def test_points_that_are_no_list_say_what_to_give(points):
    with pytest.raises(ValueError, match=r"points must be five .*, or \[\] for a photo that is aligned"):
        align.load_photo(stored(discs(FACE)), 64, points)


@pytest.mark.parametrize("points", ["[[1, 2]]", {"left eye": [1, 2]}, [[10**400, 1]] * 5, [None] * 5, [1, 2]])
def test_points_of_a_wrong_type_are_named(points):
    with pytest.raises(ValueError, match=r"points must be five \[x, y\] pairs"):
        align.load_photo(stored(discs(FACE)), 64, points)


SMALL = turned(FACE, 0, scale=0.1)


@pytest.mark.parametrize(
    ("photo", "points", "size", "side"),
    [
        (Image.new("RGB", (20, 20)), (), 1024, 20),
        (Image.new("RGB", (31, 31)), (), 64, 31),
        (discs(SMALL), SMALL, 161, 80),  # the side of the square, as in aligned()
    ],
)
def test_a_photo_far_smaller_than_the_generator_is_a_warning(photo, points, size, side):
    words = f"only {side} pixels wide, but the generator draws {size}.*use a larger photo"
    with pytest.warns(UserWarning, match=words):
        align.load_photo(stored(photo), size, points)


def test_a_photo_that_is_large_enough_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        align.load_photo(stored(Image.new("RGB", (32, 32))), 64)
        align.load_photo(stored(discs(SMALL)), 160, SMALL)


def test_every_16_bit_grey_is_rounded_to_the_nearest_of_8_bits():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(read_back(Image.fromarray(every))[..., 0], np.rint(every / 257.0))


def test_a_photo_becomes_a_tensor(tmp_path):
    path, image = tmp_path / "photo.png", align.align(discs(FACE), FACE, 64)
    discs(FACE).save(path)
    x = align.load_photo(path, 64, FACE)
    assert x.shape == (1, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(((x[0].permute(1, 2, 0).numpy() + 1) * 127.5).round(), np.asarray(image))
    Image.new("RGB", (8, 8), "red").save(path)
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
    monkeypatch.setattr(align, "detector_file", lambda: "yunet.onnx")
    assert np.abs(align.detect_points(photo) - 2 * np.array(FACE)).max() < 0.01
    monkeypatch.setattr(align, "detector_file", lambda: "blind")
    with pytest.raises(ValueError, match="no face was found in the photo of 2000 x 1600"):
        align.detect_points(photo)


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
