"""A pack: many trainings in lock-step, which share every pass of the frozen networks.

M trainings; other letters as in :mod:`.trainer`. Each keeps its own random numbers, optimiser's state, log,
checkpoint and end, so that its result is that of the training alone, to rounding: no operator mixes pictures.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from cfclip.method.config import CFCLIPConfig, TrainingConfig
from cfclip.method.loop import Loop, Request
from cfclip.method.networks import Sources
from cfclip.method.objectives import Features
from cfclip.method.trainer import (
    OPTIMIZERS,
    Batch,
    Edit,
    MapperTrainer,
    Seen,
    joined,
    losses_together,
    numbers,
    sent,
)
from cfclip.method.views import draw_corners, perspective_coefficients


def packable(config: TrainingConfig) -> bool:
    """Whether such a training can be one of a pack: of one prompt, and with its whole batch at a time."""
    return isinstance(config, CFCLIPConfig) and (config.micro_batch or config.batch) >= config.batch


def shared(config: TrainingConfig) -> tuple[str, int]:
    """What the trainings of a pack have in common, beside their domain: the dtype and the guides."""
    return config.dtype, config.guides


class Stack:
    """M trainings that differ in prompt, source text, seed and length alone: one mapper, one optimiser.

    Its weights are those of the mappers, stacked along a new first dim; ``lead`` is the first training. The
    members' own mappers and optimisers are renewed by :meth:`give_back`.
    """

    def __init__(self, members: Sequence[MapperTrainer]):
        self.members, self.lead = list(members), members[0]
        self.config, self.domain, self.networks = self.lead.config, self.lead.domain, self.lead.networks
        each = [dict(member.mapper.named_parameters()) for member in members]
        buffers = [dict(member.mapper.named_buffers()) for member in members]
        weights = {name: torch.stack([one[name].detach() for one in each]) for name in each[0]}
        self.weights = {name: weight.requires_grad_() for name, weight in weights.items()}
        self.buffers = {name: torch.stack([one[name] for one in buffers]) for name in buffers[0]}
        self.own = [list(one.values()) for one in each]  # in the order of ``weights``
        distinct = list({id(member.sources): member.sources for member in members}.values())
        parts = zip(*distinct, strict=True)
        self.sources = Sources(*(None if some[0] is None else joined(some) for some in parts))
        starts = accumulate((len(one.w) for one in distinct), initial=0)
        start_of = {id(one): start for one, start in zip(distinct, starts, strict=False)}
        self.starts = [start_of[id(member.sources)] for member in members]
        self.text_feature = torch.stack([member.text_feature for member in members])  # [M, 1, …]
        texts = [member.texts(0) for member in members]
        self.texts = [torch.stack(parts) for parts in zip(*texts, strict=True)]  # [M, 1, E], [M, T, E] twice
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        """The members' in one: all that it does is done element by element, but for :meth:`descend`."""
        c, lead = self.config, self.lead.optimizer
        given = {"use_gc": False} if c.optimizer == "ranger" else {}
        optimizer = OPTIMIZERS[c.optimizer](list(self.weights.values()), lr=c.lr, **given)
        optimizer.param_groups[0].update(_settings(lead))
        for k, weight in enumerate(self.weights.values()):
            states = [
                member.optimizer.state.get(own[k], {})
                for member, own in zip(self.members, self.own, strict=True)
            ]
            if states[0]:  # else no step was taken
                optimizer.state[weight] = {
                    name: torch.stack([state[name] for state in states]) if value.ndim else value.clone()
                    for name, value in states[0].items()
                }
        return optimizer

    @torch.no_grad()
    def give_back(self, members: Collection[MapperTrainer]) -> None:
        """Make the mappers and optimisers of these ``members`` what they are after the steps of the stack."""
        for k, (member, own) in enumerate(zip(self.members, self.own, strict=True)):
            if member not in members:
                continue
            member.optimizer.param_groups[0].update(_settings(self.optimizer))
            for parameter, weight in zip(own, self.weights.values(), strict=True):
                parameter.copy_(weight[k])
                if state := self.optimizer.state.get(weight):
                    member.optimizer.state[parameter] = {
                        name: (value[k] if value.ndim else value).clone() for name, value in state.items()
                    }

    def draw(self, *generators: Generator) -> Batch:
        """As :meth:`MapperTrainer.draw`, for each member with its own random numbers."""
        c, size = self.config, (self.domain.generator.resolution,) * 2
        index, corners = [], []
        for member, start, generator in zip(self.members, self.starts, generators, strict=True):
            index.append(torch.randint(len(member.w), (c.batch,), generator=generator) + start)
            corners.append(draw_corners(c.num_views, *size, generator=generator))
        perspectives = perspective_coefficients(torch.stack(corners, 1), *size)  # [V, M, 8]
        perspectives = sent(perspectives.repeat_interleave(c.batch, 1), self.domain.device)
        index = sent(torch.cat(index), self.domain.device)
        return Batch(index, torch.zeros_like(index), self.text_feature, {}, perspectives)

    def _apart(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """[M B, …] -> [M, B, …]; ``dim``: where M B is."""
        return tensor.unflatten(dim, (len(self.members), -1)).movedim(dim, 0)

    def edit(self, batch: Batch) -> Edit:
        """What the mappers make of their batches."""

        def of_one(weights, buffers, w, text):
            inputs = w, text, self.config.train_strength
            return functional_call(self.lead.mapper, (weights, buffers), inputs)

        w = self.sources.w[batch.index]
        mapped = torch.vmap(of_one)(self.weights, self.buffers, self._apart(w), batch.text).flatten(0, 1)
        return Edit(w, mapped, mapped)

    def terms(self, batch: Batch, edit: Edit, seen: Seen) -> dict[str, Tensor]:
        """As :meth:`MapperTrainer.terms`, for each member: [M]."""

        def of_one(features, edit, seen):
            return self.lead.weighted(self.lead.pull(features), edit, seen)

        source, views = self._apart(self.sources.clip[batch.index]), self._apart(seen.views, 1)
        features = Features(views.flatten(1, 2), source, *self.texts, source[:, :1])
        judged = tree_map(self._apart, (seen.identity, seen.perceptual))
        return torch.vmap(of_one)(features, tree_map(self._apart, edit), Seen(views, *judged))

    def descend(self) -> None:
        """The optimiser's step. Ranger centralises the gradient of each member's own matrices."""
        if self.config.optimizer == "ranger":
            for weight in self.weights.values():
                if weight.grad is not None and weight.ndim > 2:
                    weight.grad -= weight.grad.mean(tuple(range(2, weight.ndim)), keepdim=True)
        self.optimizer.step()


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return {name: value for name, value in group.items() if name != "params"}


def stacked(asked: Mapping[MapperTrainer, Request]) -> list[MapperTrainer | Stack]:
    """The trainings, those that are alike and at the same step in a :class:`Stack`."""
    alike: dict[tuple, list[MapperTrainer]] = {}
    for run, request in asked.items():
        like = replace(run.config, prompt="any", source_text=None, seed=0, steps=1, train_latents=1)
        kind = type(run), str(like), request.step, run.text_feature.shape, id(run.networks)
        alike.setdefault(kind, []).append(run)
    return [some[0] if len(some) == 1 else Stack(some) for some in alike.values()]


class Pack:
    """Trainings that take their steps together, and share the passes of those that share their networks."""

    def __init__(self) -> None:
        self.units: list[MapperTrainer | Stack] = []
        self.members: list[MapperTrainer] = []

    def step(self, asked: Mapping[MapperTrainer, Request]) -> dict[MapperTrainer, dict[str, float | Tensor]]:
        """One step of each training, as its loop asks for it -> the numbers to log."""
        if list(asked) != self.members:
            self.give_back(asked)  # those that have ended may be something else by now
            self.units, self.members = stacked(asked), list(asked)
        members = [unit.members if isinstance(unit, Stack) else [unit] for unit in self.units]
        batches = [
            unit.draw(*(asked[run].random for run in some))
            for unit, some in zip(self.units, members, strict=True)
        ]
        terms = self._losses(batches)
        for unit in self.units:
            unit.optimizer.zero_grad()
        torch.stack([one["loss"].sum() for one in terms]).sum().backward()
        for unit in self.units:
            unit.descend()
        if any(request.shown for request in asked.values()):
            self.give_back(asked)
        logs = {}
        for some, one in zip(members, terms, strict=True):
            each = zip(*(value.reshape(-1).unbind() for value in one.values()), strict=True)
            for run, own in zip(some, each, strict=True):
                logs[run] = numbers(dict(zip(one, own, strict=True)))
        return logs

    def _losses(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """The terms of each unit, a pass of those that share their networks."""
        together: dict[int, list[int]] = {}
        for k, unit in enumerate(self.units):
            together.setdefault(id(unit.networks), []).append(k)
        found: dict[int, dict[str, Tensor]] = {}
        for some in together.values():
            terms = losses_together([self.units[k] for k in some], [batches[k] for k in some])
            found |= zip(some, terms, strict=True)
        return [found[k] for k in range(len(batches))]

    def give_back(self, members: Collection[MapperTrainer]) -> None:
        """Renew the mappers and optimisers of these members."""
        for unit in self.units:
            if isinstance(unit, Stack):
                unit.give_back(members)


def run_together(loops: Iterable[Loop], desc: str = "pack", progress: bool = True) -> list[Any]:
    """Drive loops of :func:`.mapper_loop` to their ends as a pack: what each returns, or its error.

    A training that fails leaves the others as they are. What fails in a pass that they share is raised.
    """
    loops, pack, ended, asked = list(loops), Pack(), {}, {}

    def go_on(k: int, value: Any = None) -> Any:
        try:
            return loops[k].send(value)
        except StopIteration as end:
            ended[k] = end.value
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            ended[k] = error
        return None

    try:
        runs = {k: run for k in range(len(loops)) if (run := go_on(k)) is not None}
        asked = {k: request for k in runs if (request := go_on(k)) is not None}
        todo = sum(runs[k].config.steps - request.step for k, request in asked.items())
        with tqdm(total=todo, desc=desc, disable=not progress, mininterval=1.0) as bar:
            while asked:
                logs = pack.step({runs[k]: request for k, request in asked.items()})
                bar.update(len(asked))
                asked = {k: request for k in asked if (request := go_on(k, logs[runs[k]])) is not None}
    finally:
        for loop in loops:
            loop.close()  # it leaves its folder
    return [ended[k] for k in range(len(loops))]
