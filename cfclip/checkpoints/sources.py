"""Every file that this repository cannot contain: where it comes from, how to get it, whether the one that is there is good.

Files live in ``data/downloads``. ``fetch`` downloads what has a URL (pooch: checksum, progress; an interrupted download goes
on), ``check`` says what is there. Most authors publish no checksum: the one of a file that opened is recorded in
``checksums.json`` beside it the first time, and the file is held to that from then on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pooch
import requests
from tqdm.auto import tqdm

from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.latents import load_latents
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.networks import OPENAI_SHA256, load_e4e, load_identity, load_openai_clip, load_vgg
from cfclip.checkpoints.reading import read_torch, sniff
from cfclip.checkpoints.weights import WeightsError
from cfclip.files import DOWNLOADS, write_text

RECORDED = "checksums.json"

FFHQ, DOG, CAT = "ffhq", "afhq-dog", "afhq-cat"

PAPER = (FFHQ, DOG, CAT)


@dataclass(frozen=True)
class Source:
    """One external file. Files of one role replace each other: any of them will do, the first is the first choice."""

    name: str  # in data/downloads
    role: str  # a key of OPENERS
    what: str
    domains: tuple[str, ...]
    urls: tuple[str, ...] = ()  # tried in order
    page: str = ""  # where a person gets it in a browser (a drive asks for confirmation)
    sha256: str | None = None  # None: its authors publish none, and no two copies could be compared
    sha256_from: str = ""  # who says so
    exact: bool = True  # False: other exports of the same network are in use, and are no damage
    required: bool = True

    def how(self, folder: Path, domain: str = "") -> str:
        """How to get it, for people (who want it for ``domain``)."""
        by_hand = (
            f"open {self.page} in a browser and put the file at {folder / self.name}" if self.page else ""
        )
        if not self.urls:
            return f"only by hand: {by_hand}"
        command = f"cfclip fetch {domain or self.domains[0]}{'' if self.required else ' --all'}"
        return f"{command}, or download {self.urls[0]} to {folder / self.name}" + (
            f", or {by_hand}" if by_hand else ""
        )


def _drive(key: str) -> str:
    return f"https://drive.google.com/file/d/{key}/view"


def _openai(model: str) -> str:
    return f"https://openaipublic.azureedge.net/clip/models/{OPENAI_SHA256[f'{model}-quickgelu']}/{model}.pt"


def _afhq(animal: str) -> Source:
    return Source(
        f"afhq{animal}.pkl",
        "generator",
        f"StyleGAN2-ADA, AFHQ {animal}s, 512²; after the paper's TensorFlow file NVIDIA's PyTorch ones",
        (f"afhq-{animal}",),
        (
            f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada/pretrained/afhq{animal}.pkl",
            f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/afhq{animal}.pkl",
            "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan2/versions/1/files/"
            f"stylegan2-afhq{animal}-512x512.pkl",
        ),
    )


IN_ADDRESS = "OpenAI: it is part of the address"

SOURCES = (
    Source(
        "stylegan2-ffhq-config-f.pkl",
        "generator",
        "StyleGAN2 config-f, FFHQ, 1024² (TensorFlow)",
        (FFHQ,),
        (
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2/networks/stylegan2-ffhq-config-f.pkl",
            "http://d36zk2xti64re0.cloudfront.net/stylegan2/networks/stylegan2-ffhq-config-f.pkl",
        ),
        page="https://drive.google.com/open?id=1Mgh-jglZjgksupF0XLl0KzuOqd1LXcoE",
    ),
    Source(
        "stylegan2-ffhq-config-f.pt",
        "generator",
        "the same network as rosinality's code stores it: what CF-CLIP itself loads",
        (FFHQ,),
        (
            "https://huggingface.co/akhaliq/OneshotCLIP-stylegan2-ffhq/resolve/main/stylegan2-ffhq-config-f.pt",
        ),
        page=_drive("1EM87UquaoQmk17Q8d5kYIAHqu0dkYqdT"),
        sha256="bae494ef77e32a9cd1792a81a3c167692a0e64f6bcd8b06592ff42917e2ed46e",
        sha256_from="two independent copies agree; smaller exports, without the discriminator, are in use too",
        exact=False,
    ),
    _afhq("dog"),
    _afhq("cat"),
    Source(
        "ViT-B-32.pt",
        "clip",
        "OpenAI's CLIP ViT-B/32 (354 MB)",
        PAPER,
        (_openai("ViT-B-32"),),
        sha256=OPENAI_SHA256["ViT-B-32-quickgelu"],
        sha256_from=IN_ADDRESS,
    ),
    Source(
        "ViT-B-32-openai.safetensors",
        "clip",
        "the same network as open_clip stores it",
        PAPER,
        (
            "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors",
        ),
    ),
    Source(
        "ViT-B-16.pt",
        "held-out clip",
        "OpenAI's CLIP ViT-B/16 (351 MB): a judge that no edit was optimised for",
        PAPER,
        (_openai("ViT-B-16"),),
        sha256=OPENAI_SHA256["ViT-B-16-quickgelu"],
        sha256_from=IN_ADDRESS,
        required=False,
    ),
    Source(
        "model_ir_se50.pth",
        "identity",
        "ArcFace IR-SE50, the identity loss",
        (FFHQ,),
        (
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
    Source(
        "train_faces.pt",
        "train latents",
        "CelebA-HQ's training photos, inverted by e4e; without it latents are sampled",
        (FFHQ,),
        page=_drive("1gof8kYc_gDLUT4wQlmUdAtPnQIlCO26q"),
        required=False,
    ),
    Source(
        "test_faces.pt",
        "test latents",
        "CelebA-HQ's test photos, inverted by e4e; without it latents are sampled",
        (FFHQ,),
        page=_drive("1j7RIfmrCoisxx3t-r-KC02Qc8barBecr"),
        required=False,
    ),
    Source(
        "e4e_ffhq_encode.pt",
        "encoder",
        "e4e: an aligned photo of 256² to W+ (1.2 GB)",
        (FFHQ,),
        (
            "https://huggingface.co/zhengchong/e4e/resolve/main/e4e_ffhq_encode.pt",
            "https://huggingface.co/wmpscc/StyleGene/resolve/main/e4e_ffhq_encode.pt",
        ),
        page=_drive("1cUv_reLE6k3604or78EranS7XzuVMWeO"),
        sha256="2ace1d9a8c05c10a399bcd500b8dda118f759ff1aac89dbdab7435f2136a0999",
        sha256_from="two independent copies agree",
        exact=False,
        required=False,
    ),
    Source(
        "face_detection_yunet_2023mar.onnx",
        "detector",
        "OpenCV's YuNet: finds the five points that a photo is aligned by",
        (FFHQ,),
        (
            "https://github.com/opencv/opencv_zoo/raw/main/models/face_detection_yunet/face_detection_yunet_2023mar.onnx",
            "https://huggingface.co/opencv/face_detection_yunet/resolve/main/face_detection_yunet_2023mar.onnx",
        ),
        sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        sha256_from="OpenCV's repository, in the file's Git LFS pointer",
        required=False,
    ),
    Source(
        "green_lipstick.pt",
        "mapper",
        "one of the paper's trained mappers; the others are in the same folder",
        (FFHQ,),
        page="https://drive.google.com/drive/folders/1GxwCtTCgVG9nUkkVTOTyES7lWw5zhHQ7",
        required=False,
    ),
    Source(
        "tiger_stripes.pt",
        "mapper",
        "one of the paper's trained mappers for dogs",
        (DOG,),
        page="https://drive.google.com/drive/folders/1GxwCtTCgVG9nUkkVTOTyES7lWw5zhHQ7",
        required=False,
    ),
    Source(
        "alexnet-owt-7be5be79.pth",
        "lpips",
        "torchvision's AlexNet: LPIPS as published; without it another perceptual distance is used",
        ("toonfaces", *PAPER),
        ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",),
        required=False,
    ),
)


def check_onnx(path: Path) -> None:
    """WeightsError unless it begins as ONNX does (a protobuf whose first field is the version); nothing is parsed."""
    with path.open("rb") as file:
        head = file.read(1)
    if head != b"\x08":
        raise WeightsError(f"{path} holds {sniff(path)}, where an ONNX network is needed")


OPENERS: dict[str, Callable[[Path], object]] = {
    "generator": load_generator,
    "clip": load_openai_clip,
    "held-out clip": partial(load_openai_clip, model="ViT-B-16-quickgelu"),
    "identity": load_identity,
    "perceptual": load_vgg,
    "encoder": load_e4e,
    "train latents": load_latents,
    "test latents": load_latents,
    "mapper": load_mapper,
    "lpips": read_torch,
    "detector": check_onnx,
}
"""role -> what opens such a file, safely; raises WeightsError for any other file."""


@dataclass(frozen=True)
class Row:
    """What is known of one file.

    status: "valid" (opens, and is the documented file), "unverified" (opens, but no documented checksum says that it is the
    right file), "missing" or "corrupt".
    """

    source: Source
    status: str
    path: Path
    detail: str  # why, and what to do

    @property
    def good(self) -> bool:
        return self.status in ("valid", "unverified")


def sources_of(domain: str) -> list[Source]:
    """The rows of the table for ``domain``; ValueError for a domain that has none."""
    if found := [source for source in SOURCES if domain in source.domains]:
        return found
    known = dict.fromkeys(name for source in SOURCES for name in source.domains)
    raise ValueError(f"no files are known for domain {domain!r}; there are: {', '.join(known)}")


def roles_of(domain: str) -> dict[str, list[Source]]:
    """role -> the files that can fill it, first choice first."""
    roles: dict[str, list[Source]] = {}
    for source in sources_of(domain):
        roles.setdefault(source.role, []).append(source)
    return roles


def elsewhere(source: Source) -> Path | None:
    """A copy that open_clip or OpenAI's clip package downloaded before."""
    if source.role not in ("clip", "held-out clip"):
        return None
    if source.name in ("ViT-B-32.pt", "ViT-B-16.pt"):
        path = Path.home() / ".cache" / "clip" / source.name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
    return Path(found) if isinstance(found, str) else None


