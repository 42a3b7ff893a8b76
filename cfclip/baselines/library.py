"""The library of trained editors: found by the headers of their files, opened once."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from cfclip.baselines.editor import Editor
from cfclip.baselines.methods import METHODS, configure
from cfclip.checkpoints import weights
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.weights import WeightsError
from cfclip.domain import Domain
from cfclip.files import DATA
from cfclip.models.mapper import Mapper
from cfclip.models.stylegan2 import Generator
from cfclip.settings import Settings, number


@dataclass(frozen=True)
class Trained:
    """A trained editor, as the header of its file describes it."""

    path: Path
    kind: str
    method: str
    domain: str  # "" if the file does not say
    training: Mapping[str, Any]  # its settings, as ``flat`` gives them, with prompt or prompts
    success: float | None = None  # share of held-out faces on which it succeeded, if that was measured

    @property
    def prompt(self) -> str | None:
        """The prompt it was trained for, or its file's name if that is unknown; None for many prompts."""
        return None if "prompts" in self.training else self.training.get("prompt", self.path.stem)

    @property
    def seed(self) -> int:
        return self.training.get("seed", 0)

    def open(self, domain: Domain) -> Editor:
        """The editor; the last 16 stay open. WeightsError for a wrong domain or method, or many prompts."""
        if self.domain not in ("", domain.name):
            wrong = f"domain {self.domain}, not {domain.name}"
            raise WeightsError(f"{self.path} was made for {wrong}: load that domain")
        known = METHODS.get(self.method)
        if known is None or self.kind != known.editor.KIND or self.prompt is None:
            unknown = "by which method or for which prompt it was made"
            raise WeightsError(f"{self.path} does not say {unknown}: fit it again")
        given = {k: v for k, v in self.training.items() if k not in ("prompt", *known.fixed)}
        config = configure(self.method, self.prompt, **given)
        return _open(self.path, self.path.stat().st_mtime, self.method, config, domain)


@lru_cache(maxsize=16)
def _open(path: Path, modified: float, method: str, config: Settings, domain: Domain) -> Editor:
    """The editor is cached, not only its module: optimising per picture keeps its results in the editor."""
    module = _open_module(path, modified, method, domain.generator)
    editor = METHODS[method].editor(method, domain, config, module)
    editor.path = path
    return editor


@lru_cache(maxsize=16)
def _open_module(path: Path, modified: float, method: str, generator: Generator) -> nn.Module:
    return METHODS[method].editor.open(path, generator)


def read_trained(path: str | os.PathLike) -> Trained | None:
    """What the header of ``path`` says; None if it is not an editor. WeightsError if it is not our file."""
    kind, _, card = weights.read_header(path)
    training = card.get("training", {})
    if not isinstance(training, dict):
        raise WeightsError(f"{path} has a header that cfclip did not write: fit or fetch it again")
    kinds = {method.editor.KIND for method in METHODS.values()}
    if kind != "mapper" and not (kind in kinds and "prompt" in training):
        return None
    method, domain = card.get("method", "cfclip"), card.get("domain", "")
    for name, value in {"method": method, "domain": domain, "prompt": training.get("prompt", "")}.items():
        if not isinstance(value, str):
            raise WeightsError(f"{path} has a {name} in its header that is no text: fit or fetch it again")
    success = card.get("success")
    return Trained(Path(path), kind, method, domain, training, None if number(0, 1)(success) else success)


def scan(*places: str | os.PathLike, skip_damaged: bool = False) -> list[Trained]:
    """The editors in ``places``: files, or folders and their direct subfolders. Reads headers only.

    Raises WeightsError for a file that cannot be read, unless ``skip_damaged``.
    """
    found = []
    for place in map(Path, places):
        inside = sorted([*place.glob("*.safetensors"), *place.glob("*/*.safetensors")])
        for path in [place] if place.is_file() else inside:
            try:
                found.append(read_trained(path))
            except WeightsError:
                if not skip_damaged:
                    raise
    return [one for one in found if one is not None]


