"""CF-CLIP's training step: the mapper in training, and the terms of the loss.

Shapes: B pictures of a batch, L layers of W+, D = w_dim, R = resolution, V views, T templates, P prompts, E =
CLIP's embedding width. Unit vectors of several guides are concatenated: E is then the sum of their widths.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pytorch_optimizer import Ranger
from torch import Tensor, nn

from cfclip.checkpoints.mappers import save_mapper
from cfclip.domain import Domain, asked, fingerprint, warn_null_edit
from cfclip.method.config import TrainingConfig, card_of
from cfclip.method.loop import Loop, begin_run, described, drive, learning_rate, looped
from cfclip.method.losses import identity_loss, latent_l2, perceptual_loss
from cfclip.method.networks import FrozenNetworks, Sources, check_networks
from cfclip.method.objectives import Features
from cfclip.method.views import draw_perspectives
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

Networks = Callable[[str, int], FrozenNetworks]
OPTIMIZERS = {
    "ranger": partial(Ranger, betas=(0.95, 0.999), eps=1e-5, k=6, alpha=0.5, degenerated_to_sgd=True),
    "adam": partial(torch.optim.Adam, betas=(0.9, 0.99)),
}


def mapper_sizes(domain: Domain, config: TrainingConfig) -> MapperConfig:
    """The configuration of the mapper that is trained."""
    c, g = config, domain.generator
    text_dim = text_width(domain.clip, c.text) if c.text_mapper else None
    levels = tuple(name for name in LEVELS if name in c.levels or (c.shapes and name in SHAPE_LEVELS))
    return MapperConfig(g.num_ws, g.w_dim, text_dim, levels, c.norm_axis, domain.level_split, c.text)


# ---- one step, of one training or of many ----


class Batch(NamedTuple):
    """The random draws for a step, or for a part of its batch."""

    index: Tensor  # which latents [B]
    prompts: Tensor  # which prompt edits each latent [B]
    text: Tensor  # the mapper's text input [1 or B, …]; in a Stack [M, 1, …]
    first: Mapping[int, Tensor]  # prompt -> s_0 [1, E]: ``first`` of :meth:`MapperTrainer.features`
    perspectives: Tensor  # of the views [V, 8] or [V, B, 8], see :func:`draw_perspectives`

    def part(self, rows: Tensor) -> "Batch":
        """The pictures ``rows`` only, still with the perspectives and s_0 of the whole batch."""
        text = self.text if len(self.text) == 1 else self.text[rows]
        return self._replace(index=self.index[rows], prompts=self.prompts[rows], text=text)


class Edit(NamedTuple):
    """Codes before and after the mapper, [B, L, D] each."""

    w: Tensor
    mapped: Tensor
    free: Tensor  # mapped, but w in layers that the prompt may not change; pictures are made from this


class Seen(NamedTuple):
    """Features of the edited pictures and of their sources; empty where no loss needs them."""

    views: Tensor  # unit CLIP features of the edited pictures [V, B, E]
    identity: tuple[Tensor, ...] = ()  # unit features [B, I] of (edited, source)
    perceptual: tuple[Tensor, ...] = ()  # features [B, C, H, W] of (edited, source)


class Unit(Protocol):
    """Something that takes steps: a training, or a stack of M trainings with batches of M B pictures."""

    config: TrainingConfig
    networks: FrozenNetworks
    sources: Sources

    def edit(self, batch: Batch) -> Edit: ...

    def terms(self, batch: Batch, edit: Edit, seen: Seen) -> dict[str, Tensor]:
        """Each term of the loss, unweighted, and their weighted sum "loss": [] or [M]."""


def losses_together(units: Sequence[Unit], batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """The terms of each unit. All units share one pass of the generator and of each other frozen network."""
    networks = units[0].networks
    edits = [unit.edit(batch) for unit, batch in zip(units, batches, strict=True)]
    pictures = together(networks.synthesise, [edit.free for edit in edits])
    seen_in = [batch.perspectives for batch in batches]
    views = networks.encode(list(zip(pictures, seen_in, strict=True)))

    def asking(name: str) -> list[int]:
        return [k for k, unit in enumerate(units) if getattr(unit.config, name)]

    identity, perceptual = {}, {}
    if those := asking("lambda_id"):
        found = together(networks.domain.identity, [pictures[k] for k in those])
        source = [units[k].sources.identity[batches[k].index] for k in those]
        identity = dict(zip(those, zip(found, source, strict=True), strict=True))
    if those := asking("lambda_perc"):
        judge = networks.domain.perceptual
        found = together(judge, [pictures[k] for k in those])
        if all(units[k].sources.perceptual is not None for k in those):
            source = [units[k].sources.perceptual[batches[k].index] for k in those]
        else:
            with torch.no_grad():
                source = together(lambda w: judge(networks.synthesise(w)), [edits[k].w for k in those])
        perceptual = dict(zip(those, zip(found, source, strict=True), strict=True))
    return [
        unit.terms(batch, edit, Seen(views[k], identity.get(k, ()), perceptual.get(k, ())))
        for k, (unit, batch, edit) in enumerate(zip(units, batches, edits, strict=True))
    ]


def together(network: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """The output of ``network`` for each of ``batches``, computed in one pass."""
    return network(joined(batches)).split([len(batch) for batch in batches])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors concatenated along the first dim; a single tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for a GPU."""
    if device.type == "cpu":
        return tensor
    pins = device.type == "cuda" and torch.cuda.is_available()
    return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=True)


