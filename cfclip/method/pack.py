"""A pack: many trainings in lock-step, which share every pass of the frozen networks.

M trainings; other letters as in :mod:`.trainer`. Each has its own random numbers, optimiser state, log,
checkpoint and number of steps, and no operator mixes pictures. The result of each is therefore the same as if
it ran alone, up to rounding.
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
    """Whether such a training can be in a pack: one prompt, and no ``micro_batch`` below the batch."""
    return isinstance(config, CFCLIPConfig) and (config.micro_batch or config.batch) >= config.batch


def shared(config: TrainingConfig) -> tuple[str, int]:
    """What the trainings of a pack have in common, besides their domain: dtype and number of guides."""
    return config.dtype, config.guides


class Stack:
    """M trainings that differ only in prompt, source text, seed, steps and train_latents, with one optimiser.

    The weights of their mappers are stacked along a new first dim; ``lead`` is the first training. The
    members' own mappers and optimisers do not change until :meth:`give_back` updates them.
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
        """One optimiser with all members' states. It works element by element, except in :meth:`descend`."""
        c, lead = self.config, self.lead.optimizer
        given = {"use_gc": False} if c.optimizer == "ranger" else {}
        optimizer = OPTIMIZERS[c.optimizer](list(self.weights.values()), lr=c.lr, **given)
        optimizer.param_groups[0].update(_settings(lead))
        for k, weight in enumerate(self.weights.values()):
            states = [
                member.optimizer.state.get(own[k], {})
                for member, own in zip(self.members, self.own, strict=True)
            ]
            if states[0]:  # otherwise no step was taken
                optimizer.state[weight] = {
                    name: torch.stack([state[name] for state in states]) if value.ndim else value.clone()
                    for name, value in states[0].items()
                }
        return optimizer

    @torch.no_grad()
    def give_back(self, members: Collection[MapperTrainer]) -> None:
        """Copy the weights and the optimiser state of the stack into these ``members``."""
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
        """[M B, …] -> [M, B, …]; with ``dim`` = 1 [V, M B, …] -> [M, V, B, …]."""
        return tensor.unflatten(dim, (len(self.members), -1)).movedim(dim, 0)

    def edit(self, batch: Batch) -> Edit:
        """Edit the codes of each member's batch with its mapper."""

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
        """Take the optimiser's step. For Ranger, first centralise the gradient of each member's matrices."""
        if self.config.optimizer == "ranger":
            for weight in self.weights.values():
                if weight.grad is not None and weight.ndim > 2:
                    weight.grad -= weight.grad.mean(tuple(range(2, weight.ndim)), keepdim=True)
        self.optimizer.step()


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return {name: value for name, value in group.items() if name != "params"}


def stacked(asked: Mapping[MapperTrainer, Request]) -> list[MapperTrainer | Stack]:
    """The trainings; those that are alike and at the same step are combined in a :class:`Stack`."""
    alike: dict[tuple, list[MapperTrainer]] = {}
    for run, request in asked.items():
        like = replace(run.config, prompt="any", source_text=None, seed=0, steps=1, train_latents=1)
        kind = type(run), str(like), request.step, run.text_feature.shape, id(run.networks)
        alike.setdefault(kind, []).append(run)
    return [some[0] if len(some) == 1 else Stack(some) for some in alike.values()]


class Pack:
    """Trainings that take their steps together. Those with the same frozen networks share their passes."""

    def __init__(self) -> None:
        self.units: list[MapperTrainer | Stack] = []
        self.members: list[MapperTrainer] = []

    def step(self, asked: Mapping[MapperTrainer, Request]) -> dict[MapperTrainer, dict[str, float | Tensor]]:
        """Take the step that the loop of each training asks for. Returns each training's numbers to log."""
        if list(asked) != self.members:
            self.give_back(asked)  # not to trainings that have ended: they may have changed since
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
        """The terms of each unit; units with the same networks share their passes."""
        together: dict[int, list[int]] = {}
        for k, unit in enumerate(self.units):
            together.setdefault(id(unit.networks), []).append(k)
        found: dict[int, dict[str, Tensor]] = {}
        for some in together.values():
            terms = losses_together([self.units[k] for k in some], [batches[k] for k in some])
            found |= zip(some, terms, strict=True)
        return [found[k] for k in range(len(batches))]

    def give_back(self, members: Collection[MapperTrainer]) -> None:
        """Update the mappers and optimisers of these ``members`` from their stacks."""
        for unit in self.units:
            if isinstance(unit, Stack):
                unit.give_back(members)


def run_together(loops: Iterable[Loop], desc: str = "pack", progress: bool = True) -> list[Any]:
    """Drive loops of :func:`.mapper_loop` to their ends as a pack. Returns the result or error of each.

    A training that fails does not affect the others. An error in a shared pass, or lack of memory, is raised.
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
            loop.close()  # it unlocks its folder
    return [ended[k] for k in range(len(loops))]
