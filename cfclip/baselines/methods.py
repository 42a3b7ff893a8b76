"""All methods by name: ``fit(method, domain, prompt) -> editor``.

StyleCLIP (Patashnik et al. 2021) as a mapper, as an optimisation per picture and as a global direction of
StyleSpace; StyleGAN-NADA (Gal et al. 2021) on a mapper and on the generator; CF-CLIP with a mapper, and with
one offset in its place. All see pictures through the domain's CLIP, or through several of its guides.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfclip.baselines.editor import Editor
from cfclip.baselines.mappers import MapperEditor
from cfclip.baselines.nada import GeneratorEditor, NADAGeneratorConfig
from cfclip.baselines.offset import OffsetEditor
from cfclip.baselines.optimization import OptimizationConfig, OptimizationEditor
from cfclip.baselines.stylespace import GlobalConfig, GlobalEditor
from cfclip.domain import Domain
from cfclip.method.config import CFCLIPConfig, flat, with_settings
from cfclip.method.loop import Callback, Loop
from cfclip.method.objectives import ClipDistance, Directional
from cfclip.method.trainer import driven
from cfclip.settings import Settings


@dataclass(frozen=True)
class Method:
    """How a method is configured and which editor it gives."""

    config: Callable[[str], Settings]  # prompt -> configuration with the defaults of the method's paper
    editor: type[Editor]
    fixed: tuple[str, ...] = ()  # settings that define the method and cannot be given


# StyleCLIP's mapper: no text, no views; lambda_nce is published as clip_lambda
_STYLECLIP = {"text_mapper": False, "num_views": 0, "lambda_id": 0.1, "lambda_nce": 1.0}
_WHAT_IT_IS = ("objective", "text_mapper")
METHODS: dict[str, Method] = {
    "cfclip": Method(CFCLIPConfig, MapperEditor),
    "styleclip-mapper": Method(
        partial(CFCLIPConfig, objective=ClipDistance(), **_STYLECLIP), MapperEditor, _WHAT_IT_IS
    ),
    "styleclip-optimization": Method(OptimizationConfig, OptimizationEditor),
    "styleclip-global": Method(GlobalConfig, GlobalEditor),
    "nada": Method(partial(CFCLIPConfig, objective=Directional(), **_STYLECLIP), MapperEditor, _WHAT_IT_IS),
    "nada-generator": Method(NADAGeneratorConfig, GeneratorEditor),
    "offset": Method(partial(CFCLIPConfig, text_mapper=False), OffsetEditor, ("text_mapper", "norm_axis")),
}


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def settings(method: str) -> dict[str, Any]:
    """What can be set in ``method``: name -> default. ValueError for an unknown method."""
    known = flat(_method(method).config("a prompt"))
    return {name: value for name, value in known.items() if name not in ("prompt", *_method(method).fixed)}


def configure(method: str, prompt: str, **given: Any) -> Settings:
    """The configuration of ``method`` for ``prompt``; ``given``: some of its :func:`settings`.

    Raises ValueError, which names a setting that the method does not have or that cannot work.
    """
    chosen = _method(method)
    try:
        return with_settings(chosen.config(prompt), given, ("prompt", *chosen.fixed))
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None


def fit(
    method: str,
    domain: Domain,
    prompt: str,
    *,
    out: str | os.PathLike | None = None,
    progress: bool = True,
    callbacks: Iterable[Callback] = (),
    checkpoint_every: int | None = None,
    **given: Any,
) -> Editor:
    """Fit ``method`` to ``prompt``; ``given`` are settings of :func:`configure`.

    With ``out`` this folder gets the log, a checkpoint every ``checkpoint_every`` steps (default: the
    method's), from which a stopped run is resumed, and at the end the editor
    (:func:`cfclip.baselines.load_editor`). Channel statistics are kept beside the folder, for other prompts.
    Raises ValueError if ``out`` holds another run.
    """
    loop = {"progress": progress, "callbacks": tuple(callbacks)}
    loop |= {} if checkpoint_every is None else {"checkpoint_every": checkpoint_every}
    return driven(fit_loop(method, domain, prompt, out, given, **loop))


def fit_loop(
    method: str,
    domain: Domain,
    prompt: str,
    out: str | os.PathLike | None,
    given: Mapping[str, Any],
    **loop: Any,
) -> Loop:
    """:func:`fit` as a generator, see :meth:`Editor.loop`."""
    config = configure(method, prompt, **given)
    for guide in domain.first_guides(config.guides):
        guide.tokenize(prompt)  # a prompt that cannot be read fails here, not after minutes
    out = None if out is None else Path(out)
    editor = yield from METHODS[method].editor.loop(method, domain, config, out, **loop)
    if out is not None:
        editor.save(out)
    return editor
