"""The methods before CF-CLIP, and CF-CLIP, behind one interface: ``fit(method, domain, prompt) -> editor``.

StyleCLIP (Patashnik et al. 2021) as a mapper, as an optimisation per picture and as a global direction of StyleSpace;
StyleGAN-NADA (Gal et al. 2021) on a mapper and on the generator. All see pictures through the domain's CLIP guide.
Shapes: N latents w [N, L, D]; R the resolution.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import weights
from .checkpoints import load_generator, load_mapper
from .domains import Domain
from .losses import directional
from .mapper import Mapper
from .method import CFCLIPConfig, Networks, check_dtype, check_networks, check_whole, train_mapper
from .stylegan2 import Generator
from .stylespace import Direction, GlobalConfig, channel_statistics, convolutions, global_direction
from .training import Callback, atomic_save, learning_rate, settled
from .training import fit as run_steps
from .weights import WeightsError

Rows = list[dict[str, float]]


def _fixed(value: Any) -> Any:
    """A setting that is part of the method, or that its loss does not have: no override can name it."""
    return field(default=value, init=False)


@dataclass(frozen=True, kw_only=True)
class StyleCLIPMapperConfig(CFCLIPConfig):
    """StyleCLIP's latent mapper: no text mapper, ``lambda_nce (1 - cos(E_I(x'), E_T(t))) + lambda_L2 MSE(w', w) + lambda_id L_id``."""

    lambda_id: float = 0.1
    lambda_nce: float = 1.0                  # published as clip_lambda
    draws: int = 0
    objective: str = _fixed("clip")
    text_mapper: bool = _fixed(False)
    temperature: float = _fixed(0.1)
    positives: tuple[str, ...] = _fixed(("text", "target"))
    negatives: str = _fixed("first")
    negative_templates: int | None = _fixed(None)
    query: str = _fixed("difference")


@dataclass(frozen=True)
class NADAConfig(StyleCLIPMapperConfig):
    """StyleGAN-NADA's directional loss on StyleCLIP's mapper; all else as there."""

    objective: str = _fixed("directional")


@dataclass(frozen=True)
class OptimizationConfig:
    """StyleCLIP's latent optimisation, per picture: ``1 - cos(E_I(x'), E_T(t)) + lambda_L2 |w' - w|^2 + lambda_id L_id``."""

    prompt: str
    steps: int = 300
    lr: float = 0.1                          # of Adam, at the top of its ramp
    lambda_id: float = 0.005
    lambda_l2: float = 0.008                 # of the sum of squares, not their mean
    batch: int = 4                           # pictures at a time; they do not touch each other
    dtype: str = "float32"                   # of the convolutions, or "auto"

    def __post_init__(self):
        check_whole(self, steps=1, batch=1)
        check_dtype(self.dtype)


@dataclass(frozen=True)
class NADAGeneratorConfig:
    """StyleGAN-NADA itself: the generator is fine-tuned, all but mapping and ToRGB."""

    prompt: str
    source_text: str | None = None           # default: the domain's
    steps: int = 300
    batch: int = 2
    lr: float = 0.002                        # of Adam; less a fifth, as StyleGAN2's lazy regularisation has it
    train_latents: int = 512
    seed: int = 0

    def __post_init__(self):
        check_whole(self, steps=1, batch=1, train_latents=1)


class Editor:
    """What :func:`fit` returns. ``rows``: what was logged on the way."""

    FILE: ClassVar[str]                      # <FILE>.safetensors of kind KIND holds all there is to it
    KIND: ClassVar[str]
    STORE_AS: ClassVar[torch.dtype | None] = None

    def __init__(self, method: str, domain: Domain, config: Any, module: nn.Module, rows: Rows | None = None):
        self.method, self.domain, self.config, self.module, self.rows = method, domain, config, module, rows or []

    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        """w [N, L, D] -> edited pictures [N, 3, R, R]; ``strength=0`` is the source picture, to the bit."""
        raise NotImplementedError

    def round_trip(self, w: Tensor, strength: float = 1.0) -> Tensor | None:
        """Pictures [N, 3, R, R] after the edit and then its reverse; None where it has none.

        Here the source pictures: a step that is the same for every picture is undone exactly.
        """
        return self.edit(w, 0.0)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """The constructor arguments of ``module``."""
        return {}

    def save(self, out: str | os.PathLike) -> Path:
        """Write the editor into the folder ``out``, atomically; :func:`load_editor` reads it to the bit."""
        return weights.save(self.module, Path(out) / f"{self.FILE}.safetensors", self.KIND, self.sizes, store_as=self.STORE_AS,
                            method=self.method, domain=self.domain.name, **asdict(self.config))

    @classmethod
    def fit(cls, method: str, domain: Domain, config: Any, out: Path | None, progress: bool, callbacks: Sequence[Callback]) -> "Editor":
        raise NotImplementedError

    @classmethod
    def open(cls, path: Path, domain: Domain) -> nn.Module:
        """``module`` from its file."""
        raise NotImplementedError


class MapperEditor(Editor):
    """``x' = G(w + strength * 0.1 * delta(w, t))``. It holds half floats, as its file does, so what was saved is what edits."""

    FILE, KIND, STORE_AS = "mapper", "mapper", torch.float16
    module: Mapper

    @property
    def sizes(self) -> Mapping[str, Any]:
        return self.module.metadata

    @torch.no_grad()
    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        return self.domain.generator.synthesis(self.module.edit(w, self.domain.clip.encode_text(self.config.prompt), strength))

    @torch.no_grad()
    def round_trip(self, w: Tensor, strength: float = 1.0) -> Tensor:
        """``G(w' - strength * 0.1 * delta(w', t))``: the mapper is asked again at w', and another residual than at w does not lead back."""
        text = self.domain.clip.encode_text(self.config.prompt)
        return self.domain.generator.synthesis(self.module.edit(self.module.edit(w, text, strength), text, -strength))

    @classmethod
    def fit(cls, method, domain, config, out, progress, callbacks) -> Editor:
        config = settled(config, domain.device, out)
        mapper, rows = train_mapper(domain, config, out, callbacks, progress)
        return cls(method, domain, config, mapper.half().float(), rows)

    @classmethod
    def open(cls, path: Path, domain: Domain) -> nn.Module:
        return load_mapper(path).to(domain.device)


class OptimizationEditor(Editor):
    """``x' = G(w + strength * d)``, with d optimised for every w that :meth:`edit` is given: nothing to fit, everything to wait for."""

    FILE, KIND = "optimization", "optimization"
    progress, callbacks = False, ()

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._found: dict[bytes, Tensor] = {}

    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        shift = torch.zeros_like(w) if strength == 0 else self.shift(w)
        with torch.no_grad():
            return self.domain.generator.synthesis(w + strength * shift)

    def round_trip(self, w: Tensor, strength: float = 1.0) -> None:
        """None: there is no reverse, only a second optimisation, which costs as much as the first and is of another prompt."""

    def shift(self, w: Tensor) -> Tensor:
        """d [N, L, D]. What was found for a picture is kept: another strength costs no second optimisation."""
        keys = [one.cpu().numpy().tobytes() for one in w]
        if new := [i for i, key in enumerate(keys) if key not in self._found]:
            shifts = torch.cat([self._optimise(part) for part in w[new].split(self.config.batch)])
            self._found |= {keys[i]: shift for i, shift in zip(new, shifts, strict=True)}
        return torch.stack([self._found[key] for key in keys])

    @torch.enable_grad()
    def _optimise(self, w: Tensor) -> Tensor:
        c, networks, identity = self.config, Networks(self.domain, self.config.dtype), self.domain.identity
        text = F.normalize(self.domain.clip.encode_text(c.prompt), dim=-1)
        with torch.no_grad():
            source = identity(networks.synthesise(w)) if c.lambda_id else None
        shift = torch.zeros_like(w).requires_grad_()
        optimizer = torch.optim.Adam([shift], lr=c.lr)

        def step(i: int) -> dict[str, float]:
            optimizer.param_groups[0]["lr"] = c.lr * learning_rate(i / c.steps)
            images = networks.synthesise(w + shift)
            losses = {"clip": 1 - networks.clip(images) @ text[0], "l2": shift.square().sum((1, 2))}     # [N] each
            loss = losses["clip"] + c.lambda_l2 * losses["l2"]
            if source is not None:
                losses["id"] = 1 - (identity(images) * source).sum(1)
                loss = loss + c.lambda_id * losses["id"]
            optimizer.zero_grad()
            loss.sum().backward()                                  # a sum, so that no picture's gradient knows of the others
            optimizer.step()
            return {"loss": loss.mean().item()} | {name: value.mean().item() for name, value in losses.items()}

        with torch.random.fork_rng():                              # the loop seeds its steps; an edit leaves no trace of that
            self.rows = run_steps(step, c.steps, state={}, callbacks=self.callbacks, desc=c.prompt, progress=self.progress)
        return shift.detach()

    @classmethod
    def fit(cls, method, domain, config, out, progress, callbacks) -> Editor:
        check_networks(domain, config)
        editor = cls(method, domain, settled(config, domain.device), nn.Module())
        editor.progress, editor.callbacks = progress, tuple(callbacks)
        return editor

    @classmethod
    def open(cls, path: Path, domain: Domain) -> nn.Module:
        return nn.Module()


class GlobalEditor(Editor):
    """``x' = G(s + strength * step)`` in StyleSpace, the same step for every picture."""

    FILE, KIND = "direction", "direction"
    module: Direction

    @torch.no_grad()
    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        styles = self.domain.generator.style_space(w)
        where = convolutions(styles)
        for layer, step in zip(where, self.module.step.split([styles[i].shape[1] for i in where]), strict=True):
            styles[layer] = styles[layer] + strength * step
        return self.domain.generator.synthesis_from_styles(styles)

    @classmethod
    def fit(cls, method, domain, config, out, progress, callbacks) -> Editor:
        channels, rows = channel_statistics(domain, config, None if out is None else out.resolve().parent, progress, callbacks)
        return cls(method, domain, config, global_direction(domain, config, channels), rows)

    @classmethod
    def open(cls, path: Path, domain: Domain) -> nn.Module:
        tensors = weights.read(path, cls.KIND)[0]
        styles = domain.generator.style_space(domain.generator.w_avg.expand(1, domain.generator.num_ws, -1))
        blank = torch.zeros(sum(styles[i].shape[1] for i in convolutions(styles)))
        return weights.load_into(Direction(blank, blank.clone()), tensors, path).to(domain.device)


class GeneratorEditor(Editor):
    """``x' = G'(w)``, the weights of G' between the source's (strength 0) and the fine-tuned ones (strength 1), or beyond."""

    FILE, KIND = "generator", "generator"
    module: Generator

    @property
    def sizes(self) -> Mapping[str, Any]:
        return self.module.config

    @torch.no_grad()
    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        source, tuned = self.domain.generator.state_dict(), self.module.state_dict()
        between = copy.deepcopy(self.module)
        between.load_state_dict({name: source[name] + strength * (tuned[name] - source[name]) for name in tuned})
        return between.synthesis(w)

    @classmethod
    def fit(cls, method, domain, config, out, progress, callbacks) -> Editor:
        c, clip = config, domain.clip
        target, source_text = clip.template_features(c.prompt), clip.template_features(c.source_text or domain.source_text)
        latents = domain.latents(c.train_latents, "train", c.seed)
        tuned = copy.deepcopy(domain.generator).requires_grad_(False)
        tuned.convs.requires_grad_(True)
        tuned.const.requires_grad_(True)
        lazy = 4 / 5
        optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=c.lr * lazy, betas=(0.0, 0.99 ** lazy))

        def step(i: int) -> dict[str, float]:
            w = latents[torch.randint(len(latents), (c.batch,))]
            with torch.no_grad():
                source = F.normalize(clip.encode_image(domain.generator.synthesis(w)), dim=-1)
            loss = directional(F.normalize(clip.encode_image(tuned.synthesis(w)), dim=-1), source, target, source_text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"directional": loss.item()}

        rows = run_steps(step, c.steps, state={"generator": tuned, "optimizer": optimizer}, out=out, seed=c.seed, callbacks=callbacks,
                         checkpoint_every=100, desc=c.prompt, progress=progress)
        return cls(method, domain, config, tuned.requires_grad_(False), rows)

    @classmethod
    def open(cls, path: Path, domain: Domain) -> nn.Module:
        return load_generator(path, domain.device)


