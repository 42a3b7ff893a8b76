"""What the trainings of the embedded networks share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfclip.method.loop import Callback, Step, described, run_loop
from cfclip.settings import Settings

CHECKPOINT_EVERY = 1000
"""Steps between two checkpoints."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start torch's global random numbers (CPU) from ``seed``; the caller's state is restored at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also re-seed the GPUs
        yield


def run_training(
    name: str,
    step: Step,
    config: Settings,
    state: Mapping[str, Any],
    out: Path,
    steps: int | None = None,
    callbacks: Iterable[Callback] = (),
    **what: str,
) -> None:
    """Run ``step(i, generator)``; resumes a training that was stopped in ``out``.

    steps: default ``config.steps``; what: also identifies the run, e.g. the networks that it is trained for.
    """
    options = {"state": state, "out": out, "seed": config.seed, "callbacks": callbacks, "desc": name}
    options["run"] = described(config, network=name, **what)
    steps = config.steps if steps is None else steps
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # all steps have pictures of one size
        run_loop(step, steps, checkpoint_every=CHECKPOINT_EVERY, **options)


Loss = Callable[[int, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]
"""Like a :data:`.Step`, but returns the loss to minimise and the numbers to log."""


def run_by_adamw(
    name: str, loss: Loss, config: Settings, networks: Mapping[str, nn.Module], out: Path, **what: str
) -> None:
    """:func:`run_training` of ``networks`` by AdamW, with one cycle of the learning rate."""
    parameters = [one for network in networks.values() for one in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.lr, fused=parameters[0].is_cuda)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)

    def step(i: int, generator: torch.Generator) -> dict[str, Tensor]:
        value, numbers = loss(i, generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        return {name: number.detach() for name, number in numbers.items()}

    state = {**networks, "optimizer": optimizer, "schedule": schedule}
    run_training(name, step, config, state, out, **what)


def sizes(value: Any) -> str | None:
    """The check of a tuple of channel counts."""
    fine = isinstance(value, tuple) and value and all(isinstance(n, int) and n >= 1 for n in value)
    return None if fine else "a list of whole numbers from 1"


def stages(value: Any) -> str | None:
    """The check of the stages of an IR-SE body."""
    fine = (
        isinstance(value, tuple) and value and all(len(one) == 3 and not sizes(tuple(one)) for one in value)
    )
    return None if fine else "a list of (in, out, units) with whole numbers from 1"
