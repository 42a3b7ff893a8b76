"""CF-CLIP's training step: the frozen networks, the mapper in training, and the objective's terms.

Shapes: B pictures of a batch, L layers of W+, D = w_dim, R = resolution, T templates, P prompts, E = CLIP's
embedding width. Several guides' unit vectors lie side by side in one of the sum of their widths.
"""

import copy
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_optimizer import Ranger
from torch import Tensor, nn

from cfclip.checkpoints.mappers import save_mapper
from cfclip.domain import Domain, fingerprint, warn_null_edit
from cfclip.method.config import GuidedConfig, TrainingConfig, flat
from cfclip.method.loop import begin_run, described, learning_rate, resolve_dtype, run_loop
from cfclip.method.losses import identity_loss_from_features, latent_l2, perceptual_loss
from cfclip.method.objectives import Features
from cfclip.method.views import each_view
from cfclip.models.clip import autocast
from cfclip.models.mapper import (
    LEVELS,
    SHAPE_LEVELS,
    Mapper,
    MapperConfig,
    WordMapper,
    level_slices,
    text_width,
)
from cfclip.models.stylegan2 import max_batch

SILENCE = 3.0
"""Weight of the squared moves of layers that a prompt should leave alone."""
OPTIMIZERS = {
    "ranger": partial(Ranger, betas=(0.95, 0.999), eps=1e-5, k=6, alpha=0.5, degenerated_to_sgd=True),
    "adam": partial(torch.optim.Adam, betas=(0.9, 0.99)),
}


def check_networks(domain: Domain, config: GuidedConfig) -> None:
    """ValueError that names a loss of ``config`` for which ``domain`` has no network, or not enough."""
    domain.first_guides(config.guides)
    for name, network, kind in (
        ("lambda_id", domain.identity, "identity"),
        ("lambda_perc", domain.perceptual, "perceptual"),
    ):
        if getattr(config, name, 0) and network is None:
            raise ValueError(
                f"{name} is {getattr(config, name):g}, but domain {domain.name} has no {kind} network: "
                f"set {name}=0 (notebooks/presets/ has the paper's values)"
            )


def mapper_sizes(domain: Domain, config: TrainingConfig) -> MapperConfig:
    """What the mapper of such a training is made of."""
    c, g = config, domain.generator
    text_dim = text_width(domain.clip, c.text) if c.text_mapper else None
    levels = tuple(name for name in LEVELS if name in c.levels or (c.shapes and name in SHAPE_LEVELS))
    return MapperConfig(g.num_ws, g.w_dim, text_dim, levels, c.norm_axis, domain.level_split, c.text)


class FrozenNetworks:
    """A domain's generator and first ``guides`` CLIPs, convolving in ``dtype``; they return float32."""

    def __init__(self, domain: Domain, dtype: str, guides: int = 1):
        self.dtype = getattr(torch, resolve_dtype(dtype, domain.device))
        self.half = None if self.dtype == torch.float32 else self.dtype
        self.generator = domain.generator
        self.guides = [guide.in_dtype(self.dtype) for guide in domain.first_guides(guides)]

    def synthesise(self, w: Tensor) -> Tensor:
        """w [N, L, D] -> pictures [N, 3, R, R]."""
        return self.generator.synthesis(w, dtype=self.half)

    def clip(self, images: Tensor, num_views: int = 0, generator: torch.Generator | None = None) -> Tensor:
        """Pictures [N, 3, R, R] in [-1, 1] -> unit CLIP features [N, E].

        With ``num_views`` those of random perspective views, [num_views * N, E], draw-major; all guides see
        the same ones.
        """
        views = [
            [guide.preprocess(view) for guide in self.guides]
            for view in each_view(images, num_views, generator=generator)
        ]
        with autocast(images.device, self.dtype):
            features = [
                guide.encode_image(torch.cat(seen), preprocessed=True)
                for guide, seen in zip(self.guides, zip(*views, strict=True), strict=True)
            ]
        return torch.cat([F.normalize(feature.float(), dim=-1) for feature in features], -1)


