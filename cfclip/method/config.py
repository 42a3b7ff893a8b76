"""The settings of a training. The defaults of :class:`CFCLIPConfig` are the paper's for faces."""

import math
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
"""Weight of the squared changes of layers that a prompt must not change."""


def objective_or_error(value: Any) -> str | None:
    """The check of an objective."""
    known = ", ".join(f"{one.__name__}()" for one in OBJECTIVES.values())
    return None if isinstance(value, Objective) else f"one of {known}"


def weights_or_none(value: Any) -> str | None:
    """The check of the guides' weights."""
    fine = value is None or (isinstance(value, tuple) and value and not any(map(number(above=True), value)))
    return None if fine else "None, or a list of finite numbers above 0"


def forms_or_error(value: Any) -> str | None:
    """The check of ``forms``, see :class:`MultiPromptConfig`."""
    forms = value if isinstance(value, tuple) else ()
    fine = forms and all(isinstance(form, str) and form.count("{}") == 1 for form in forms)
    return None if fine else 'texts with one {} each, such as ("{}", "a face with {}")'


@dataclass(frozen=True, kw_only=True)
class GuidedConfig(Settings):
    """Which of a domain's guides are used. The loss is the weighted mean of the guides' losses."""

    guides: int = setting(1, int_at_least(1))  # number of guides, the domain's first ones; published: 1
    guide_weights: tuple[float, ...] | None = setting(None, weights_or_none)  # one per guide; None: all equal

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
    # pictures of a batch that are in memory at a time; None: all. The result of a step is the same
    micro_batch: int | None = setting(None, int_at_least(1, optional=True))
    optimizer: str = setting("ranger", one_of(("ranger", "adam")))
    lr: float = setting(0.5, number(above=True))
    objective: Objective = setting(CLIPNCE(), objective_or_error)
    lambda_nce: float = setting(0.3, number())  # weight of the objective, whichever it is
    lambda_id: float = setting(0.2, number())
    lambda_l2: float = setting(0.8, number())
    # weight of the change in the domain's `perceptual`; the paper's dogs and cats: 0.02, with lambda_id 0
    lambda_perc: float = setting(0.0, number())
    # upper limit of the loss of a pixel, so that edits need not be pale; None: no limit, as published
    perc_limit: float | None = setting(None, number(above=True, optional=True))
    # strength of the edits in training; published: 1. After training with 0.5, strength 1 edits twice as far
    train_strength: float = setting(1.0, number(above=True))
    # perspective views of each edited image; 0: the image itself
    num_views: int = setting(8, int_at_least(0, maximum=1000))
    text_mapper: bool = setting(True, flag)  # False: StyleCLIP's mapper, which is not conditioned on text
    # what the mapper reads: CLIP's feature of the prompt, as published, or its words
    text: str = setting("pooled", one_of(TEXTS))
    levels: tuple[str, ...] = setting(LEVELS, some_of(LEVELS))  # layer groups of W+ that are edited
    norm_axis: str = setting("layer", one_of(NORM_AXES))  # published: only signs of the text feature matter
    train_latents: int = setting(512, int_at_least(1, maximum=10**6))
    seed: int = setting(0, seed_number)
    # of convolutions; "auto": bfloat16 where it is clearly faster
    dtype: str = setting("float32", one_of(DTYPES))

    def weighted(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term times its weight. Terms: "l2", "id", "perc", "silence" and the objective's name."""
        weights = {self.objective.name: self.lambda_nce, "l2": self.lambda_l2, "id": self.lambda_id}
        weights |= {"perc": self.lambda_perc, "silence": SILENCE}
        return {name: weights[name] * term for name, term in terms.items()}


@dataclass(frozen=True)
class CFCLIPConfig(TrainingConfig):
    """CF-CLIP for one prompt. All defaults are the paper's, except ``train_latents`` (paper: 30 000)."""

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
    """Many prompts. PixelNorm is over channels; over layers it passes only the signs of a text feature."""

    prompts: tuple[str, ...] = setting(MISSING, lambda value: None)
    # the mapper reads a prompt in a random one of these forms; the loss uses the prompt without them
    forms: tuple[str, ...] = setting(("{}",), forms_or_error)
    # prompts that ask for shapes: they change only coarse and medium layers; other prompts change ``levels``
    shapes: tuple[str, ...] = setting((), lambda value: None)
    # share of ``shapes`` in the prompts of a step, rounded to whole prompts; None: drawn as often as others
    shape_share: float | None = setting(None, number(0, 1, optional=True))
    # train a prompt only on faces that it asks to change: they have the part, or do not yet have the shape
    applicable_only: bool = setting(False, flag)
    prompts_at_once: int = setting(1, int_at_least(1))  # in a step; they share its batch equally
    # lr falls to 0 along a cosine over this share of the steps, at the end
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


def card_of(method: str, domain: str, config: Settings, success: float | None = None) -> dict[str, Any]:
    """The card in the file of an editor, see :class:`.Trained`.

    success: the share of held-out faces on which it succeeds; None or NaN if that was not measured.
    """
    card = {"method": method, "domain": domain, "training": flat(config)}
    return card if success is None or math.isnan(success) else card | {"success": float(success)}


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
