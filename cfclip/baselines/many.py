"""Many fits at once: trainings of mappers that use the same networks take their steps together, as a pack."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import psutil
import torch

from cfclip.baselines.editor import Editor
from cfclip.baselines.mappers import MapperEditor
from cfclip.baselines.methods import METHODS, configure, fit_loop
from cfclip.domain import Domain
from cfclip.method.config import TrainingConfig
from cfclip.method.loop import Loop, resolve_dtype
from cfclip.method.networks import FrozenNetworks
from cfclip.method.pack import packable, run_together, shared
from cfclip.method.trainer import driven

logger = logging.getLogger(__name__)

MOST = {"cpu": 8, "cuda": 64}
"""The largest pack that still gains speed: 32 pictures keep a processor busy, 256 a GPU."""


@dataclass(frozen=True)
class Job:
    """One fit: the arguments of :func:`fit`."""

    method: str
    prompt: str
    out: str | os.PathLike | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> tuple[str, int] | None:
        """(dtype, guides), which jobs of a pack share beside their domain; None for a job done alone.

        Raises ValueError for settings that cannot work.
        """
        config = configure(self.method, self.prompt, **self.settings)
        mapper = issubclass(METHODS[self.method].editor, MapperEditor)
        return shared(config) if mapper and packable(config) else None

    def loop(self, domain: Domain, **loop: Any) -> Loop:
        """:func:`fit` as a generator, see :meth:`Editor.loop`."""
        return fit_loop(self.method, domain, self.prompt, self.out, self.settings, **loop)


def sensible_pack(domain: Domain, config: TrainingConfig) -> int:
    """How many trainings such as this one fit into the free memory, at most :data:`MOST`.

    Assumes 2.5 kB per pixel of a picture and 0.8 kB per pixel that a guide sees: about what was measured for
    FFHQ's step, and more than toonfaces' step takes.
    """
    on_cpu = domain.device.type == "cpu"
    free = psutil.virtual_memory().available / 2 if on_cpu else torch.cuda.mem_get_info(domain.device)[0]
    seen = sum(guide.image_size**2 for guide in domain.first_guides(config.guides))
    picture = 2500 * domain.generator.resolution**2 + 800 * seen * max(1, config.num_views)
    return max(1, min(MOST["cpu" if on_cpu else "cuda"], int(0.8 * free / (config.batch * picture))))


def fit_many(
    domain: Domain,
    jobs: Sequence[Job],
    pack: int | None = None,
    progress: bool = True,
    checkpoint_every: int | None = None,
) -> list[Editor | Exception]:
    """:func:`fit` of each job, or the error with which it failed; a failed job leaves the others alone.

    Jobs that train a mapper with the same dtype and guides are done ``pack`` at a time, which changes results
    only by rounding: see :mod:`cfclip.method.pack`. The default is :func:`sensible_pack`. A pack that fails,
    for example for lack of memory, is done again in packs of half its size. All other jobs are done one by
    one.
    """
    loop = {} if checkpoint_every is None else {"checkpoint_every": checkpoint_every}
    done: dict[int, Editor | Exception] = {}
    groups: dict[tuple[str, int], list[int]] = {}
    for k, job in enumerate(jobs):
        try:
            if (alike := job.shared) is not None:
                dtype, guides = alike
                groups.setdefault((resolve_dtype(dtype, domain.device), guides), []).append(k)
        except ValueError as error:
            done[k] = error
    networks = cache(partial(FrozenNetworks, domain))  # (dtype, guides) -> networks that all jobs share
    for members in groups.values():
        first = jobs[members[0]]
        size = pack or sensible_pack(domain, configure(first.method, first.prompt, **first.settings))
        while len(members) > 1 < size:
            some, rest = members[:size], members[size:]
            try:
                loops = [jobs[k].loop(domain, progress=False, networks=networks, **loop) for k in some]
                done |= zip(some, run_together(loops, f"{len(some)} trainings", progress), strict=True)
                members = rest
            except RuntimeError:  # e.g. out of memory
                size //= 2
                logger.warning("a pack of %d trainings failed; with %d on", len(some), size, exc_info=True)
            except (ValueError, OSError):  # one of them cannot work: below, each is done alone
                members = rest
    for k, job in enumerate(jobs):
        if k not in done:
            try:
                done[k] = driven(job.loop(domain, progress=progress, **loop))
            except (RuntimeError, ValueError, OSError) as error:
                done[k] = error
    return [done[k] for k in range(len(jobs))]