def locate(source: Source, folder: Path = DOWNLOADS) -> Path | None:
    """Where ``source`` is: in ``folder``, else in another tool's cache; None if it is nowhere."""
    path = folder / source.name
    return path if path.exists() else elsewhere(source)


def require(domain: str, folder: Path = DOWNLOADS) -> dict[str, Path]:
    """role -> file, of all that is there; one WeightsError that names every required file that is not, and how to get it."""
    found, missing = {}, []
    for role, options in roles_of(domain).items():
        path = next((path for source in options if (path := locate(source, folder))), None)
        if path:
            found[role] = path
        elif any(source.required for source in options):
            missing.append(
                f"  {role}: "
                + ",\n    or ".join(f"{source.name}: {source.how(folder, domain)}" for source in options)
            )
    if missing:
        raise WeightsError(
            f"domain {domain} needs files that are not in {folder} (see 'cfclip check {domain}'):\n"
            + "\n".join(missing)
        )
    return found


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded(folder: Path) -> dict[str, str]:
    """File name -> the checksum it had when it first opened. WeightsError if the record is damaged."""
    path = folder / RECORDED
    if not path.exists():
        return {}
    try:
        return {str(name): str(digest) for name, digest in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError):
        raise WeightsError(f"{path} is damaged: delete it, and the files are looked at anew") from None


