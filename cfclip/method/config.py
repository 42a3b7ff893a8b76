"""What a training is: one dataclass, whose defaults are the paper's for faces."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from cfclip.method.objectives import CLIPNCE, OBJECTIVES, Objective
from cfclip.models.mapper import LEVELS, NORM_AXES, TEXTS
from cfclip.settings import (
    Settings,
    batch_size,
    check_known,
    defaults,
    flag,
    int_at_least,
    number,
    one_of,
    optional_text,
    seed_number,
    setting,
    some_of,
)
from cfclip.settings import text as any_text

DTYPES = ("auto", "float32", "bfloat16", "float16")
SILENCE = 3.0
"""Weight of the squared moves of layers that a prompt should leave alone."""


def objective_or_error(value: Any) -> str | None:
    """The check of an objective."""
    known = ", ".join(f"{one.__name__}()" for one in OBJECTIVES.values())
    return None if isinstance(value, Objective) else f"one of {known}"


def weights_or_none(value: Any) -> str | None:
    """The check of the guides' weights."""
    fine = value is None or (isinstance(value, tuple) and value and not any(map(number(above=True), value)))
    return None if fine else "None, or a list of finite numbers above 0"


def forms_or_error(value: Any) -> str | None:
    """The check of what a mapper reads in the place of prompts."""
    forms = value if isinstance(value, tuple) else ()
    fine = forms and all(isinstance(form, str) and form.count("{}") == 1 for form in forms)
    return None if fine else 'texts with one {} each, such as ("{}", "a face with {}")'


