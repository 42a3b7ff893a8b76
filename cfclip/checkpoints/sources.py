"""Files that this repository cannot contain: where they come from, how to get them, whether a copy is good.

They are kept in ``data/downloads``. :func:`fetch` downloads the files that have a URL, :func:`check` reports
which files are there. Most authors publish no checksum. For their files, the checksum of the first copy that
opens is recorded in ``checksums.json`` beside it, and must not change from then on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import requests
from tqdm.auto import tqdm

from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.latents import load_latents
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.networks import (
    ALEXNET,
    ALEXNET_URL,
    OPENAI_SHA256,
    load_e4e,
    load_identity,
    load_openai_clip,
    load_vgg,
)
from cfclip.checkpoints.reading import read_torch, sniff
from cfclip.checkpoints.weights import WeightsError
from cfclip.files import DOWNLOADS, locked, sha256, write_json

RECORDED = "checksums.json"

FFHQ, DOG, CAT = "ffhq", "afhq-dog", "afhq-cat"
PAPER = (FFHQ, DOG, CAT)


@dataclass(frozen=True)
class Source:
    """One external file. One file per role is enough; the first of a role is preferred."""

    name: str  # in data/downloads
    role: str  # a key of OPENERS
    what: str
    domains: tuple[str, ...] = (FFHQ,)
    urls: tuple[str, ...] = ()  # tried in order
    page: str = ""  # where to get it in a browser (Google Drive asks for confirmation)
    sha256: str | None = None  # None: its authors publish none, and no two copies could be compared
    sha256_from: str = ""  # where sha256 comes from
    exact: bool = True  # False: other exports of the same network are in use and equally good
    required: bool = True
    limit: int = 2 << 30  # bytes; a larger download cannot be the file

    def how(self, folder: Path, domain: str = "") -> str:
        """Instructions for getting the file for ``domain``."""
        place = folder / self.name
        by_hand = f"open {self.page} in a browser and put the file at {place}"
        if not self.urls:
            return f"only by hand: {by_hand}"
        command = f"cfclip fetch {domain or self.domains[0]}{'' if self.required else ' --all'}"
        return f"{command}, or download {self.urls[0]} to {place}{f', or {by_hand}' if self.page else ''}"


OptionalSource = partial(Source, required=False)

HUGGING_FACE = "https://huggingface.co"
NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"
DRIVE = "https://drive.google.com"
YUNET = "face_detection_yunet_2023mar.onnx"
MAPPERS_PAGE = f"{DRIVE}/drive/folders/1GxwCtTCgVG9nUkkVTOTyES7lWw5zhHQ7"
TWO_COPIES = "two independent copies agree"


def _drive(key: str) -> str:
    return f"{DRIVE}/file/d/{key}/view"


def _afhq(animal: str) -> Source:
    what = f"StyleGAN2-ADA, AFHQ {animal}s, 512²: the paper's TensorFlow file, or NVIDIA's PyTorch files"
    urls = (
        f"{NVIDIA}/stylegan2-ada/pretrained/afhq{animal}.pkl",
        f"{NVIDIA}/stylegan2-ada-pytorch/pretrained/afhq{animal}.pkl",
        "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan2/versions/1/files/"
        f"stylegan2-afhq{animal}-512x512.pkl",
    )
    return Source(f"afhq{animal}.pkl", "generator", what, (f"afhq-{animal}",), urls)


def _openai(model: str, role: str, what: str, required: bool) -> Source:
    digest = OPENAI_SHA256[f"{model}-quickgelu"]
    urls = (f"https://openaipublic.azureedge.net/clip/models/{digest}/{model}.pt",)
    checksum = {"sha256": digest, "sha256_from": "OpenAI: it is part of the address"}
    return Source(f"{model}.pt", role, what, PAPER, urls, required=required, **checksum)


def _latents(split: str, key: str) -> Source:
    photos = "training" if split == "train" else split
    what = f"CelebA-HQ's {photos} photos, inverted by e4e; without it latents are sampled"
    return OptionalSource(f"{split}_faces.pt", f"{split} latents", what, page=_drive(key))


SOURCES = (
    Source(
        "stylegan2-ffhq-config-f.pkl",
        "generator",
        "StyleGAN2 config-f, FFHQ, 1024² (TensorFlow)",
        urls=(
            f"{NVIDIA}/stylegan2/networks/stylegan2-ffhq-config-f.pkl",
            "http://d36zk2xti64re0.cloudfront.net/stylegan2/networks/stylegan2-ffhq-config-f.pkl",
        ),
        page=f"{DRIVE}/open?id=1Mgh-jglZjgksupF0XLl0KzuOqd1LXcoE",
    ),
    Source(
        "stylegan2-ffhq-config-f.pt",
        "generator",
        "the same network as rosinality's code stores it; CF-CLIP's own code loads this one",
        urls=(f"{HUGGING_FACE}/akhaliq/OneshotCLIP-stylegan2-ffhq/resolve/main/stylegan2-ffhq-config-f.pt",),
        page=_drive("1EM87UquaoQmk17Q8d5kYIAHqu0dkYqdT"),
        sha256="bae494ef77e32a9cd1792a81a3c167692a0e64f6bcd8b06592ff42917e2ed46e",
        sha256_from=f"{TWO_COPIES}; smaller exports without the discriminator are in use too",
        exact=False,
    ),
    _afhq("dog"),
    _afhq("cat"),
    _openai("ViT-B-32", "clip", "OpenAI's CLIP ViT-B/32 (354 MB)", required=True),
    Source(
        "ViT-B-32-openai.safetensors",
        "clip",
        "the same network as open_clip stores it",
        PAPER,
        (f"{HUGGING_FACE}/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors",),
    ),
    _openai(
        "ViT-B-16",
        "held-out clip",
        "OpenAI's CLIP ViT-B/16 (351 MB), to judge edits; the second guide if ViT-L/14 is here",
        required=False,
    ),
    _openai(
        "ViT-L-14",
        "third clip",
        "OpenAI's CLIP ViT-L/14 (890 MB), only to judge edits; with it ViT-B/16 is the second guide",
        required=False,
    ),
    Source(
        "model_ir_se50.pth",
        "identity",
        "ArcFace IR-SE50, the identity loss",
        urls=(
            "https://github.com/xinntao/facexlib/releases/download/v0.1.0/recognition_arcface_ir_se50.pth",
            "https://www.dropbox.com/s/kzo52d9neybjxsb/model_ir_se50.pth?dl=1",
        ),
        page=_drive("1KW7bjndL3QG3sxBbZxreGHigcCCpsDgn"),
        sha256="a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
        sha256_from="many independent copies agree",
    ),
    Source(
        "vgg19_conv.pth",
        "perceptual",
        "VGG19 from Caffe, the perceptual loss",
        (DOG, CAT),
        page=_drive("1fp7DAiXdf0Ay-jANb8f0RHYLTRyjNv4m"),
    ),
    _latents("train", "1gof8kYc_gDLUT4wQlmUdAtPnQIlCO26q"),
    _latents("test", "1j7RIfmrCoisxx3t-r-KC02Qc8barBecr"),
    OptionalSource(
        "e4e_ffhq_encode.pt",
        "encoder",
        "e4e: an aligned photo of 256² to W+ (1.2 GB)",
        urls=(
            f"{HUGGING_FACE}/zhengchong/e4e/resolve/main/e4e_ffhq_encode.pt",
            f"{HUGGING_FACE}/wmpscc/StyleGene/resolve/main/e4e_ffhq_encode.pt",
        ),
        page=_drive("1cUv_reLE6k3604or78EranS7XzuVMWeO"),
        sha256="2ace1d9a8c05c10a399bcd500b8dda118f759ff1aac89dbdab7435f2136a0999",
        sha256_from=TWO_COPIES,
        exact=False,
    ),
    OptionalSource(
        YUNET,
        "detector",
        "OpenCV's YuNet: finds the five points by which a photo is aligned",
        urls=(
            f"https://github.com/opencv/opencv_zoo/raw/main/models/face_detection_yunet/{YUNET}",
            f"{HUGGING_FACE}/opencv/face_detection_yunet/resolve/main/{YUNET}",
        ),
        sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        sha256_from="OpenCV's repository, in the file's Git LFS pointer",
    ),
    OptionalSource("green_lipstick.pt", "mapper", "one of the paper's mappers", page=MAPPERS_PAGE),
    OptionalSource("tiger_stripes.pt", "mapper", "one of the paper's mappers", (DOG,), page=MAPPERS_PAGE),
    OptionalSource(
        ALEXNET,
        "lpips",
        "torchvision's AlexNet: LPIPS as published; without it another perceptual distance is used",
        ("toonfaces", *PAPER),
        (ALEXNET_URL,),
    ),
)


def check_onnx(path: Path) -> None:
    """WeightsError unless the file begins like ONNX, a protobuf whose first field is the version."""
    with path.open("rb") as file:
        is_onnx = file.read(1) == b"\x08"
    if not is_onnx:
        raise WeightsError(f"{path} holds {sniff(path)}, but an ONNX network is needed")


OPENERS: dict[str, Callable[[Path], object]] = {
    "generator": load_generator,
    "clip": load_openai_clip,
    "held-out clip": partial(load_openai_clip, model="ViT-B-16-quickgelu"),
    "third clip": partial(load_openai_clip, model="ViT-L-14-quickgelu"),
    "identity": load_identity,
    "perceptual": load_vgg,
    "encoder": load_e4e,
    "train latents": load_latents,
    "test latents": load_latents,
    "mapper": load_mapper,
    "lpips": read_torch,
    "detector": check_onnx,
}
"""role -> function that opens such a file safely and raises WeightsError for any other file."""


@dataclass(frozen=True)
class Row:
    """The state of one file.

    status: "valid" (has the documented checksum; is not opened), "unverified" (opens, or is unchanged since
    it did, but no documented checksum confirms it), "missing" or "corrupt".
    """

    source: Source
    status: str
    path: Path
    detail: str  # why, and what to do

    @property
    def good(self) -> bool:
        return self.status in ("valid", "unverified")


def sources_of(domain: str) -> list[Source]:
    """The files of ``domain``; ValueError if it has none."""
    if sources := [source for source in SOURCES if domain in source.domains]:
        return sources
    known = dict.fromkeys(name for source in SOURCES for name in source.domains)
    raise ValueError(f"no files are known for domain {domain!r}; there are: {', '.join(known)}")


def roles_of(domain: str) -> dict[str, list[Source]]:
    """role -> the files that can fill it, first choice first."""
    roles: dict[str, list[Source]] = {}
    for source in sources_of(domain):
        roles.setdefault(source.role, []).append(source)
    return roles


def elsewhere(source: Source) -> Path | None:
    """The path of a copy that open_clip or OpenAI's clip package has downloaded, or None."""
    if source.role not in ("clip", "held-out clip"):  # ViT-L/14 changes which CLIP judges: never by accident
        return None
    if source.name.endswith(".pt"):
        path = Path.home() / ".cache" / "clip" / source.name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache  # slow to import, and needed only here

    path = try_to_load_from_cache("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
    return Path(path) if isinstance(path, str) else None


def locate(source: Source, folder: Path = DOWNLOADS) -> Path | None:
    """The path of ``source`` in ``folder``, otherwise in another tool's cache; None if it is in neither."""
    path = folder / source.name
    return path if path.exists() else elsewhere(source)


def require(domain: str, folder: Path = DOWNLOADS) -> dict[str, Path]:
    """role -> path of the first file that is there, for every role that has one.

    If required files are missing, one WeightsError names them all and says how to get them.
    """
    paths, missing = {}, []
    for role, options in roles_of(domain).items():
        if path := next(filter(None, (locate(source, folder) for source in options)), None):
            paths[role] = path
        elif any(source.required for source in options):
            ways = [f"{source.name}: {source.how(folder, domain)}" for source in options]
            missing.append(f"\n  {role}: " + ",\n    or ".join(ways))
    if missing:
        problem = f"domain {domain} needs files that are not in {folder} (see 'cfclip check {domain}'):"
        raise WeightsError(problem + "".join(missing))
    return paths


def recorded(folder: Path) -> dict[str, str]:
    """File name -> its checksum when it first opened. WeightsError if the record is damaged."""
    path = folder / RECORDED
    if not path.exists():
        return {}
    try:
        checksums = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(digest) for name, digest in checksums.items()}
    except (ValueError, AttributeError):
        raise WeightsError(f"{path} is damaged: delete it, and every file will be opened again") from None