def _record(folder: Path, entries: Mapping[str, str]) -> None:
    write_text(folder / RECORDED, json.dumps(entries, indent=1, sort_keys=True) + "\n")


def inspect(source: Source, folder: Path = DOWNLOADS, domain: str = "") -> Row:
    """Look at one file: checksum, and (where that does not settle it) whether it opens as what it should be.

    The checksum of a file that opens is recorded when there is no documented one.
    """
    path = locate(source, folder)
    if path is None:
        return Row(source, "missing", folder / source.name, source.how(folder, domain))
    if not path.is_file():
        return Row(source, "corrupt", path, "is no file")
    digest, known = sha256(path), recorded(folder)
    if digest == source.sha256:
        return Row(source, "valid", path, f"sha256 as documented ({source.sha256_from})")
    before = known.get(source.name) if path.parent == folder else None
    if source.sha256 is None or not source.exact:
        if before == digest:
            return Row(
                source,
                "unverified",
                path,
                "opened when it was new, unchanged since; no checksum is published for it",
            )
        try:
            OPENERS[source.role](path)
        except WeightsError as error:
            return Row(source, "corrupt", path, f"{error}; {source.how(folder, domain)}")
        if before:
            return Row(
                source,
                "corrupt",
                path,
                "changed since its checksum was recorded; if that was you, delete its line in "
                f"{folder / RECORDED}",
            )
        if path.parent == folder:
            _record(folder, known | {source.name: digest})
        return Row(
            source,
            "unverified",
            path,
            "opens, but is not the copy documented here"
            if source.sha256
            else "opens; no checksum is published for it, so this one was recorded",
        )
    try:  # a page or a pointer is a better reason than a wrong checksum
        OPENERS[source.role](path)
        why = f"{path} is not the documented file: its sha256 is {digest}"
    except WeightsError as error:
        why = str(error)
    return Row(source, "corrupt", path, f"{why}; {source.how(folder, domain)}")


def check(domain: str, folder: Path = DOWNLOADS) -> list[Row]:
    """A row per file of ``domain``. Downloads nothing."""
    return [inspect(source, folder, domain) for source in sources_of(domain)]


def unmet(rows: list[Row]) -> list[str]:
    """The required roles that no good file fills."""
    needed = dict.fromkeys(row.source.role for row in rows if row.source.required)
    return [role for role in needed if not any(row.good for row in rows if row.source.role == role)]