class MapperTrainer:
    """A mapper in training: ``step`` is one optimisation step, for :func:`cfclip.method.run_loop`.

    Whatever stays the same is computed once: the text features, and each latent's CLIP and identity features.
    ``config`` is a :class:`CFCLIPConfig` or a :class:`MultiPromptConfig` of P prompts. The mapper begins with
    the weights of ``start``, else with random ones. Raises ValueError for a ``start`` of other settings.
    """

    def __init__(self, domain: Domain, config: TrainingConfig, start: Mapper | None = None):
        self.domain, self.config, c = domain, config, config
        check_networks(domain, c)
        warn_null_edit(domain, c)
        guides = domain.first_guides(c.guides)
        self.widths = [guide.embed_dim for guide in guides]
        self.prompt_text = [guide.encode_text(c.prompts) for guide in guides]  # [P, E] of each guide, raw

        def under_templates(text: str) -> Tensor:  # [T, E]
            return torch.cat([guide.template_features(text) for guide in guides], -1)

        self.target_text = torch.stack([under_templates(prompt) for prompt in c.prompts])  # [P, T, E]
        self.source_text = under_templates(c.source_text or domain.source_text)  # [T, E]
        self.mapper = self.first_mapper(start).to(domain.device)
        self.free = self._free_layers() if c.shapes else None
        self.text_feature = self.mapper.read(domain.clip, [c.forms[0].format(prompt) for prompt in c.prompts])
        self.optimizer = OPTIMIZERS[c.optimizer](self.mapper.parameters(), lr=c.lr)
        self.networks = FrozenNetworks(domain, c.dtype, c.guides)
        self.w = domain.latents(c.train_latents, "train", c.seed)
        self.source_clip, self.source_id = self._encode_sources()

    def first_mapper(self, start: Mapper | None) -> nn.Module:
        """The mapper before the first step."""
        sizes = mapper_sizes(self.domain, self.config)
        if start is None:
            return Mapper.initialised(sizes, torch.Generator().manual_seed(self.config.seed))
        if start.config != sizes:
            raise ValueError(f"the training is of {sizes}, but the mapper to start from has {start.config}")
        return copy.deepcopy(start).requires_grad_().train()

    @torch.no_grad()
    def _encode_sources(self) -> tuple[Tensor, Tensor | None]:
        clip, identity = [], []
        for w in self.w.split(max_batch(self.domain.generator)):
            images = self.networks.synthesise(w)
            clip.append(self.networks.clip(images))
            if self.domain.identity is not None:
                identity.append(self.domain.identity(images))
        return torch.cat(clip), torch.cat(identity) if identity else None

    def _free_layers(self) -> Tensor:
        """bool [P, L, 1]: may a prompt move a layer? What it moves else is not seen, and unlearned."""
        layers, c = level_slices(self.domain.level_split), self.config
        free = torch.zeros(len(c.prompts), self.domain.generator.num_ws, 1, dtype=torch.bool)
        for row, prompt in zip(free, c.prompts, strict=True):
            for name in SHAPE_LEVELS if prompt in c.shapes else c.levels:
                row[layers[name]] = True
        return free.to(self.domain.device)

    def silence(self) -> None:
        """After the training: slots listen to no word that none of their prompts has, see :class:`Slots`.

        But for words that mean the same as one of theirs: those of a cosine above 0.5.
        """
        c, clip, half = self.config, self.domain.clip, self.mapper.config.text_dim // 2

        def words(texts: Iterable[str]) -> Tensor:
            read = [self.mapper.read(clip, text)[0, :, :half] for text in texts]
            return torch.cat(read).unique(dim=0)

        every = words([*c.prompts, *(form.format("") for form in c.forms if form != "{}")])
        for group in self.mapper.groups:
            draws = bool(c.shapes) and group is self.mapper.groups[0]
            spoken = words(prompt for prompt in c.prompts if (prompt in c.shapes) == draws)
            near = F.normalize(every, dim=1) @ F.normalize(spoken, dim=1).T
            group.silence(every[near.amax(1) < 0.5], spoken)

    def choose_prompts(self, generator: torch.Generator) -> list[int]:
        """The prompts of a step, ``prompts_at_once`` different ones. For one prompt nothing is drawn."""
        c = self.config
        if len(c.prompts) == 1:
            return [0]
        if not c.shapes or c.shape_share is None:
            return torch.randperm(len(c.prompts), generator=generator)[: c.prompts_at_once].tolist()
        draws = round(c.shape_share * c.prompts_at_once)
        kinds = {True: draws, False: c.prompts_at_once - draws}
        of = {drawn: [i for i, one in enumerate(c.prompts) if (one in c.shapes) == drawn] for drawn in kinds}
        return [
            of[drawn][k]
            for drawn, n in kinds.items()
            for k in torch.randperm(len(of[drawn]), generator=generator)[:n].tolist()
        ]

    def read(self, chosen: Sequence[int], generator: torch.Generator) -> Tensor:
        """What the mapper reads of the prompts ``chosen``, each in a random one of the forms."""
        c = self.config
        if len(c.forms) == 1:
            return self.text_feature[torch.tensor(chosen)]
        forms = torch.randint(len(c.forms), (len(chosen),), generator=generator).tolist()
        texts = [c.forms[form].format(c.prompts[prompt]) for form, prompt in zip(forms, chosen, strict=True)]
        return self.mapper.read(self.domain.clip, texts)

    def features(self, prompt: int, views: Tensor, source: Tensor, first: Tensor) -> Features:
        """What the objective compares for one prompt.

        views: unit CLIP features of the edited pictures [V * B, E]; source: of the sources [B, E]; first: of
            the first source of the whole batch that is edited by this prompt [1, E].
        """
        plain = torch.cat([F.normalize(text[prompt, None], dim=-1) for text in self.prompt_text], -1)
        return Features(views, source, plain, self.target_text[prompt], self.source_text, first)

    def pull(self, features: Features) -> Tensor:
        """The objective: the mean over guides, by their weights."""
        each = zip(self.config.guide_shares, features.of_guides(self.widths), strict=True)
        return sum(share * self.config.objective(one) for share, one in each)

    def losses(
        self,
        index: Tensor,
        prompts: Tensor,
        text: Tensor,
        first: Mapping[int, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Each term of the loss, unweighted, and their weighted sum "loss"; means over pictures.

        index, prompts: [B], which latents are edited by which prompts; text: what the mapper reads of them;
            first: prompt -> s_0, see :meth:`features`.
        """
        c, w = self.config, self.w[index]
        w_edited = self.mapper.edit(w, text)
        free = w_edited if self.free is None else torch.where(self.free[prompts], w_edited, w)
        edited = self.networks.synthesise(free)
        views = self.networks.clip(edited, c.num_views, generator).unflatten(0, (-1, len(index)))  # [V, B, E]
        pull = torch.zeros((), device=w.device)
        for prompt, s_0 in first.items():
            if (mine := prompts == prompt).any():
                compared = self.features(
                    prompt, views[:, mine].flatten(0, 1), self.source_clip[index][mine], s_0
                )
                pull = pull + mine.float().mean() * self.pull(compared)
        terms = {c.objective.name: pull, "l2": latent_l2(free, w)}
        loss = c.lambda_nce * pull + c.lambda_l2 * terms["l2"]
        if self.free is not None:
            terms["silence"] = latent_l2(w_edited, free)
            loss = loss + SILENCE * terms["silence"]
        if c.lambda_id:
            terms["id"] = identity_loss_from_features(self.domain.identity(edited), self.source_id[index])
            loss = loss + c.lambda_id * terms["id"]
        if c.lambda_perc:
            with torch.no_grad():  # synthesised again: features of all sources would not fit in memory
                source = self.networks.synthesise(w)
            terms["perc"] = perceptual_loss(self.domain.perceptual, edited, source)
            loss = loss + c.lambda_perc * terms["perc"]
        return {"loss": loss} | terms

    def step(self, i: int, generator: torch.Generator) -> dict[str, float]:
        """One step on a batch: ``lambda_nce L_NCE + lambda_l2 L_2 + lambda_id L_id + lambda_perc L_perc``.

        Another objective takes the place of L_NCE, and is logged under its name. Several guides have a loss
        each, and their weighted mean counts. Several prompts share the batch equally, each with a loss of its
        own; the mean of these counts. The parts of a ``micro_batch`` see the same perspectives, and their
        gradients add up to those of the batch.
        """
        c = self.config
        if c.ramp_down:
            for group in self.optimizer.param_groups:
                group["lr"] = c.lr * learning_rate(i / c.steps, 0, c.ramp_down)
        index = torch.randint(len(self.w), (c.batch,), generator=generator)
        chosen = self.choose_prompts(generator)
        prompts = torch.tensor(chosen).repeat_interleave(c.batch // len(chosen))
        text = self.read(chosen, generator).repeat_interleave(c.batch // len(chosen), 0)
        first = {prompt: self.source_clip[index[prompts == prompt][:1]] for prompt in chosen}
        self.optimizer.zero_grad()
        logs, perspectives = Counter(), generator.get_state()
        for rows in torch.arange(c.batch).split(c.micro_batch or c.batch):
            generator.set_state(perspectives)
            terms = self.losses(index[rows], prompts[rows], text[rows], first, generator)
            share = len(rows) / c.batch
            (share * terms["loss"]).backward()
            logs.update({name: share * value.item() for name, value in terms.items()})
        self.optimizer.step()
        return dict(logs)


def train_mapper(
    domain: Domain,
    config: TrainingConfig,
    out: str | os.PathLike | None = None,
    method: str = "cfclip",
    start: Mapper | None = None,
    trainer: type[MapperTrainer] = MapperTrainer,
    **loop: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a mapper for the prompt(s) of ``config``; returns it (frozen, eval mode) and the logged rows.

    It begins with the weights of ``start``, such as the domain's mapper of many prompts, else random ones.

    With ``out`` the folder gets ``log.jsonl``, a checkpoint from which a stopped run is resumed, and finally
    ``mapper.safetensors``, which says that ``method`` made it. ``loop``: more arguments of :func:`run_loop`,
    such as ``progress``, ``callbacks``, ``checkpoint_every``. A ``trainer`` of another kind of mapper saves
    it itself. Raises ValueError if ``out`` holds another run.
    """
    check_networks(domain, config)  # before the folder is marked as that of a run that cannot be
    what_it_is = {"method": method, **domain.described}
    if start is not None:
        what_it_is["start"] = fingerprint(start)
    config = begin_run(config, domain.device, out, **what_it_is)
    run = trainer(domain, config, start)
    what = config.prompts[0] if len(config.prompts) == 1 else f"{len(config.prompts)} prompts"
    loop = {"checkpoint_every": 500, "desc": what} | loop
    loop |= {"out": out, "run": described(config, **what_it_is)}
    state = {"mapper": run.mapper, "optimizer": run.optimizer}
    rows = run_loop(run.step, config.steps, state=state, seed=config.seed, **loop)
    mapper = run.mapper.eval().requires_grad_(False)
    if isinstance(mapper, WordMapper):
        run.silence()
    if out is not None and isinstance(mapper, Mapper):
        card = {"method": method, "domain": domain.name, "training": flat(config)}
        save_mapper(mapper, f"{out}/mapper.safetensors", **card)
    return mapper, rows