class MapperTrainer:
    """A mapper in training: ``step`` is one optimisation step, for :func:`cfclip.method.run_loop`.

    Everything constant is computed once: the text features, and the CLIP, identity and perceptual features of
    the sources. ``config`` is a :class:`CFCLIPConfig` or a :class:`MultiPromptConfig` of P prompts. The
    mapper begins with the weights of ``start``, or with random ones. ``networks``: (dtype, guides) -> frozen
    networks, which trainings may share. Raises ValueError if ``start`` or ``domain`` does not fit ``config``.
    """

    def __init__(
        self,
        domain: Domain,
        config: TrainingConfig,
        start: Mapper | None = None,
        networks: Networks | None = None,
    ):
        self.domain, self.config, c = domain, config, config
        check_networks(domain, c)
        if c.applicable_only and domain.truth is None:
            raise ValueError(f"applicable_only needs a ground truth, and domain {domain.name} has none")
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
        self.networks = (networks or partial(FrozenNetworks, domain))(c.dtype, c.guides)

    @cached_property
    def sources(self) -> Sources:
        """The codes to edit and their features. Computed at the first step, so not in a finished training."""
        c = self.config
        return self.networks.sources(c.train_latents, c.seed, c.lambda_perc > 0)

    @property
    def w(self) -> Tensor:
        """The codes to edit [N, L, D]."""
        return self.sources.w

    def first_mapper(self, start: Mapper | None) -> nn.Module:
        """The mapper before the first step."""
        sizes = mapper_sizes(self.domain, self.config)
        if start is None:
            return Mapper.initialised(sizes, torch.Generator().manual_seed(self.config.seed))
        if start.config != sizes:
            raise ValueError(f"the training is of {sizes}, but the mapper to start from has {start.config}")
        return copy.deepcopy(start).requires_grad_().train()

    def _free_layers(self) -> Tensor:
        """bool [P, L, 1]: layers that each prompt may change. Other changes are masked out, and penalised."""
        layers, c = level_slices(self.domain.level_split), self.config
        free = torch.zeros(len(c.prompts), self.domain.generator.num_ws, 1, dtype=torch.bool)
        for row, prompt in zip(free, c.prompts, strict=True):
            for name in SHAPE_LEVELS if prompt in c.shapes else c.levels:
                row[layers[name]] = True
        return free.to(self.domain.device)

    @cached_property
    @torch.no_grad()
    def applicable(self) -> list[Tensor]:
        """For each prompt the indices of the sources that it asks to change; all, if there are none."""
        truth = self.domain.truth
        parts = self.w.split(max_batch(self.domain.generator))
        seen = truth.measure(torch.cat([self.networks.synthesise(w) for w in parts]))
        found, every = [], torch.arange(len(self.w))
        for prompt in self.config.prompts:
            some = every[torch.from_numpy(asked(truth, prompt, seen))]
            found.append(some if len(some) else every)
        return found

    def silence(self) -> None:
        """Make each group of slots ignore words of the forms and of the other prompts, see :class:`Slots`.

        Words whose cosine with a word of the group's own prompts is 0.5 or more are not ignored. Called after
        the training.
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
        """Indices of ``prompts_at_once`` different prompts for a step. For one prompt nothing is drawn."""
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
        """The mapper's text input for the prompts ``chosen``, each in a random one of the forms."""
        c = self.config
        if len(c.forms) == 1:
            return self.text_feature if len(c.prompts) == 1 else self.text_feature[list(chosen)]
        forms = torch.randint(len(c.forms), (len(chosen),), generator=generator).tolist()
        texts = [c.forms[form].format(c.prompts[prompt]) for form, prompt in zip(forms, chosen, strict=True)]
        return self.mapper.read(self.domain.clip, texts)

    def features(self, prompt: int, views: Tensor, source: Tensor, first: Tensor) -> Features:
        """What the objective compares for one prompt.

        Unit CLIP features. views: of the edited pictures [V * B, E]; source: of the sources [B, E];
        first: of the first source in the whole batch that is edited by this prompt [1, E].
        """
        return Features(views, source, *self.texts(prompt), first)

    def texts(self, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features of the plain prompt [1, E]; of prompt and source text under the templates [T, E]."""
        plain = torch.cat([F.normalize(text[prompt, None], dim=-1) for text in self.prompt_text], -1)
        return plain, self.target_text[prompt], self.source_text

    def pull(self, features: Features) -> Tensor:
        """The objective: its weighted mean over the guides."""
        each = zip(self.config.guide_shares, features.of_guides(self.widths), strict=True)
        return sum(share * self.config.objective(one) for share, one in each)

    def draw(self, generator: torch.Generator) -> Batch:
        """Make all random draws of a step."""
        c = self.config
        index = torch.randint(len(self.w), (c.batch,), generator=generator)
        chosen = self.choose_prompts(generator)
        prompts = torch.tensor(chosen).repeat_interleave(c.batch // len(chosen))
        if c.applicable_only:
            among = [self.applicable[prompt] for prompt in prompts]
            index = torch.stack([some[i % len(some)] for some, i in zip(among, index, strict=True)])
        text = self.read(chosen, generator)
        if len(text) > 1:
            text = text.repeat_interleave(c.batch // len(chosen), 0)
        size, device = (self.domain.generator.resolution,) * 2, self.domain.device
        perspectives = sent(draw_perspectives(c.num_views, *size, generator=generator), device)
        starts = {prompt: k * (c.batch // len(chosen)) for k, prompt in enumerate(chosen)}
        index = sent(index, device)
        first = {prompt: self.sources.clip[index[start : start + 1]] for prompt, start in starts.items()}
        return Batch(index, prompts, text, first, perspectives)

    def edit(self, batch: Batch) -> Edit:
        """Edit the codes of the batch with the mapper."""
        w = self.w[batch.index]
        mapped = self.mapper.edit(w, batch.text, self.config.train_strength)
        free = mapped if self.free is None else torch.where(self.free[batch.prompts], mapped, w)
        return Edit(w, mapped, free)

    def terms(self, batch: Batch, edit: Edit, seen: Seen) -> dict[str, Tensor]:
        """Each term of the loss, unweighted, and their weighted sum "loss"; means over pictures."""
        source, pull = self.sources.clip[batch.index], torch.zeros((), device=edit.w.device)
        for prompt, s_0 in batch.first.items():
            mine = slice(None) if len(batch.first) == 1 else (batch.prompts == prompt).nonzero()[:, 0]
            if len(compared := source[mine]):
                views = seen.views[:, mine].flatten(0, 1)
                share = len(compared) / len(source)
                pull = pull + share * self.pull(self.features(prompt, views, compared, s_0))
        return self.weighted(pull, edit, seen)

    def weighted(self, pull: Tensor, edit: Edit, seen: Seen) -> dict[str, Tensor]:
        """The terms and "loss", as in :meth:`terms`: ``pull``, and the losses that limit the edit."""
        c = self.config
        terms = {c.objective.name: pull, "l2": latent_l2(edit.free, edit.w)}
        if self.free is not None:
            terms["silence"] = latent_l2(edit.mapped, edit.free)
        if c.lambda_id:
            terms["id"] = identity_loss(*seen.identity)
        if c.lambda_perc:
            terms["perc"] = perceptual_loss(*seen.perceptual, c.perc_limit)
        return {"loss": sum(c.weighted(terms).values())} | terms

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """:meth:`terms` of a batch, or of a part of one."""
        return losses_together([self], [batch])[0]

    def step(self, i: int, generator: torch.Generator) -> dict[str, float | Tensor]:
        """One step on a batch: ``lambda_nce L_NCE + lambda_l2 L_2 + lambda_id L_id + lambda_perc L_perc``.

        Another objective replaces L_NCE, and is logged under its name. L_NCE is a weighted mean over guides,
        and a mean over the step's prompts, which share the batch equally. With ``shapes`` there is also
        ``SILENCE L_silence``. The parts of a batch, if ``micro_batch`` is smaller, see the same perspectives,
        and their gradients add up to those of the batch. Returns the terms as floats, or as tensors on a GPU,
        which is not waited for.
        """
        c = self.config
        if c.ramp_down:
            for group in self.optimizer.param_groups:
                group["lr"] = c.lr * learning_rate(i / c.steps, 0, c.ramp_down)
        batch, logs = self.draw(generator), Counter()
        self.optimizer.zero_grad()
        for rows in torch.arange(c.batch).split(c.micro_batch or c.batch):
            terms = self.losses(batch if len(rows) == c.batch else batch.part(rows))
            share = len(rows) / c.batch
            (share * terms["loss"]).backward()
            logs.update({name: share * value for name, value in numbers(terms).items()})
        self.descend()
        return dict(logs)

    def descend(self) -> None:
        """Take the optimiser's step."""
        self.optimizer.step()


def numbers(terms: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """``terms`` to be logged: floats on a CPU, tensors without a graph on a GPU."""
    on_cpu = all(value.device.type == "cpu" for value in terms.values())
    return {name: value.item() if on_cpu else value.detach() for name, value in terms.items()}


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

    It begins with the weights of ``start``, e.g. the domain's mapper for many prompts, or with random ones.

    With ``out`` the folder gets ``log.jsonl``, a checkpoint from which a stopped run is resumed, and finally
    ``mapper.safetensors``, which records ``method``. ``loop``: more arguments of :func:`run_loop`, such as
    ``progress``, ``callbacks``, ``checkpoint_every``. If ``trainer`` trains something other than a
    :class:`Mapper`, the caller has to save it. Raises ValueError if ``out`` holds another run.
    """
    run, rows = driven(mapper_loop(domain, config, out, method, start, trainer, **loop))
    if out is not None and isinstance(run.mapper, Mapper):
        save_mapper(run.mapper, f"{out}/mapper.safetensors", **card_of(method, domain.name, run.config))
    return run.mapper, rows


def driven(loop: Loop) -> Any:
    """The result of ``loop``, see :func:`mapper_loop`. It first yields a trainer, or nothing at all."""
    try:
        run = next(loop)
    except StopIteration as end:
        return end.value
    return drive(loop, run.step)


def mapper_loop(
    domain: Domain,
    config: TrainingConfig,
    out: str | os.PathLike | None = None,
    method: str = "cfclip",
    start: Mapper | None = None,
    trainer: type[MapperTrainer] = MapperTrainer,
    networks: Networks | None = None,
    **loop: Any,
) -> Loop:
    """The training of :func:`train_mapper` as a generator, which does not save the mapper.

    It yields the trainer, then a :class:`.Request` for each step. Returns the trainer and the logged rows.
    """
    check_networks(domain, config)  # first: no folder should record a run that cannot start
    what_it_is = {"method": method, **domain.described}
    if start is not None:
        what_it_is["start"] = fingerprint(start)
    config = begin_run(config, domain.device, out, **what_it_is)
    run = trainer(domain, config, start, networks)
    yield run
    what = config.prompts[0] if len(config.prompts) == 1 else f"{len(config.prompts)} prompts"
    loop = {"checkpoint_every": 500, "desc": what} | loop
    loop |= {"out": out, "run": described(config, **what_it_is)}
    state = {"mapper": run.mapper, "optimizer": run.optimizer}
    rows = yield from looped(config.steps, state=state, seed=config.seed, **loop)
    run.mapper.eval().requires_grad_(False)
    if isinstance(run.mapper, WordMapper):
        run.silence()
    return run, rows
