"""The embedded domain, from the weights committed in ``data/toonfaces``; a wheel takes them along."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from cfclip.checkpoints import weights
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.sources import Row, Source
from cfclip.domain import Domain
from cfclip.files import DATA, read_object, sha256, write_json
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import Generator
from cfclip.toonfaces.clip import build
from cfclip.toonfaces.encoder import ToonEncoder
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.truth import ToonTruth

PROMPTS = ("green lipstick", "purple eyebrows", "blue hair", "blue skin", "red lipstick", "blonde hair")

NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "generator": lambda config: Generator(**config),
    "clip": lambda config: build(config["model"]),
    "identity": lambda config: IRSE(**config),
    "readout": lambda config: Readout(**config),
    "encoder": lambda config: ToonEncoder(**config),
    "heldout_clip": lambda config: build(config["model"]),
}
"""File name without its ending -> the network of a header's configuration. All other files hold mappers."""
REQUIRED = ("generator", "clip", "identity", "readout")
CHECKSUMS = "checksums.json"
"""File of a folder of networks: path in the folder -> sha256."""
RECORD = "if you made this file yourself, run 'cfclip toonfaces measure', which records it"
HOW = "install cfclip again, or let CFCLIP_DATA name a folder with toonfaces/, as the repository's data/ is"


def _load(path: Path) -> nn.Module:
    if path.stem not in NETWORKS:
        return load_mapper(path)
    tensors, config, _ = weights.read(path, path.stem)
    return weights.load_into(NETWORKS[path.stem](config), tensors, path)


def record(folder: Path = DATA / "toonfaces", *names: str) -> Path:
    """Write the checksums of the networks ``names`` in ``folder``, or of all files, for :func:`check`."""
    paths = [folder / f"{name}.safetensors" for name in names] or sorted(folder.rglob("*.safetensors"))
    new = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    known = read_object(folder / CHECKSUMS) if names else {}
    return write_json(folder / CHECKSUMS, dict(sorted((known | new).items())))


def check(folder: Path = DATA / "toonfaces") -> list[Row]:
    """One row per file of ``folder``, which is opened and compared with its checksum, or is missing."""
    paths = {path.stem: path for path in sorted(folder.rglob("*.safetensors"))}
    known = read_object(folder / CHECKSUMS)
    rows = []
    for name in {**NETWORKS, "multi": None, **paths}:
        path = paths.get(name, folder / f"{name}.safetensors")
        what = Source(path.name, name, "embedded", ("toonfaces",), required=name in REQUIRED)
        status, detail = "unverified", f"opens; {folder / CHECKSUMS} has no checksum of it: {RECORD}"
        try:
            _load(path)
            if digest := known.get(path.relative_to(folder).as_posix()):
                status, detail = "valid", f"sha256 as in {CHECKSUMS}"
                if digest != sha256(path):
                    status, detail = (
                        "corrupt",
                        f"not as it was written, see {folder / CHECKSUMS}: {HOW}; {RECORD}",
                    )
        except weights.WeightsError as error:
            status = "corrupt" if path.exists() else "missing"
            detail = HOW if status == "missing" else f"{error}; {HOW}"
        rows.append(Row(what, status, path, detail))
    return rows


def load_toonfaces(folder: Path = DATA / "toonfaces") -> Domain:
    """All networks of ``folder``, on the CPU. Raises WeightsError.

    An encoder or a mapper trained for other networks than those of ``folder`` is left out, with a warning.
    """

    def path_of(name: str) -> Path:
        return folder / f"{name}.safetensors"

    def load(name: str) -> nn.Module:
        return _load(path_of(name))

    def checked(name: str, network: nn.Module, fits: bool) -> nn.Module | None:
        if fits:
            return network
        warnings.warn(
            f"{path_of(name)} was trained for other networks than those beside it and is left out: "
            f"run 'cfclip toonfaces train {name}'",
            stacklevel=3,
        )
        return None

    if missing := [name for name in REQUIRED if not path_of(name).exists()]:
        raise weights.WeightsError(f"{folder} does not have the embedded {', '.join(missing)}: {HOW}")
    generator, clip = load("generator"), ClipGuide(load("clip"))
    encoder = mapper = None
    if path_of("encoder").exists():
        encoder = load("encoder")
        encoder = checked("encoder", encoder, encoder.fits(generator))
    if path_of("multi").exists():
        mapper = load("multi")
        mapper = checked("multi", mapper, mapper.config.fits(generator, clip))
    return Domain(
        name="toonfaces",
        generator=generator,
        clip=clip,
        identity=FaceIdentity(load("identity"), crop=False),
        truth=ToonTruth(load("readout"), generator.resolution),
        source_text="face",
        prompts=PROMPTS,
        encoder=encoder,
        heldout_clip=ClipGuide(load("heldout_clip")) if path_of("heldout_clip").exists() else None,
        mapper=mapper,
    )