def inspect(source: Source, folder: Path = DOWNLOADS, domain: str = "") -> Row:
    """Check one file: its checksum and, if that does not decide, whether it opens in its role.

    The checksum of a file in ``folder`` that opens is recorded, unless it must be the documented one.
    """
    path, how = locate(source, folder), source.how(folder, domain)
    if path is None:
        return Row(source, "missing", folder / source.name, how)
    if not path.is_file():
        return Row(source, "corrupt", path, "is not a file")
    digest, known = sha256(path), recorded(folder)
    if digest == source.sha256:
        return Row(source, "valid", path, f"sha256 as documented ({source.sha256_from})")
    only_documented = source.sha256 is not None and source.exact
    in_folder = path.parent == folder  # a file in another tool's cache is not recorded
    before = known.get(source.name) if in_folder and not only_documented else None
    if before == digest:
        detail = "opened when it was new, unchanged since; no checksum is published for it"
        return Row(source, "unverified", path, detail)
    try:  # even if the checksum is already known to be wrong: "a web page" is a better message
        OPENERS[source.role](path)
    except WeightsError as error:
        return Row(source, "corrupt", path, f"{error}; {how}")
    if only_documented:
        detail = f"{path} is not the documented file: its sha256 is {digest}; {how}"
        return Row(source, "corrupt", path, detail)
    if before:
        line = f"its line in {folder / RECORDED}"
        detail = f"changed since its checksum was recorded; if you changed it, delete {line}"
        return Row(source, "corrupt", path, detail)
    if in_folder:
        write_json(folder / RECORDED, dict(sorted((known | {source.name: digest}).items())))
    detail = "opens; no checksum is published for it, so this one was recorded"
    if source.sha256:
        detail = "opens, but is not the copy documented here"
    return Row(source, "unverified", path, detail)