@dataclass(frozen=True)
class Resume:
    """A pooch downloader that goes on where an interrupted download of the same content stopped.

    What has come is kept as ``part``; the server's mark of the content (ETag or date) beside it says whether it still fits.
    """

    part: Path
    progress: bool = True

    def __call__(self, url: str, output_file: str, pooch: object = None) -> None:
        mark_file = self.part.with_name(self.part.name + ".etag")
        headers = {"Accept-Encoding": "identity"}  # a compressed answer could not be continued
        if self.part.exists() and mark_file.exists():
            headers |= {"Range": f"bytes={self.part.stat().st_size}-", "If-Range": mark_file.read_text()}
        with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
            if answer.status_code == 416:  # nothing is left to send: what is here cannot be judged
                self.part.unlink()
                return self(url, output_file)
            answer.raise_for_status()
            etag = answer.headers.get("ETag", "")
            mark = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")
            if mark:
                mark_file.write_text(mark)
            else:
                mark_file.unlink(missing_ok=True)
            start = self.part.stat().st_size if answer.status_code == 206 else 0
            size = answer.headers.get("Content-Length")
            total = start + int(size) if size else None
            with (
                self.part.open("ab" if start else "wb") as file,
                tqdm(
                    total=total,
                    initial=start,
                    unit="B",
                    unit_scale=True,
                    desc=self.part.stem,
                    disable=not self.progress,
                ) as bar,
            ):
                for chunk in answer.iter_content(1 << 16):  # what an interruption may lose
                    file.write(chunk)
                    bar.update(len(chunk))
        if total is not None and self.part.stat().st_size != total:
            raise OSError(f"{self.part.stat().st_size} of {total} bytes came")
        mark_file.unlink(missing_ok=True)
        os.replace(self.part, output_file)


def _download(source: Source, url: str, folder: Path, progress: bool) -> Row:
    """One file from one address; WeightsError if it is not to be had or not what it should be: then the folder is as before."""
    pooch.get_logger().setLevel("WARNING")  # it would advise on known_hash
    path, known = folder / source.name, recorded(folder)
    aside = path.with_name(path.name + ".bad")
    if path.exists():
        path.replace(aside)  # may be somebody's own: never deleted
    try:
        pooch.retrieve(
            url,
            f"sha256:{source.sha256}" if source.sha256 else None,
            source.name,
            folder,
            downloader=Resume(folder / f"{source.name}.part", progress),
        )
        _record(folder, {name: digest for name, digest in known.items() if name != source.name})
        row = inspect(source, folder)
        if row.good:
            return row
        problem = row.detail
    except (requests.exceptions.RequestException, OSError) as error:
        problem = str(error)[:200]
    except ValueError:  # pooch's, for a wrong checksum
        problem = "another file than the documented one (sha256 differs)"
    path.unlink(missing_ok=True)
    _record(folder, known)
    if aside.exists():
        aside.replace(path)
    raise WeightsError(f"{url}: {problem}")


def fetch(domain: str, folder: Path = DOWNLOADS, optional: bool = False, progress: bool = True) -> list[Row]:
    """Download what ``domain`` needs (``optional``: and what it can use) and has a URL; one file per role, the next if one fails.

    Returns the rows of :func:`check`; for what failed they say why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {source.name: inspect(source, folder, domain) for source in sources_of(domain)}
    for options in roles_of(domain).values():
        if any(rows[source.name].good for source in options):
            continue
        for source in (s for s in options if s.urls and (s.required or optional)):
            failures = []
            for url in source.urls:
                try:
                    rows[source.name] = _download(source, url, folder, progress)
                    break
                except WeightsError as error:
                    failures.append(str(error))
            if rows[source.name].good:
                break
            why = "; ".join(failures)
            rows[source.name] = replace(
                inspect(source, folder, domain), detail=f"not downloaded: {why}; {source.how(folder, domain)}"
            )
    return list(rows.values())


def table() -> str:
    """Every source as a Markdown table: the text of data/README.md."""
    lines = ["| file | what it is | domains | from | sha256 |", "|---|---|---|---|---|"]
    for s in SOURCES:
        places = [f"<{url}>" for url in s.urls] + ([f"by hand: <{s.page}>"] if s.page else [])
        digest = f"`{s.sha256}` ({s.sha256_from})" if s.sha256 else "none published: recorded on first use"
        role = s.role if s.required else f"{s.role} (optional)"
        lines.append(
            f"| `{s.name}` | {role}: {s.what} | {', '.join(s.domains)} | {'<br>'.join(places)} | {digest} |"
        )
    return "\n".join(lines)
