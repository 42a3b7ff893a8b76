"""Domains by name: a generator, a CLIP, an identity network and prompts that belong together."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import latents, sources, weights
from .checkpoints import load_generator, load_identity, load_latents, load_mapper
from .clip import ClipGuide, load_openai_clip
from .e4e import load_e4e
from .identity import IRSE, FaceIdentity
from .mapper import Mapper
from .perceptual import VGG19, load_vgg
from .sources import DATA, DOWNLOADS
from .stylegan2 import Generator
from .toonfaces.readout import Readout


@dataclass(frozen=True)
class Domain:
    """Frozen networks and the words that go with them."""

    name: str
    generator: Generator
    clip: ClipGuide
    identity: FaceIdentity | None   # None: nobody has trained one (dogs, cats)
    readout: Readout | None         # the judge, where there is a ground truth
    source_text: str                # what every picture of the domain shows
    prompts: tuple[str, ...]        # examples, counterfactual ones first
    truncation: float = 1.0         # psi of the latents that are edited
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    perceptual: VGG19 | None = None  # what keeps the rest of the picture where there is no identity
    encoder: nn.Module | None = None  # photos -> W+, see cfclip.inversion.encode; None: no file
    heldout_clip: ClipGuide | None = None  # judges edits, and no training looks at it
    mapper: Mapper | None = None    # of many prompts: edits by any, at once; see cfclip.multiprompt
    latent_files: Mapping[str, Path] = field(default_factory=dict)  # split -> codes of real photos; a split without is sampled

    def latents(self, n: int, split: str = "train", seed: int = 0) -> Tensor:
        """``n`` codes w_plus [n, L, D] to edit; fewer if ``latent_files`` has fewer. The same every time, other ones per seed.

        Raises WeightsError if the file is damaged or belongs to another generator.
        """
        if split not in self.latent_files:
            return latents.sample(self.generator, n, split, seed, self.truncation)
        w = load_latents(self.latent_files[split], self.generator)
        order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
        return w[order[:n]].to(self.device)

    def to(self, device: str | torch.device) -> "Domain":
        """The same domain with its networks on ``device``."""
        for network in (self.generator, self.clip, self.identity, self.readout, self.perceptual, self.encoder, self.heldout_clip, self.mapper):
            if network is not None:
                network.to(device)
        return replace(self, device=torch.device(device))


def load_toonfaces(folder: Path = DATA / "toonfaces") -> Domain:
    """The embedded domain, from the weights committed in ``data/toonfaces``."""
    from .toonfaces.clip import build
    from .toonfaces.encoder import ToonEncoder

    def module(name: str, make):
        path = folder / f"{name}.safetensors"
        tensors, config, _ = weights.read(path, name)
        return weights.load_into(make(config), tensors, path)

    def fitting(name: str, load, fits):
        """A network that was trained for some of the others; None without its file, and with a warning where it was for other ones."""
        path = folder / f"{name}.safetensors"
        if not path.exists():
            return None
        if not fits(network := load()):
            warnings.warn(f"{path} was trained for other networks than those beside it, and is left out: cfclip toonfaces train {name}", stacklevel=3)
            return None
        return network

    generator = module("generator", lambda c: Generator(**c))
    clip, *heldout = (ClipGuide(module(name, lambda c: build(c["model"]))) for name in ("clip", "heldout_clip")
                      if name == "clip" or (folder / f"{name}.safetensors").exists())
    return Domain(
        name="toonfaces",
        generator=generator,
        clip=clip,
        identity=FaceIdentity(module("identity", lambda c: IRSE(**c)), crop=False),
        readout=module("readout", lambda c: Readout(**c)),
        source_text="face",
        prompts=("green lipstick", "purple eyebrows", "blue hair", "blue skin", "red lipstick", "blonde hair"),
        encoder=fitting("encoder", lambda: module("encoder", lambda c: ToonEncoder(**c)), lambda m: m.fits(generator)),
        heldout_clip=heldout[0] if heldout else None,
        mapper=fitting("multi", lambda: load_mapper(folder / "multi.safetensors"), lambda m: m.config.fits(generator, clip)),
    )


def load_ffhq(folder: Path = DOWNLOADS) -> Domain:
    """The paper's faces. Raises WeightsError that names every missing file, where it comes from and where to put it."""
    files = sources.require("ffhq", folder)
    return Domain(
        name="ffhq",
        generator=load_generator(files["generator"]),
        clip=load_openai_clip(files["clip"]),
        heldout_clip=load_openai_clip(files["held-out clip"], "ViT-B-16-quickgelu") if "held-out clip" in files else None,
        identity=load_identity(files["identity"]),
        readout=None,
        source_text="face",
        prompts=("green lipstick", "purple eyebrows"),
        encoder=load_e4e(files["encoder"]) if "encoder" in files else None,
        latent_files={split: files[f"{split} latents"] for split in latents.SPLITS if f"{split} latents" in files},
    )


def load_afhq(animal: str, prompts: tuple[str, ...], folder: Path = DOWNLOADS) -> Domain:
    """The paper's dogs or cats: W codes at psi = 0.7, and VGG19 in place of an identity. Raises WeightsError as :func:`load_ffhq`."""
    files = sources.require(f"afhq-{animal}", folder)
    return Domain(
        name=f"afhq-{animal}",
        generator=load_generator(files["generator"]),
        clip=load_openai_clip(files["clip"]),
        heldout_clip=load_openai_clip(files["held-out clip"], "ViT-B-16-quickgelu") if "held-out clip" in files else None,
        identity=None,
        readout=None,
        source_text=animal,
        prompts=prompts,
        truncation=0.7,
        perceptual=load_vgg(files["perceptual"]),
    )


DOMAINS = {
    "toonfaces": load_toonfaces,
    "ffhq": load_ffhq,
    "afhq-dog": partial(load_afhq, "dog", ("blue dog", "bald dog", "tiger stripes")),
    "afhq-cat": partial(load_afhq, "cat", ("spotty cat", "mouse ears")),
}


def load_domain(name: str = "toonfaces", device: str | torch.device = "cpu") -> Domain:
    """The domain called ``name`` on ``device``; ValueError for an unknown one or one that this machine has not, WeightsError for missing files."""
    if name not in DOMAINS:
        raise ValueError(f"unknown domain {name!r}; there are: {', '.join(DOMAINS)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:                # before anything is loaded
        raise ValueError(f"device {str(device)!r} cannot be used on this machine ({str(error).splitlines()[0]}); \"cpu\" always can") from None
    return DOMAINS[name]().to(device)