def check(domain: str, folder: Path = DOWNLOADS) -> list[Row]:
    """One row per file of ``domain``. Downloads nothing."""
    return [inspect(source, folder, domain) for source in sources_of(domain)]


def unmet(rows: list[Row]) -> list[str]:
    """The required roles that no good file fills."""
    filled = {row.source.role for row in rows if row.good}
    needed = dict.fromkeys(row.source.role for row in rows if row.source.required)
    return [role for role in needed if role not in filled]


def _resume(url: str, part: Path, limit: int, progress: bool) -> None:
    """Download ``url`` to ``part``, or continue an interrupted download of the same content.

    The server's mark of the content (ETag or date) is kept beside ``part``. It tells whether the bytes so far
    belong to the content that the server sends now. Without a mark they are deleted.
    Raises OSError, which includes the errors of requests.
    """
    mark_file = part.with_name(part.name + ".etag")
    headers = {"Accept-Encoding": "identity"}  # a compressed answer could not be continued
    before = mark_file.read_bytes() if part.exists() and mark_file.exists() else b""
    if before and before.isascii() and before.decode().isprintable():
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": before.decode()}
    else:
        _forget(part)
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        so_far = part.stat().st_size if part.exists() else 0
        continues = answer.headers.get("Content-Range", f"bytes {so_far}-").startswith(f"bytes {so_far}-")
        if so_far and (answer.status_code == 416 or (answer.status_code == 206 and not continues)):
            _forget(part)  # no bytes are left, or others are sent: the bytes so far cannot be verified
            return _resume(url, part, limit, progress)
        answer.raise_for_status()
        start = so_far if answer.status_code == 206 else 0
        size = answer.headers.get("Content-Length", "")
        total = start + int(size) if size.isdecimal() else None
        if total is not None and total > limit:
            _forget(part)
            raise OSError(f"it has {total:,} bytes, more than the {limit:,} that such a file may have")
        etag = answer.headers.get("ETag", "")
        mark = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")
        try:
            if mark:
                mark_file.write_text(mark, encoding="utf-8")
            look = {"unit": "B", "unit_scale": True, "desc": part.stem, "disable": not progress}
            with part.open("ab" if start else "wb") as file, tqdm(total=total, initial=start, **look) as bar:
                for chunk in answer.iter_content(1 << 16):  # an interruption loses at most this
                    if file.tell() + len(chunk) > limit:
                        mark = ""
                        raise OSError(f"it has more than the {limit:,} bytes that such a file may have")
                    file.write(chunk)
                    bar.update(len(chunk))
            if total is not None and (size := part.stat().st_size) != total:
                raise OSError(f"only {size} of {total} bytes arrived")
        except BaseException:  # also Ctrl-C
            if not mark:
                _forget(part)
            raise
    mark_file.unlink(missing_ok=True)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)


