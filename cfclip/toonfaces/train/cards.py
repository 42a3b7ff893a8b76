"""Trains, stores and measures the embedded networks; a measurement writes the card of the weight file."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from cfclip.checkpoints import weights
from cfclip.checkpoints.mappers import load_mapper
from cfclip.domain import Domain
from cfclip.evaluation.kid import kid, kid_features
from cfclip.evaluation.report import markdown
from cfclip.files import DATA, write_json, write_text
from cfclip.method.config import flat
from cfclip.method.loop import begin_run
from cfclip.settings import Settings
from cfclip.toonfaces.domain import CONFIDENCE, load_toonfaces, record
from cfclip.toonfaces.factors import NATURAL, PARTS, sample_face
from cfclip.toonfaces.readout import VISIBLE
from cfclip.toonfaces.render import pictures
from cfclip.toonfaces.train import clip, clip_scores, encoder, generator, identity, multi, readout


def measure_generator(domain: Domain, path: Path) -> str:
    """KID to held-out renders; shares of samples that are not a face or have a colour unseen in training."""
    n, g = 1000, domain.generator
    with torch.no_grad():
        z = torch.randn(n, g.z_dim, generator=torch.Generator().manual_seed(50_000))
        fakes = torch.cat([g(part).clamp(-1, 1) for part in z.split(100)])

    def renders(seed: int) -> torch.Tensor:
        return pictures((sample_face((seed, k)) for k in range(n)), g.resolution)

    fake, real, other = (kid_features(domain.truth, x) for x in (fakes, renders(50_001), renders(50_002)))
    seen = domain.truth.measure(fakes)
    rows = [
        ("KID, samples to renders", kid(fake, real), n),
        ("KID, renders to other renders (the floor)", kid(other, real), n),
        ("share of samples with no face", float(1 - seen.is_face.mean()), n),
    ]
    for part in PARTS:
        names = [name for name in seen.colour(part) if name is not None]
        odd = float(np.mean([name not in NATURAL[part] for name in names]))
        rows.append((f"share of samples with a counterfactual colour: {part}", odd, len(names)))
    generator.save_grid(g, path.with_suffix(".png"))
    note = (
        "Samples at psi = 1, seed 50000. KID with a cubic kernel on 176 pooled features of the readout's "
        f"encoder, standardised.\n\n![64 uncurated samples, psi = 1]({path.stem}.png)"
    )
    return markdown(pd.DataFrame(rows, columns=["what", "value", "n"]), note)


def measure_clip(domain: Domain, path: Path) -> str:
    """Zero-shot naming of colours and shapes, on held-out renders and on moved samples of the generator."""
    guides = {"heldout_clip": domain.heldout_clip, "guide2": domain.guides[-1]}
    guide, truth = guides.get(path.stem, domain.clip), domain.truth
    columns = (
        "accuracy: counterfactual colours; natural: natural colours; held out: (part, colour) pairs that "
        "training never showed; n: how many pictures each is over."
    )
    renders = (
        "Share of held-out renders whose colour is named correctly among *all* colours of the part, by "
        f'"face with <colour> <part>" under the 79 templates. {columns} Seed 10000.'
    )
    moved = (
        "The same on samples of the generator whose codes were moved, half of them at random and half by an "
        f"optimiser that paints a part, where the readout is sure of the colour. {columns}"
    )
    shapes = "Share of held-out renders whose shape is named correctly. Seed 12000."
    reading = (
        "A linear reading of the text feature: part and colour of the pairs that it was not taught, see "
        "`toonfaces.train.multi.probe`."
    )
    tables = [
        (clip_scores.colour_accuracy(guide), renders),
        (clip_scores.moved_accuracy(guide, domain.generator, truth.readout), moved),
        (clip_scores.shape_accuracy(guide), shapes),
        (multi.probe(replace(domain, clip=guide)), reading),
    ]
    return "\n".join(markdown(pd.DataFrame(table), note) for table, note in tables)


def measure_identity(domain: Domain, path: Path) -> str:
    """Verification of people unseen in training, and the identity that is left after a part is repainted."""
    table = pd.DataFrame(identity.repainting(domain.identity))
    worst = table.loc[table.groupby("part", sort=False).identity.idxmin()]
    worst = worst.rename(columns={"colour": "worst colour", "identity": "its identity"})
    parts = table.groupby("part", sort=False).identity.mean().rename("mean identity").reset_index()
    people = (
        "A natural photo against another photo: other colours of both supports, another pose, smile and "
        "background. auc: from anybody else; auc same colours: from another person in the very same colours. "
        "People that training never showed. Seed 30000."
    )
    truth = (
        "Identity of the exact truth: natural renders against the same with one part repainted, over all its "
        "colours. Seed 31000."
    )
    found = markdown(pd.DataFrame([identity.verification(domain.identity)]), people)
    return found + "\n" + markdown(parts.merge(worst, on="part"), truth)


def measure_readout(domain: Domain, path: Path) -> str:
    """Colour and presence accuracy on held-out renders, sharp and out of focus."""
    sharp = pd.DataFrame(readout.colour_accuracy(domain.truth))
    soft = pd.DataFrame(readout.colour_accuracy(domain.truth, sigma=readout.SOFT))
    sharp.insert(2, "softened", soft.accuracy)
    note = (
        f"Held-out renders of both supports, as they are and {readout.SOFT:g} pixels out of focus; colours "
        f"of parts larger than {VISIBLE:g} pixels. Seed 20000."
    )
    return markdown(sharp, note)


def measure_encoder(domain: Domain, path: Path) -> str:
    """Reconstruction of held-out renders, before and after optimisation."""
    if domain.encoder is None:
        raise _unfit(path)
    note = (
        "Held-out natural renders against G(w): mean ± half of the 95 % interval over the renders. psnr in "
        "dB; lpips: perceptual distance (0: the same picture); centre distance: of w from the centre of W "
        "(1: that of a sample). Settings of `InversionConfig`. Seed 70000."
    )
    return markdown(pd.DataFrame(encoder.refinement(domain)), note)


def measure_multi(domain: Domain, path: Path) -> str:
    """Edits of test faces to every colour of every part, and how well success is predicted.

    Writes :data:`CONFIDENCE` beside ``path``. Raises WeightsError if the mapper does not fit the networks.
    """
    domain = replace(domain, mapper=load_mapper(path))
    if not domain.mapper.config.fits(domain.generator, domain.clip):
        raise _unfit(path)
    groups, parts = multi.measure(domain)
    note = (
        "Edits of test faces that have the part, at strength 1. n: prompts x faces. "
        "Success and leakage are measured by the readout. Test latents, seed 0."
    )
    known = multi.calibration(domain)
    write_json(path.with_name(CONFIDENCE), known)
    sure = (
        f"Confidence ([{CONFIDENCE}]({CONFIDENCE})): the success that is predicted for a sentence, the "
        f"least of what its claims have in other words, is {known['error']:.2f} from the measured one on "
        f"average; if the same were predicted for all, {known['error_of_the_mean']:.2f}. Over "
        f"{known['wordings']} captions of random faces, n = {known['n']} training faces each.\n"
    )
    return "\n".join([markdown(groups, note), markdown(parts), sure])


def _unfit(path: Path) -> weights.WeightsError:
    return weights.WeightsError(
        f"{path} was trained for other networks than those beside it: "
        f"run 'cfclip toonfaces train {path.stem}'"
    )


@dataclass(frozen=True)
class Network:
    """How one of the embedded networks is trained, stored and measured."""

    title: str  # of its card
    config: Callable[..., Settings]
    train: Callable[[Any, Path, str], nn.Module]  # (configuration, folder, device) -> trained network
    measure: Callable[[Domain, Path], str]  # (domain, the network's weight file) -> Markdown
    sizes: Callable[[Any, nn.Module], dict] = lambda config, model: model.metadata  # for the file's header
    dtype: torch.dtype = torch.float16  # of the stored tensors
    kind: str | None = None  # of its file; default: its name
    data: str = "toonfaces renders"  # what it is trained on
    run: Callable[[], Mapping[str, str]] | None = None  # what identifies its run; default: its name


def _clip(title: str, config: Callable[..., clip.CLIPConfig]) -> Network:
    run = partial(clip.run_of, config().model)
    return Network(title, config, clip.train, measure_clip, lambda c, model: {"model": c.model}, run=run)


NETWORKS: dict[str, Network] = {
    "readout": Network(
        "Readout: segments parts and detects hair style, beard and glasses; the judge without CLIP",
        readout.ReadoutConfig,
        readout.train,
        measure_readout,
    ),
    "identity": Network(
        "Identity: a small IR-SE that knows people by their shapes",
        identity.IdentityConfig,
        identity.train,
        measure_identity,
    ),
    "clip": _clip(
        "CLIP: an open_clip model with a convolutional image tower and open_clip's tokenizer", clip.CLIPConfig
    ),
    "guide2": _clip("Second guide: a CLIP with a ConvNeXt image tower", clip.GuideConfig),
    "heldout_clip": _clip(
        "Judge: a CLIP that no edit is optimised for; a RegNet image tower", clip.JudgeConfig
    ),
    "generator": Network(
        "Generator: a StyleGAN2 that was trained on natural colours only",
        generator.GeneratorConfig,
        generator.train,
        measure_generator,
        lambda c, model: model.config,
        dtype=torch.float32,
    ),
    "encoder": Network(
        "Encoder: a photo to W+, trained for the generator beside it",
        encoder.EncoderConfig,
        encoder.train,
        measure_encoder,
        run=lambda: {"network": "encoder", **encoder.trained_for(load_toonfaces())},
    ),
    "multi": Network(
        "Mapper for every prompt: CF-CLIP with prompts drawn at each step",
        multi.config,
        multi.train,
        measure_multi,
        kind="mapper",
        data="samples of the generator beside it",
        run=lambda: {"method": "cfclip", **load_toonfaces().described},
    ),
}


def train(
    name: str, out: Path, folder: Path = DATA / "toonfaces", device: str = "cpu", **overrides: Any
) -> Path:
    """Train network ``name``, or resume it in ``out``, and store it as ``folder/<name>.safetensors``."""
    network = NETWORKS[name]
    run = network.run() if network.run else {"network": name}
    config = begin_run(network.config(**overrides), device, out, **run)
    model = network.train(config, out, device).cpu()
    path, kind, sizes = folder / f"{name}.safetensors", network.kind or name, network.sizes(config, model)
    card = {key: run[key] for key in ("method", "domain") if key in run}
    card |= {"training": flat(config), "device": _named(device)}
    weights.save(model, path, kind, sizes, store_as=network.dtype, **card)
    record(folder, name)
    return path


def _named(device: str) -> str:
    """The name of ``device`` on a card."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {platform.machine()}"


def write_card(name: str, folder: Path = DATA / "toonfaces") -> Path:
    """Measure ``folder/<name>.safetensors``; write the result and how it was trained to ``<name>.md``.

    The checksum of the weight file is recorded as well.
    """
    path, network = folder / f"{name}.safetensors", NETWORKS[name]
    tensors, _, card = weights.read(path, network.kind or name)
    values, megabytes = sum(t.numel() for t in tensors.values()), path.stat().st_size / 1e6
    settings = "\n".join(f"| {key} | {value} |" for key, value in card.get("training", {}).items())
    text = (
        f"# {network.title}\n\n"
        f"`{path.name}`: {values:,} values, {megabytes:.1f} MB. "
        f"Trained only on {network.data}. Licence: MIT, as the code.\n\n"
        f"Train again: `cfclip toonfaces train {name}`. Measure again: `cfclip toonfaces measure {name}`.\n\n"
        f"## Measured\n\n{network.measure(load_toonfaces(folder), path)}\n"
        f"## Training\n\nOn {card['device']}. {card.get('history', '')}\n\n"
        f"| setting | value |\n|---|---|\n{settings}\n"
    )
    record(folder, name)
    return write_text(folder / f"{name}.md", text)
