"""StyleGAN-NADA (Gal et al. 2021): the generator itself is fine-tuned."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.baselines.editor import Editor
from cfclip.checkpoints.generators import load_generator
from cfclip.domain import Domain, warn_null_edit
from cfclip.method.config import GuidedConfig
from cfclip.method.loop import begin_run, described, run_loop
from cfclip.method.losses import clip_distance, directional
from cfclip.models.stylegan2 import Generator
from cfclip.settings import batch_size, int_at_least, number, optional_text, seed_number, setting, text


@dataclass(frozen=True)
class NADAGeneratorConfig(GuidedConfig):
    """The directional loss trains a copy of the generator; its mapping network and ToRGB stay as they are."""

    prompt: str = setting(MISSING, text)
    source_text: str | None = setting(None, optional_text)  # None: the domain's
    steps: int = setting(300, int_at_least(1))
    batch: int = setting(2, batch_size)
    lr: float = setting(0.002, number(above=True))  # Adam gets 4/5 of it: StyleGAN2's lazy regularisation
    # how many convolutions are trained in each step, see liveliest; None: all, and the constant input
    layers: int | None = setting(None, int_at_least(1, optional=True))
    choice_batch: int = setting(8, batch_size)  # pictures by which the convolutions are chosen
    train_latents: int = setting(512, int_at_least(1, maximum=10**6))
    seed: int = setting(0, seed_number)


def liveliest(tuned: Generator, loss: Callable[[Tensor], Tensor], w: Tensor, k: int) -> list[int]:
    """The ``k`` convolutions whose codes a gradient step moves most (Gal et al. 2021, section 4.2).

    loss: a function of pictures [N, 3, R, R]; w: codes [N, L, D]. How far a layer's codes move is measured by
    the mean absolute gradient of the loss, since a learning rate would not change the order. Layer i of W+
    feeds convolution i.
    """
    w = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(tuned.synthesis(w)), w)
    return gradient.abs().mean((0, 2))[: len(tuned.convs)].topk(k).indices.tolist()


class GeneratorEditor(Editor):
    """``x' = G'(w)``; G' interpolates the weights of the source (strength 0) and the tuned generator (1)."""

    KIND = "generator"
    module: Generator

    @property
    def sizes(self) -> Mapping[str, Any]:
        return self.module.config

    @torch.no_grad()
    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        source, tuned = self.domain.generator.state_dict(), self.module.state_dict()
        between = copy.deepcopy(self.module)
        weights = {name: source[name] + strength * (tuned[name] - source[name]) for name in tuned}
        between.load_state_dict(weights)
        return between.synthesis(w)

    @classmethod
    def fit(cls, method: str, domain: Domain, config: Any, out: Path | None, **loop: Any) -> Editor:
        warn_null_edit(domain, config)
        c = begin_run(config, domain.device, out, method=method, **domain.described)
        guides, source_text = domain.first_guides(c.guides), c.source_text or domain.source_text
        texts = [[guide.template_features(t) for t in (c.prompt, source_text)] for guide in guides]  # [T, E]
        latents = domain.latents(c.train_latents, "train", c.seed)
        plain = [F.normalize(guide.encode_text(c.prompt), dim=-1) for guide in guides]  # [1, E] each
        tuned = copy.deepcopy(domain.generator).requires_grad_(False)
        if c.layers is not None and c.layers > len(tuned.convs):
            raise ValueError(
                f"layers is {c.layers}, but this generator has {len(tuned.convs)}: set it to that or less"
            )
        tuned.convs.requires_grad_(True)
        tuned.const.requires_grad_(c.layers is None)
        lazy = 4 / 5
        trained = [p for p in tuned.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=c.lr * lazy, betas=(0.0, 0.99**lazy))

        def encode(images: Tensor) -> list[Tensor]:
            return [F.normalize(guide.encode_image(images), dim=-1) for guide in guides]

        def global_loss(images: Tensor) -> Tensor:
            each = zip(c.guide_shares, encode(images), plain, strict=True)
            return sum(share * clip_distance(x, text) for share, x, text in each)

        def choose(generator: torch.Generator) -> None:
            codes = latents[torch.randint(len(latents), (c.choice_batch,), generator=generator)]
            chosen = liveliest(tuned, global_loss, codes, c.layers)
            for k, conv in enumerate(tuned.convs):
                conv.requires_grad_(k in chosen)

        def step(i: int, generator: torch.Generator) -> dict[str, float]:
            if c.layers is not None:
                choose(generator)
            w = latents[torch.randint(len(latents), (c.batch,), generator=generator)]
            with torch.no_grad():
                source = encode(domain.generator.synthesis(w))
            each = zip(c.guide_shares, encode(tuned.synthesis(w)), source, texts, strict=True)
            loss = sum(share * directional(x, s, *text) for share, x, s, text in each)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"directional": loss.item()}

        state = {"generator": tuned, "optimizer": optimizer}
        loop = {"checkpoint_every": 100, "desc": c.prompt} | loop
        loop |= {"out": out, "run": described(c, method=method, **domain.described)}
        rows = run_loop(step, c.steps, state=state, seed=c.seed, **loop)
        return cls(method, domain, c, tuned.requires_grad_(False), rows)

    @classmethod
    def open(cls, path: Path, generator: Generator) -> nn.Module:
        return load_generator(path, generator.w_avg.device)