def _download(source: Source, url: str, folder: Path, progress: bool) -> Row:
    """Download one file from one URL. WeightsError if that fails or the file is bad; an old file stays."""
    path = folder / source.name
    part, bad = path.with_name(path.name + ".part"), (f"{path.name}.bad{i or ''}" for i in count())
    aside = next(free for free in map(path.with_name, bad) if not free.exists())
    try:
        _resume(url, part, source.limit, progress)
    except OSError as error:
        raise WeightsError(f"{url}: {str(error)[:200]}") from None
    if source.sha256 and sha256(part) != source.sha256:
        _forget(part)
        raise WeightsError(f"{url}: not the documented file (sha256 differs)")
    if path.exists():
        path.replace(aside)  # may be the user's own work: never deleted
    part.replace(path)
    row = inspect(source, folder)
    if row.good:
        return row
    path.unlink()
    if aside.exists():
        aside.replace(path)
    raise WeightsError(f"{url}: {row.detail}")


def fetch(domain: str, folder: Path = DOWNLOADS, optional: bool = False, progress: bool = True) -> list[Row]:
    """Download the required files (``optional``: all files) of ``domain`` that have a URL, one per role.

    A role that already has a good file is skipped. If a download fails, the next URL is tried, then the next
    file of the role. Returns the rows of :func:`check`; the row of a failed download says why.
    Raises FolderInUse if another process fetches into ``folder``.
    """
    with locked(folder, "fetch"):  # two downloads into one file would mix
        rows = {source.name: inspect(source, folder, domain) for source in sources_of(domain)}
        for options in roles_of(domain).values():
            for source in options:
                if any(rows[one.name].good for one in options):
                    break
                if source.urls and (source.required or optional):
                    rows[source.name] = _fetch_one(source, folder, domain, progress)
    return list(rows.values())


def _fetch_one(source: Source, folder: Path, domain: str, progress: bool) -> Row:
    failures = []
    for url in source.urls:
        try:
            return _download(source, url, folder, progress)
        except WeightsError as error:
            failures.append(str(error))
    detail = f"not downloaded: {'; '.join(failures)}; {source.how(folder, domain)}"
    return replace(inspect(source, folder, domain), detail=detail)


def table() -> str:
    """All sources as a Markdown table, for data/README.md."""
    lines = ["| file | what it is | domains | from | sha256 |", "|---|---|---|---|---|"]
    for s in SOURCES:
        places = [f"<{url}>" for url in s.urls] + ([f"by hand: <{s.page}>"] if s.page else [])
        digest = f"`{s.sha256}` ({s.sha256_from})" if s.sha256 else "none published: recorded on first use"
        role = s.role if s.required else f"{s.role} (optional)"
        cells = f"`{s.name}`", f"{role}: {s.what}", ", ".join(s.domains), "<br>".join(places), digest
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