@dataclass(frozen=True, kw_only=True)
class GuidedConfig(Settings):
    """By which of a domain's guides an edit is found. Its loss is the weighted mean of each guide's own."""

    guides: int = setting(1, int_at_least(1))  # how many, the domain's first ones; published: 1
    guide_weights: tuple[float, ...] | None = setting(None, weights_or_none)  # one a guide; None: all alike

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.guide_weights
        if given is not None and len(given) != self.guides:
            raise ValueError(f"guide_weights must be one for each of guides = {self.guides}, not {given!r}")

    @property
    def guide_shares(self) -> tuple[float, ...]:
        """The weights, scaled to a sum of 1."""
        weights = self.guide_weights or (1.0,) * self.guides
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(GuidedConfig):
    """The settings of a training that do not depend on its prompts."""

    source_text: str | None = setting(None, optional_text)  # None: the domain's
    steps: int = setting(50_000, int_at_least(1))
    batch: int = setting(2, batch_size)
    # pictures of a batch that are in memory at a time; None: all. The step is the same
    micro_batch: int | None = setting(None, int_at_least(1, optional=True))
    optimizer: str = setting("ranger", one_of(("ranger", "adam")))
    lr: float = setting(0.5, number(above=True))
    objective: Objective = setting(CLIPNCE(), objective_or_error)
    lambda_nce: float = setting(0.3, number())  # weight of the objective, whichever it is
    lambda_id: float = setting(0.2, number())
    lambda_l2: float = setting(0.8, number())
    # of how much the domain's `perceptual` changes; the paper's dogs and cats: 0.02, with lambda_id 0
    lambda_perc: float = setting(0.0, number())
    # a pixel that changes by much more than this costs no more, so edits need not be pale; None: as published
    perc_limit: float | None = setting(None, number(above=True, optional=True))
    # of the edits that the loss sees; published: 1. With 0.5, strength 1 is twice as much as these
    train_strength: float = setting(1.0, number(above=True))
    # perspective views of each edited image; 0: the image itself
    num_views: int = setting(8, int_at_least(0, maximum=1000))
    text_mapper: bool = setting(True, flag)  # False: StyleCLIP's mapper, which is not conditioned on text
    # what the mapper reads: CLIP's feature of the prompt, as published, or its words
    text: str = setting("pooled", one_of(TEXTS))
    levels: tuple[str, ...] = setting(LEVELS, some_of(LEVELS))  # layer groups of W+ that are edited
    norm_axis: str = setting("layer", one_of(NORM_AXES))  # published: only the signs of the text pass
    train_latents: int = setting(512, int_at_least(1, maximum=10**6))
    seed: int = setting(0, seed_number)
    # of convolutions; "auto": bfloat16 where it is clearly faster
    dtype: str = setting("float32", one_of(DTYPES))

    def weighted(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term of the loss times its weight: "l2", "id", "perc", "silence", or the objective's name."""
        weights = {self.objective.name: self.lambda_nce, "l2": self.lambda_l2, "id": self.lambda_id}
        weights |= {"perc": self.lambda_perc, "silence": SILENCE}
        return {name: weights[name] * term for name, term in terms.items()}


@dataclass(frozen=True)
class CFCLIPConfig(TrainingConfig):
    """CF-CLIP for one prompt. All defaults are the paper's but ``train_latents``, where it has 30 000."""

    prompt: str = setting(MISSING, any_text)  # target text, e.g. "green lipstick"

    forms: ClassVar[tuple[str, ...]] = ("{}",)
    shapes: ClassVar[tuple[str, ...]] = ()
    applicable_only: ClassVar[bool] = False
    prompts_at_once: ClassVar[int] = 1
    ramp_down: ClassVar[float] = 0.0

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that a step chooses from."""
        return (self.prompt,)


@dataclass(frozen=True, kw_only=True)
class MultiPromptConfig(TrainingConfig):
    """Many prompts. PixelNorm is over channels: over layers only the signs of a text feature pass."""

    prompts: tuple[str, ...] = setting(MISSING, lambda value: None)
    # what the mapper reads in the place of a prompt, one form as often as another; the loss reads it plain
    forms: tuple[str, ...] = setting(("{}",), forms_or_error)
    # those that ask for shapes: they move only the coarse and medium layers, the others those of ``levels``
    shapes: tuple[str, ...] = setting((), lambda value: None)
    # the share of them in a step, as whole prompts; None: as often as the others
    shape_share: float | None = setting(None, number(0, 1, optional=True))
    # a prompt is trained on faces where it asks for something: that have the part, or not yet the shape
    applicable_only: bool = setting(False, flag)
    prompts_at_once: int = setting(1, int_at_least(1))  # of a step; they share its batch equally
    # share of the steps, at the end, over which a cosine takes lr to 0
    ramp_down: float = setting(0.0, number(0, 1))
    norm_axis: str = setting("channel", one_of(NORM_AXES))

    def __post_init__(self) -> None:
        super().__post_init__()
        texts = self.prompts if isinstance(self.prompts, tuple) else ()
        if not texts or len(set(texts)) < len(texts):
            raise ValueError(f"prompts must be different texts, at least one, not {self.prompts!r}")
        if not isinstance(self.shapes, tuple) or not set(self.shapes) <= set(self.prompts):
            raise ValueError(f"shapes must be some of the prompts, not {self.shapes!r}")
        if self.prompts_at_once > len(self.prompts) or self.batch % self.prompts_at_once:
            raise ValueError(
                f"prompts_at_once must divide the batch of {self.batch} and be at most the "
                f"{len(self.prompts)} prompts, not {self.prompts_at_once}"
            )
        draws = round((self.shape_share or 0) * self.prompts_at_once)
        colours = len(self.prompts) - len(self.shapes)
        others = self.prompts_at_once - draws
        if self.shape_share is not None and not (draws <= len(self.shapes) and others <= colours):
            raise ValueError(
                f"shape_share {self.shape_share:g} asks for {draws} of {len(self.shapes)} shapes and "
                f"{others} of {colours} other prompts in a step"
            )
        if not self.text_mapper:
            raise ValueError("text_mapper must be True: without text a mapper edits all prompts alike")


def flat(config: Settings) -> dict[str, Any]:
    """All settings as JSON-ready values: ``objective`` is a name, with its settings beside the others."""
    values = defaults(config)
    if isinstance(objective := values.get("objective"), Settings):
        values |= {"objective": objective.name, **defaults(objective)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def with_settings(config: Settings, given: Mapping[str, Any], fixed: tuple[str, ...] = ()) -> Settings:
    """``config`` with the settings ``given``, written as :func:`flat` writes them.

    ValueError names a setting that does not exist, that is ``fixed``, or whose value cannot work.
    """
    objective, own = getattr(config, "objective", None), {}
    if objective is not None:
        if (name := given.get("objective", objective.name)) not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {name!r}")
        objective = objective if name == objective.name else OBJECTIVES[name]()
        own = {name: given[name] for name in defaults(objective) if name in given}
    known = [name for name in (*defaults(config), *own) if name not in fixed]
    with_it = "" if objective is None else f" with objective {objective.name!r}"
    check_known(given, known, f"this method{with_it}")
    changed = {name: value for name, value in given.items() if name not in (*own, "objective")}
    if objective is not None:
        changed["objective"] = replace(objective, **own)
    return replace(config, **changed)
