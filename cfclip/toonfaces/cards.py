"""Trains, exports and measures the embedded networks; each weight file's card is written by the command that measured it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import weights
from ..checkpoints import load_mapper
from ..domains import DATA, load_toonfaces
from ..metrics import kid, kid_features
from ..reporting import markdown
from ..training import atomic_save, settled
from . import clip, encoder, gan, identity, multi, readout
from .factors import NATURAL, PARTS, sample_face
from .gan import to_tensor
from .render import render_image


def measure_generator(folder: Path) -> str:
    """KID to held-out renders, share of samples that are no face, share of samples with a colour that training never showed."""
    n = 1000
    domain = load_toonfaces(folder)
    with torch.no_grad():
        z = torch.randn(n, domain.generator.z_dim, generator=torch.Generator().manual_seed(50_000))
        fakes = torch.cat([domain.generator(part).clamp(-1, 1) for part in z.split(100)])
    real, other = (to_tensor([render_image(sample_face((seed, k)), domain.generator.resolution) for k in range(n)]) for seed in (50_001, 50_002))
    f_fake, f_real, f_other = (kid_features(domain.readout, x) for x in (fakes, real, other))
    seen = domain.readout.measure(fakes)
    rows = [{"what": "KID, samples to renders", "value": kid(f_fake, f_real), "n": n},
            {"what": "KID, renders to other renders (the floor)", "value": kid(f_other, f_real), "n": n},
            {"what": "share of samples with no face", "value": float(1 - seen.is_face.mean()), "n": n}]
    for part in PARTS:
        names = [name for name in seen.colour(part) if name is not None]
        odd = float(np.mean([name not in NATURAL[part] for name in names]))
        rows.append({"what": f"share of samples with a counterfactual colour: {part}", "value": odd, "n": len(names)})
    gan.save_grid(domain.generator, folder / "generator.png")
    return (markdown(pd.DataFrame(rows), "Samples at psi = 1, seed 50000. KID on the readout's encoder (176 pooled features, standardised), cubic kernel.")
            + "\n![64 uncurated samples, psi = 1](generator.png)\n")


def measure_clip(folder: Path, which: str = "clip") -> str:
    """Zero-shot colour naming on held-out renders."""
    table = pd.DataFrame(clip.colour_accuracy(getattr(load_toonfaces(folder), which)))
    return markdown(table, "Share of held-out renders whose colour is named rightly among *all* colours of the part, by \"face with <colour> <part>\" "
                    "under the 79 templates. accuracy: counterfactual colours; natural: natural ones; held_out: (part, colour) pairs never "
                    "shown in training. Seed 10000.")


def measure_identity(folder: Path) -> str:
    """Verification of unseen people, and how much of a person is left when one part is repainted."""
    network = load_toonfaces(folder).identity
    table = pd.DataFrame(identity.repainting(network))
    worst = table.loc[table.groupby("part", sort=False).identity.idxmin()].rename(columns={"colour": "worst colour", "identity": "its identity"})
    parts = table.groupby("part", sort=False).identity.mean().rename("mean identity").reset_index().merge(worst, on="part")
    note = ("People never seen in training, natural against a new photo of both supports: colours, pose, smile and background are other ones. "
            "auc: from anybody else; auc same colours: from another person in the very same colours. Seed 30000.")
    return markdown(pd.DataFrame([identity.verification(network)]), note) + "\n" + markdown(
        parts, "Identity of the exact truth: natural renders against the same with one part repainted, over all its colours. Seed 31000.")


def measure_readout(folder: Path) -> str:
    """Colour and presence accuracy on held-out renders, sharp and out of focus."""
    network = load_toonfaces(folder).readout
    sharp, soft = (pd.DataFrame(readout.colour_accuracy(network, sigma=sigma)) for sigma in (0.0, readout.SOFT))
    sharp.insert(2, "softened", soft.accuracy)
    return markdown(sharp, f"Held-out renders of both supports, as they are and {readout.SOFT:g} pixels out of focus; colours over parts larger than "
                    f"{readout.VISIBLE:g} pixels. Seed 20000.")


def measure_encoder(folder: Path) -> str:
    """Reconstruction of held-out renders, before and after optimisation."""
    domain = load_toonfaces(folder)
    if domain.encoder is None:
        raise weights.WeightsError(f"{folder / 'encoder.safetensors'} does not fit {folder / 'generator.safetensors'}: cfclip toonfaces train encoder")
    return markdown(pd.DataFrame(encoder.refinement(domain)), "Held-out natural renders against G(w), mean ± half of the 95 % interval over the renders. "
                    "PSNR in dB; perceptual distance under its name (0 = the same picture); centre distance: of w from W's centre, 1 = as a sample. "
                    "Settings of `InversionConfig`. Seed 70000.")


def measure_multi(name: str, folder: Path) -> str:
    """Edits of test faces by prompts that were trained on, and by those that were not."""
    path, domain = folder / f"{name}.safetensors", load_toonfaces(folder)
    domain = replace(domain, mapper=load_mapper(path))
    if not domain.mapper.config.fits(domain.generator, domain.clip):
        raise weights.WeightsError(f"{path} does not fit the generator and the CLIP beside it: cfclip toonfaces train {name}")
    groups, unseen = multi.measure(domain, weights.read(path, "mapper")[2]["training"]["prompts"])
    note = ("Edits at strength 1 of test faces; seen: by prompts that were trained on; n = prompts x faces. Success, leakage: the "
            "readout's. A face without the part, as the bald for hair, cannot succeed. Test latents, seed 0.")
    return markdown(groups, note) + ("\n" + markdown(unseen, "Every unseen prompt.") if len(unseen) else "")


@dataclass(frozen=True)
class Network:
    """How one of the embedded networks is trained, stored and measured."""

    config: Callable[..., Any]
    train: Callable[[Any, Path], nn.Module]
    metadata: Callable[[Any, nn.Module], dict]
    measure: Callable[[Path], str]
    title: str
    dtype: torch.dtype = torch.float16
    kind: str | None = None         # of its file; default: its name
    data: str = "toonfaces renders, drawn afresh"


NETWORKS: dict[str, Network] = {
    "readout": Network(readout.ReadoutConfig, readout.train, lambda c, m: m.metadata, measure_readout,
                       "Readout: part segmenter and presence factors, the judge that uses no CLIP"),
    "identity": Network(identity.IdentityConfig, identity.train, lambda c, m: m.metadata, measure_identity,
                        "Identity: a small IR-SE that knows people by their shapes"),
    "clip": Network(clip.CLIPConfig, clip.train, lambda c, m: {"model": c.model}, measure_clip,
                    "CLIP: open_clip model, convolutional image tower, open_clip's tokenizer"),
    "heldout_clip": Network(clip.HeldOutConfig, clip.train, lambda c, m: {"model": c.model}, partial(measure_clip, which="heldout_clip"),
                            "Held-out CLIP: the judge that no edit was optimised for; a ConvNeXt image tower"),
    "generator": Network(gan.GANConfig, gan.train, lambda c, m: m.config, measure_generator,
                         "Generator: StyleGAN2 that has seen natural colours only", dtype=torch.float32),
    "encoder": Network(encoder.EncoderConfig, encoder.train, lambda c, m: m.metadata, measure_encoder,
                       "Encoder: a photo to W+, trained for the generator beside it"),
    "multi": Network(multi.config, multi.train, lambda c, m: m.metadata, partial(measure_multi, "multi"),
                     "Mapper of every prompt: CF-CLIP, prompts drawn each step", kind="mapper", data="samples of the generator beside it"),
    "heldout_multi": Network(multi.heldout_config, multi.train, lambda c, m: m.metadata, partial(measure_multi, "heldout_multi"),
                             "Mapper of many prompts that never saw some", kind="mapper", data="samples of the generator beside it"),
}


def train(name: str, out: Path, folder: Path = DATA / "toonfaces", **overrides: Any) -> Path:
    """Train network ``name`` (going on in ``out`` if it was stopped) and store it as ``folder/<name>.safetensors``."""
    network = NETWORKS[name]
    config = network.config(**overrides)
    config = settled(config, out=out)                              # the file says what it was
    model = network.train(config, out)
    return weights.save(model, folder / f"{name}.safetensors", network.kind or name, network.metadata(config, model), store_as=network.dtype,
                        training=asdict(config))


def write_card(name: str, folder: Path = DATA / "toonfaces") -> Path:
    """Measure ``folder/<name>.safetensors`` and write what was found, with how it was trained, to ``folder/<name>.md``."""
    path = folder / f"{name}.safetensors"
    network = NETWORKS[name]
    tensors, _, card = weights.read(path, network.kind or name)
    parameters = sum(t.numel() for t in tensors.values())
    budget = "\n".join(f"| {key} | {value} |" for key, value in card.get("training", {}).items())
    text = (f"# {network.title}\n\n`{path.name}`: {parameters:,} values, {path.stat().st_size / 1e6:.1f} MB. "
            f"Data: {network.data}; no other source. Licence: MIT, as the code.\n\n"
            f"Retrain: `cfclip toonfaces train {name}`. Measure again: `cfclip toonfaces measure {name}`.\n\n"
            f"## Measured\n\n{network.measure(folder)}\n## Training\n\n{card.get('history', '')}| setting | value |\n|---|---|\n{budget}\n")
    return atomic_save(text, folder / f"{name}.md", lambda text, part: part.write_text(text))