def load_editor(place: str | os.PathLike, domain: Domain) -> Editor:
    """The editor in the folder or file ``place``. WeightsError unless there is exactly one, and it fits."""
    place = Path(place)
    found = scan(*sorted(place.glob("*.safetensors")) if place.is_dir() else [place])
    if len(found) != 1:
        what = f"several editors ({', '.join(one.path.name for one in found)})" if found else "no editor"
        raise WeightsError(
            f"{place} holds {what}: give the folder that one cfclip.baselines.fit(…, out=<folder>) wrote to"
        )
    return found[0].open(domain)


def find_editors(folder: str | os.PathLike, domain: Domain, prompts: Sequence[str] = ()) -> dict[str, Editor]:
    """label -> editor, for all in ``folder`` and its direct subfolders; ``prompts`` chooses and orders.

    The label is the prompt, with the method if methods differ, and with the seed if seeds differ.
    Raises ValueError if there is none, none for one of ``prompts``, or two with one label.
    """
    known = _of_prompts(scan(folder), folder, prompts, "editor")
    parts = [(one.prompt, one.method, f"seed {one.seed}") for one in known]
    telling = [k for k in range(3) if k == 0 or len({part[k] for part in parts}) > 1]
    labels = [", ".join(part[k] for k in telling) for part in parts]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"{folder} holds several runs of {twice} with other settings: give a folder with one of each"
        )
    return {label: one.open(domain) for label, one in zip(labels, known, strict=True)}


def find_mappers(folder: str | os.PathLike, prompts: Sequence[str] = ()) -> dict[str, Mapper]:
    """prompt -> mapper, for all in ``folder`` and its direct subfolders; ``prompts`` chooses and orders.

    Raises ValueError if there is none, or none for one of ``prompts``.
    """
    mappers = [one for one in scan(folder) if one.kind == "mapper"]
    return {one.prompt: load_mapper(one.path) for one in _of_prompts(mappers, folder, prompts, "mapper")}


def open_mapper(path: str | os.PathLike, domain: Domain) -> Mapper:
    """The mapper in a file of any format that :func:`cfclip.load_mapper` reads; the last 16 stay open."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist (any more): choose another mapper")
    return _open_mapper(path, path.stat().st_mtime).to(domain.device)


@lru_cache(maxsize=16)
def _open_mapper(path: Path, modified: float) -> Mapper:
    return load_mapper(path)


def _of_prompts(
    found: Sequence[Trained], folder: str | os.PathLike, prompts: Sequence[str], what: str
) -> list[Trained]:
    found = [one for one in found if one.prompt is not None]
    if not found:
        raise ValueError(f"no {what} in {folder}: train one with 02_training, out=<a folder in there>")
    there = list(dict.fromkeys(one.prompt for one in found))
    if missing := [prompt for prompt in prompts if prompt not in there]:
        raise ValueError(f"no {what} for {missing} in {folder}; there are {what}s for {there}")
    return [one for prompt in prompts or there for one in found if one.prompt == prompt]


def plain(prompt: str) -> str:
    """``prompt`` as CLIP reads it: in lower case, with single spaces."""
    return " ".join(prompt.lower().split())


def committed(domain: Domain) -> dict[str, Trained]:
    """:func:`plain` prompt -> its mapper in the domain's folder of committed mappers."""
    folder = DATA / domain.name / "mappers"
    found = _scan_once(folder) if folder.is_dir() else []
    return {plain(one.prompt): one for one in found if one.prompt is not None}


def preferred(prompt: str, found: Iterable[Trained]) -> Trained | None:
    """The best of ``found`` for this :func:`plain` prompt: mappers first, then CF-CLIP's; or None."""
    alike = [one for one in found if one.prompt is not None and plain(one.prompt) == plain(prompt)]
    return min(alike, key=lambda one: (one.kind != "mapper", one.method != "cfclip"), default=None)


@lru_cache(maxsize=8)
def _scan_once(folder: Path) -> list[Trained]:
    return scan(folder)


def mapper_for(domain: Domain, prompt: str) -> Mapper:
    """The mapper in :func:`committed`, or the domain's for any prompt. ValueError if there is neither."""
    known = committed(domain)
    if plain(prompt) in known:
        return known[plain(prompt)].open(domain).module
    if domain.mapper is None:
        only = f", only for {' and '.join(map(repr, known))}" if known else ""
        raise ValueError(
            f"domain {domain.name} has no mapper for {prompt!r}{only}: train one ('refine'), or choose a file"
        )
    return domain.mapper