@dataclass(frozen=True)
class Method:
    """A configuration, whose defaults are its paper's, and the editor that is fitted from it."""

    config: Callable[..., Any]
    editor: type[Editor]


METHODS: dict[str, Method] = {
    "cfclip": Method(CFCLIPConfig, MapperEditor),
    "styleclip-mapper": Method(StyleCLIPMapperConfig, MapperEditor),
    "styleclip-optimization": Method(OptimizationConfig, OptimizationEditor),
    "styleclip-global": Method(GlobalConfig, GlobalEditor),
    "nada": Method(NADAConfig, MapperEditor),
    "nada-generator": Method(NADAGeneratorConfig, GeneratorEditor),
}


def settings(method: str) -> dict[str, Any]:
    """What can be overridden in ``method``: name -> default. ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    return {f.name: f.default for f in fields(METHODS[method].config) if f.init and f.name != "prompt"}


def accepted(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that are settings of ``method``; the lists of a file are the tuples of a configuration."""
    known = settings(method)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known}


def configure(method: str, prompt: str, **overrides: Any) -> Any:
    """The configuration of ``method`` for ``prompt``. ValueError that names a setting it does not have."""
    if unknown := set(overrides) - set(known := settings(method)):
        raise ValueError(f"{method} has no setting {', '.join(map(repr, sorted(unknown)))}; it has: {', '.join(known)}")
    return METHODS[method].config(prompt, **overrides)


