"""CF-CLIP itself: the objective of the paper and the training of one mapper, for one prompt or (:mod:`cfclip.multiprompt`) for many."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from pytorch_optimizer import Ranger
from torch import Tensor

from . import weights
from .checkpoints import load_mapper
from .domains import Domain
from .losses import NEGATIVES, POSITIVES, QUERIES, clip_distance, clip_nce, directional, identity_loss_from_features, latent_l2, perspective_views
from .mapper import Mapper, MapperConfig
from .perceptual import perceptual_loss
from .stylegan2 import Generator
from .training import Callback, fit, learning_rate, settled

OBJECTIVES = ("nce", "clip", "directional")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_whole(config: object, **least: int) -> None:
    """ValueError that names the first setting of ``config`` that is no whole number from its least value."""
    for name, minimum in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be a whole number from {minimum}, not {value!r}")


def check_dtype(name: str) -> None:
    """ValueError if ``name`` is no dtype to convolve in."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {name!r}")


def check_networks(domain: Domain, config: object) -> None:
    """ValueError that names a loss of ``config`` for which ``domain`` has no network."""
    for name, network, kind in (("lambda_id", domain.identity, "identity"), ("lambda_perc", domain.perceptual, "perceptual")):
        if getattr(config, name, 0) and network is None:
            raise ValueError(f"{name} is {getattr(config, name):g}, but domain {domain.name} has no {kind} network: set {name}=0 "
                             f"(notebooks/presets/ has the paper's values)")


