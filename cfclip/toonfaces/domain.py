"""Loads the embedded domain from the weights committed in ``data/toonfaces``; a wheel includes them."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cfclip.checkpoints import weights
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.reading import about, build
from cfclip.checkpoints.sources import Row, Source
from cfclip.domain import Domain
from cfclip.files import DATA, read_object, sha256, write_json
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.toonfaces import clip
from cfclip.toonfaces.encoder import ToonEncoder
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.truth import ToonTruth

COLOURING = 4
"""The first layer of W+ that colours; the layers before it draw (``GeneratorConfig.colouring``)."""
LEVEL_SPLIT = (2, COLOURING)
"""The first medium and the first fine layer, of ten; the fine layers are those that colour."""
PROMPTS = ("green lipstick", "purple eyebrows", "blue hair", "blue skin", "red lipstick", "blonde hair")

NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "clip": lambda config: clip.build(config["model"]),
    "identity": lambda config: IRSE(**config),
    "readout": lambda config: Readout(**config),
    "encoder": lambda config: ToonEncoder(**config),
    "guide2": lambda config: clip.build(config["model"]),
    "heldout_clip": lambda config: clip.build(config["model"]),
}
"""File name without suffix -> how to make its network from the configuration in the file's header.

The other files hold a generator or a mapper, see :func:`load_network`.
"""
REQUIRED = ("generator", "clip", "identity", "readout")
CHECKSUMS = "checksums.json"
"""A file in the folder of the networks: path in the folder -> sha256."""
CONFIDENCE = "confidence.json"
"""A file in the folder of the networks: how often its mapper succeeds, see ``train.multi.calibration``."""
RECORD = "if you made this file yourself, run 'cfclip toonfaces measure', which records it"
HOW = "install cfclip again, or let CFCLIP_DATA name a folder with toonfaces/, as the repository's data/ is"


def load_network(path: Path) -> nn.Module:
    """Load the weight file ``path``; its name says which network it holds. Raises WeightsError."""
    if path.stem not in NETWORKS:
        return load_generator(path) if path.stem == "generator" else load_mapper(path)
    tensors, config, _ = weights.read(path, path.stem)
    make = partial(NETWORKS[path.stem], config)
    with about(path):
        if "model" not in config:
            return build(make, tensors, path.stem)
        if config["model"] not in clip.MODELS:
            raise ValueError(f"its CLIP is none of {', '.join(clip.MODELS)}: the file is damaged")
        return weights.load_into(make(), tensors, path)


def record(folder: Path = DATA / "toonfaces", *names: str) -> Path:
    """Write the checksums of the networks ``names`` in ``folder`` (default: all files), for :func:`check`."""
    paths = [folder / f"{name}.safetensors" for name in names] or sorted(folder.rglob("*.safetensors"))
    new = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    known = read_object(folder / CHECKSUMS) if names else {}
    return write_json(folder / CHECKSUMS, dict(sorted((known | new).items())))


def check(folder: Path = DATA / "toonfaces") -> list[Row]:
    """One row per network of ``folder``: whether its file exists, opens and has the recorded checksum."""
    paths = {path.stem: path for path in sorted(folder.rglob("*.safetensors"))}
    checksums, rows = folder / CHECKSUMS, []
    known = read_object(checksums)
    for name in {"generator": None, **NETWORKS, "multi": None, **paths}:
        path = paths.get(name, folder / f"{name}.safetensors")
        what = Source(path.name, name, "embedded", ("toonfaces",), required=name in REQUIRED)
        try:
            load_network(path)
        except weights.WeightsError as error:
            status, detail = ("corrupt", f"{error}; {HOW}") if path.exists() else ("missing", HOW)
        else:
            digest = known.get(path.relative_to(folder).as_posix())
            if not digest:
                status, detail = "unverified", f"opens; {checksums} has no checksum of it: {RECORD}"
            elif digest != sha256(path):
                status, detail = "corrupt", f"not as it was written, see {checksums}: {HOW}; {RECORD}"
            else:
                status, detail = "valid", f"sha256 as in {CHECKSUMS}"
        rows.append(Row(what, status, path, detail))
    return rows


def load_toonfaces(folder: Path = DATA / "toonfaces") -> Domain:
    """The domain made of all networks in ``folder``, on the CPU. Raises WeightsError.

    An encoder or a mapper trained for other networks than those of ``folder`` is left out, with a warning.
    """
    paths = {name: folder / f"{name}.safetensors" for name in ("generator", *NETWORKS, "multi")}
    paths = {name: path for name, path in paths.items() if path.exists()}
    if missing := [name for name in REQUIRED if name not in paths]:
        raise weights.WeightsError(f"{folder} does not have the embedded {', '.join(missing)}: {HOW}")
    found = {name: load_network(path) for name, path in paths.items()}
    guides = {name: ClipGuide(found[name]) for name in ("clip", "guide2", "heldout_clip") if name in found}
    generator, encoder, mapper = found["generator"], found.get("encoder"), found.get("multi")
    if encoder and not encoder.fits(generator):
        encoder = _left_out(paths["encoder"])
    if mapper and not mapper.config.fits(generator, guides["clip"]):
        mapper = _left_out(paths["multi"])
    return Domain(
        name="toonfaces",
        generator=generator,
        clip=guides["clip"],
        identity=FaceIdentity(found["identity"], crop=False),
        truth=ToonTruth(found["readout"], generator.resolution),
        source_text="face",
        prompts=PROMPTS,
        level_split=LEVEL_SPLIT,
        perceptual=nn.Identity(),  # the pixels; VGG19 was trained on photographs
        encoder=encoder,
        more_guides=(guides["guide2"],) if "guide2" in guides else (),
        heldout_clip=guides.get("heldout_clip"),
        mapper=mapper,
        confidence=read_object(folder / CONFIDENCE) or None if mapper else None,
    )


def _left_out(path: Path) -> None:
    warnings.warn(
        f"{path} was trained for other networks than those beside it and is left out: "
        f"run 'cfclip toonfaces train {path.stem}'",
        stacklevel=3,
    )