def fit(method: str, domain: Domain, prompt: str, *, out: str | os.PathLike | None = None, progress: bool = True,
        callbacks: Iterable[Callback] = (), **overrides: Any) -> Editor:
    """Fit ``method`` to ``prompt``; ``overrides`` are settings of its configuration.

    With ``out`` the folder holds the editor at the end (:func:`load_editor`), and the log and checkpoint that a stopped run goes on
    from; channel statistics lie beside it, for other prompts. ValueError if ``out`` holds another run.
    """
    config = configure(method, prompt, **overrides)
    domain.clip.tokenize(prompt)                                   # a prompt that cannot be read is no reason to wait
    if out is not None:
        out = Path(out)
        _claim(out, {"method": method, "domain": domain.name} | {k: v for k, v in asdict(config).items() if k != "steps"})
    editor = METHODS[method].editor.fit(method, domain, config, out, progress, tuple(callbacks))
    if out is not None:
        editor.save(out)
    return editor


def _claim(out: Path, run: dict[str, Any]) -> None:
    """Write down what is run in ``out``. A checkpoint of other settings would be gone on with, and called these."""
    path, run = out / "settings.json", json.loads(json.dumps(run))
    if path.exists():
        before = json.loads(path.read_text())
        if differ := [name for name in {**before, **run} if before.get(name) != run.get(name)]:
            raise ValueError(f"{out} holds a run with another {', '.join(differ)}: choose another folder, or delete this one")
    atomic_save(run, path, lambda run, part: part.write_text(json.dumps(run, indent=1, ensure_ascii=False)))