def at_once(generator: Generator) -> int:
    """How many pictures to draw together: 64 of 1024² would be 50 GB."""
    return max(1, min(64, 64 * 256 ** 2 // generator.resolution ** 2))


class Networks:
    """A domain's frozen generator and CLIP, convolving in ``dtype``; what they return is float32."""

    def __init__(self, domain: Domain, dtype: str):
        self.dtype = getattr(torch, dtype)
        self.generator, self.guide = domain.generator, domain.clip.in_dtype(self.dtype)

    def synthesise(self, w: Tensor) -> Tensor:
        """w [N, L, D] -> pictures [N, 3, R, R]."""
        return self.generator.synthesis(w, dtype=None if self.dtype == torch.float32 else self.dtype)

    def clip(self, images: Tensor, draws: int = 0) -> Tensor:
        """Pictures [N, 3, R, R] in [-1, 1] -> unit CLIP features [N, E], or of so many perspective views of each [draws * N, E]."""
        views = perspective_views(images, draws, then=self.guide.preprocess)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            feature = self.guide.encode_image(views, preprocessed=True)
        return torch.nn.functional.normalize(feature.float(), dim=-1)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a run has whatever its prompts are; see :class:`CFCLIPConfig`."""

    source_text: str | None = None           # default: the domain's
    steps: int = 50_000
    batch: int = 2
    micro_batch: int | None = None           # pictures of a batch that are held at a time: the same step in less memory; None: all
    lr: float = 0.5                          # of Ranger
    lambda_id: float = 0.2
    lambda_l2: float = 0.8
    lambda_nce: float = 0.3                  # of the objective, whichever it is
    lambda_perc: float = 0.0                 # VGG19 distance to the source; the paper's for dogs and cats: 0.02, and no lambda_id
    temperature: float = 0.1                 # tau
    draws: int = 8                           # perspective views of every edited image; 0: the image itself
    objective: str = "nce"                   # "clip": StyleCLIP's single loss; "directional": StyleGAN-NADA's
    positives: tuple[str, ...] = ("text", "target")
    negatives: str = "first"                 # see losses.clip_nce
    negative_templates: int | None = None    # None: all 79
    query: str = "difference"
    text_mapper: bool = True                 # False: StyleCLIP's mapper, which sees no text
    levels: tuple[str, ...] = ("coarse", "medium", "fine")
    norm_axis: str = "layer"                 # as published; "channel" lets more than the signs of the text through
    train_latents: int = 512
    seed: int = 0
    dtype: str = "float32"                   # of the convolutions; "auto": bfloat16 where this machine is clearly faster in it

    def __post_init__(self):
        check_whole(self, steps=1, batch=1, train_latents=1, draws=0)
        if self.micro_batch is not None:
            check_whole(self, micro_batch=1)
        for name, known in (("objective", OBJECTIVES), ("negatives", NEGATIVES), ("query", QUERIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if not self.positives or set(self.positives) - set(POSITIVES):
            raise ValueError(f"positives must be some of {POSITIVES}, not {self.positives!r}")
        if self.negative_templates is not None:
            check_whole(self, negative_templates=1)
        check_dtype(self.dtype)


@dataclass(frozen=True)
class CFCLIPConfig(TrainingConfig):
    """One run of CF-CLIP. The defaults are the paper's for faces, but for ``train_latents``: its are 30 000 files of codes."""

    prompt: str                              # target text, e.g. "green lipstick"

    prompts_at_once: ClassVar[int] = 1
    ramp_down: ClassVar[float] = 0.0

    @property
    def prompts(self) -> tuple[str, ...]:
        """What a step draws from."""
        return (self.prompt,)


@dataclass
class CFCLIP:
    """A mapper in training: ``step(i)`` is one optimisation step (pass it to :func:`cfclip.training.fit`).

    What does not change is computed once: the text features, and the source's CLIP and identity features per latent.
    ``config`` is a :class:`CFCLIPConfig` or a :class:`cfclip.multiprompt.MultiPromptConfig`; P is the number of its prompts.
    """

    domain: Domain
    config: TrainingConfig
    mapper: Mapper = field(init=False)
    optimizer: Ranger = field(init=False)

    def __post_init__(self):
        self.config = settled(self.config, self.domain.device)
        domain, c = self.domain, self.config
        check_networks(domain, c)
        self.text_feature = domain.clip.encode_text(c.prompts)                            # [P, E], raw
        self.target_text = torch.stack([domain.clip.template_features(prompt) for prompt in c.prompts])     # [P, T, E]
        self.source_text = domain.clip.template_features(c.source_text or domain.source_text)
        torch.manual_seed(c.seed)
        g = domain.generator
        text_dim = domain.clip.embed_dim if c.text_mapper else None
        self.mapper = Mapper(MapperConfig(g.num_ws, g.w_dim, text_dim, c.levels, c.norm_axis)).to(domain.device)
        self.optimizer = Ranger(self.mapper.parameters(), lr=c.lr, betas=(0.95, 0.999), eps=1e-5, k=6, alpha=0.5,
                                degenerated_to_sgd=True)
        self.networks = Networks(domain, c.dtype)
        self.w = domain.latents(c.train_latents, "train", c.seed)
        with torch.no_grad():
            pairs = [self._features(self.networks.synthesise(w)) for w in self.w.split(at_once(g))]
        self.source_clip = torch.cat([clip for clip, _ in pairs])
        self.source_id = None if domain.identity is None else torch.cat([identity for _, identity in pairs])

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.networks.clip(images), None if self.domain.identity is None else self.domain.identity(images)

    def draw(self) -> list[int]:
        """Which prompts a step is for: ``prompts_at_once`` different ones. Where there is one prompt this takes no random numbers."""
        count = len(self.config.prompts)
        return [0] if count == 1 else torch.randperm(count)[:self.config.prompts_at_once].tolist()

    def objective(self, prompt: int, edited: Tensor, source: Tensor, first: Tensor) -> Tensor:
        """The loss that pulls towards that prompt, a mean over rows.

        edited: unit CLIP features of the views of the edited pictures [draws * B, E]; source: of the sources [B, E]; first: of the first one of
        all that are edited by the prompt in this step [1, E].
        """
        c, target_text = self.config, self.target_text[prompt]
        if c.objective == "clip":
            return clip_distance(edited, torch.nn.functional.normalize(self.text_feature[prompt, None], dim=-1))
        if c.objective == "directional":
            return directional(edited, source, target_text, self.source_text)
        return clip_nce(edited, source, target_text, self.source_text, c.temperature, positives=c.positives, negatives=c.negatives,
                        query=c.query, negative_templates=c.negative_templates, first=first)

    def losses(self, index: Tensor, prompts: Tensor, first: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Every term of the loss, unweighted, and their weighted sum "loss"; means over pictures.

        index, prompts: [B], which latents are edited by which prompts; first: prompt -> s_0, see :meth:`objective`.
        """
        c, w = self.config, self.w[index]
        w_edited = self.mapper.edit(w, self.text_feature[prompts])
        edited = self.networks.synthesise(w_edited)
        views = self.networks.clip(edited, c.draws).unflatten(0, (-1, len(index)))       # [draws, B, E]
        towards = torch.zeros((), device=w.device)
        for prompt, s_0 in first.items():
            if (mine := prompts == prompt).any():
                towards = towards + mine.float().mean() * self.objective(prompt, views[:, mine].flatten(0, 1), self.source_clip[index][mine], s_0)
        found = {c.objective: towards, "l2": latent_l2(w_edited, w)}
        loss = c.lambda_nce * found[c.objective] + c.lambda_l2 * found["l2"]
        if c.lambda_id:
            found["id"] = identity_loss_from_features(self.domain.identity(edited), self.source_id[index])
            loss = loss + c.lambda_id * found["id"]
        if c.lambda_perc:
            with torch.no_grad():                                  # drawn again: all sources at once would not fit in memory
                source = self.networks.synthesise(w)
            found["perc"] = perceptual_loss(self.domain.perceptual, edited, source)
            loss = loss + c.lambda_perc * found["perc"]
        return {"loss": loss} | found

    def step(self, i: int) -> dict[str, float]:
        """One step on a batch of training latents: ``lambda_id L_id + lambda_perc L_perc + lambda_L2 L_2 + lambda_NCE L_NCE``.

        With another ``objective`` its loss stands in the place of L_NCE, and in the log under its name. Several prompts at once share
        the batch in equal parts, each part with a loss of its own, and those losses' mean is taken. The parts of a ``micro_batch`` see
        the same warps, and their gradients add up to the batch's.
        """
        c = self.config
        if c.ramp_down:
            for group in self.optimizer.param_groups:
                group["lr"] = c.lr * learning_rate(i / c.steps, 0, c.ramp_down)
        index = torch.randint(len(self.w), (c.batch,))
        drawn = self.draw()
        prompts = torch.tensor(drawn).repeat_interleave(c.batch // len(drawn))
        first = {prompt: self.source_clip[index[prompts == prompt][:1]] for prompt in drawn}
        self.optimizer.zero_grad()
        logs, warps = Counter(), torch.get_rng_state()
        for rows in torch.arange(c.batch).split(c.micro_batch or c.batch):
            torch.set_rng_state(warps)
            found = self.losses(index[rows], prompts[rows], first)
            share = len(rows) / c.batch
            (share * found["loss"]).backward()
            logs.update({name: share * value.item() for name, value in found.items()})
        self.optimizer.step()
        return dict(logs)


def train_mapper(domain: Domain, config: TrainingConfig, out: str | os.PathLike | None = None, callbacks: Iterable[Callback] = (),
                 progress: bool = True) -> tuple[Mapper, list[dict[str, float]]]:
    """Train a mapper for the config's prompt (or prompts); returns it (frozen, eval) with the logged rows.

    With ``out`` the run keeps ``log.jsonl``, a checkpoint to resume from and finally ``mapper.safetensors`` there.
    """
    run = CFCLIP(domain, settled(config, domain.device, out))
    desc = config.prompts[0] if len(config.prompts) == 1 else f"{len(config.prompts)} prompts"
    rows = fit(run.step, config.steps, state={"mapper": run.mapper, "optimizer": run.optimizer}, out=out, seed=config.seed,
               callbacks=callbacks, checkpoint_every=500, desc=desc, progress=progress)
    mapper = run.mapper.eval().requires_grad_(False)
    if out is not None:
        weights.save(mapper, f"{out}/mapper.safetensors", "mapper", mapper.metadata, store_as=torch.float16,
                     domain=domain.name, **asdict(run.config))
    return mapper, rows


def find_mappers(folder: str | os.PathLike, prompts: Sequence[str] = ()) -> dict[str, Mapper]:
    """prompt -> mapper, for every ``*.safetensors`` mapper in ``folder`` or a folder of it; ``prompts`` chooses and orders.

    Raises ValueError if there is none, or none for one of ``prompts``.
    """
    found = {}
    for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*/mapper.safetensors")]):
        _, _, card = weights.read(path, "mapper")
        found[card.get("prompt", path.stem)] = load_mapper(path)
    if not found:
        raise ValueError(f"no mapper in {folder}: train one with 02_training, out=<a folder in there>")
    if missing := [prompt for prompt in prompts if prompt not in found]:
        raise ValueError(f"no mapper for {missing} in {folder}; there are mappers for {list(found)}")
    return {prompt: found[prompt] for prompt in prompts or found}