def load_editor(folder: str | os.PathLike, domain: Domain) -> Editor:
    """What :meth:`Editor.save` wrote into ``folder``. Raises WeightsError if nothing did, or if it belongs to another domain."""
    folder = Path(folder)
    found = _editors_in(folder)
    if len(found) != 1:
        what = "no editor" if not found else f"several editors ({', '.join(path.name for path in found)})"
        raise WeightsError(f"{folder} holds {what}: give the folder that one cfclip.baselines.fit(…, out=<folder>) wrote to")
    return _open(found[0], domain)


def _editors_in(folder: Path) -> list[Path]:
    return sorted({path for m in METHODS.values() if (path := folder / f"{m.editor.FILE}.safetensors").exists()})


def _open(path: Path, domain: Domain) -> Editor:
    kinds = {m.editor.FILE: m.editor for m in METHODS.values()}
    kind = kinds.get(path.stem, MapperEditor)                      # committed mappers are called as their prompts
    card = weights.read(path, kind.KIND)[2]
    if card.get("domain", domain.name) != domain.name:
        raise WeightsError(f"{path} was made for domain {card['domain']}, not {domain.name}: load that domain")
    method = card.get("method", "cfclip")                          # train_mapper's files do not say
    if METHODS.get(method) is None or METHODS[method].editor is not kind or "prompt" not in card:
        raise WeightsError(f"{path} does not say by which known method, or for which prompt, it was made: fit it again")
    return kind(method, domain, configure(method, card["prompt"], **accepted(method, card)), kind.open(path, domain))


def find_editors(folder: str | os.PathLike, domain: Domain, prompts: Sequence[str] = ()) -> dict[str, Editor]:
    """label -> editor, for every one in a folder of ``folder``, and every mapper file in ``folder``; ``prompts`` chooses and orders.

    The label is the prompt; with the method where there are several, and with the seed where there are several.
    Raises ValueError if there is none, none for one of ``prompts``, or two of one label.
    """
    folder = Path(folder)
    files = sorted({*folder.glob("*.safetensors"), *(path for one in folder.glob("*/") for path in _editors_in(one))})
    editors = [_open(path, domain) for path in files]
    if not editors:
        raise ValueError(f"no editor in {folder}: fit one with 02_training, out=<a folder in there>")
    there = list(dict.fromkeys(editor.config.prompt for editor in editors))
    if missing := [prompt for prompt in prompts if prompt not in there]:
        raise ValueError(f"no editor for {missing} in {folder}; there are editors for {there}")
    editors = [editor for prompt in prompts or there for editor in editors if editor.config.prompt == prompt]
    parts = [(editor.config.prompt, editor.method, f"seed {getattr(editor.config, 'seed', 0)}") for editor in editors]
    telling = [k for k in range(3) if k == 0 or len({part[k] for part in parts}) > 1]
    labels = [", ".join(part[k] for k in telling) for part in parts]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"{folder} holds several runs of {sorted(twice)}, which differ in other settings: give a folder with one of each")
    return dict(zip(labels, editors, strict=True))
