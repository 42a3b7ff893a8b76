"""CF-CLIP's text-conditioned latent mapper: text embedding mapping (TEM), fusion, three residual mappers.

Shapes: N latents, L layers of W+, D = w_dim, E = width of what the mapper reads: of
CLIP's embedding (E = D = 512 in the paper), or of the rows of T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import EqualLinear, pixel_norm
from cfclip.settings import Settings, int_at_least, one_of, setting, some_of

LEVELS = ("coarse", "medium", "fine")
"""Layer groups of W+, each with its own residual mapper."""

SHAPE_LEVELS = ("coarse", "medium")
"""The levels that change shapes, if the generator's fine layers decide only the colours."""

PUBLISHED_SPLIT = (4, 8)
"""The first layers of medium and of fine. Published for 18 layers: 4² and 8², 16² and 32², 64² and more."""


def level_slices(split: Sequence[int] = PUBLISHED_SPLIT) -> dict[str, slice]:
    """Level -> its layers of W+."""
    medium, fine = split
    return dict(zip(LEVELS, (slice(0, medium), slice(medium, fine), slice(fine, None)), strict=True))


def split_or_error(value: Any) -> str | None:
    """Return what a split must be, or None if ``value`` is a split."""
    whole = isinstance(value, tuple | list) and all(type(layer) is int for layer in value)
    fine = whole and len(value) == 2 and 0 < value[0] < value[1]
    return None if fine else "two whole numbers from 1 that rise, the first layers of medium and of fine"


TEXTS = ("pooled", "tokens")
"""How a mapper reads a prompt: by CLIP's feature of the whole prompt (published), or token by token."""

NORM_AXES = {"layer": 1, "channel": -1}
"""The dim of [N, L', D] that PixelNorm averages over."""

RESIDUAL_SCALE = 0.1
"""The published scale of the residual: ``w' = w + 0.1 delta``."""


@dataclass(frozen=True)
class MapperConfig(Settings):
    """The architecture of a mapper; everything else is in its tensors."""

    num_ws: int = setting(18, int_at_least(1))  # L
    w_dim: int = setting(512, int_at_least(1))  # D
    # E; for "tokens" the width of a token's row; None: not conditioned on text (StyleCLIP's mapper)
    text_dim: int | None = setting(512, int_at_least(1, optional=True))
    levels: tuple[str, ...] = setting(LEVELS, some_of(LEVELS))
    norm_axis: str = setting("layer", one_of(NORM_AXES))  # see PixelNormMLP
    split: tuple[int, int] = setting(PUBLISHED_SPLIT, split_or_error)  # the domain's, see level_slices
    text: str = setting("pooled", one_of(TEXTS))
    slots: int = setting(16, int_at_least(1))  # K of WordMapper
    rank: int = setting(6, int_at_least(1))  # r of WordMapper

    def fits(self, generator: nn.Module, clip: ClipGuide) -> bool:
        """Whether the sizes match this generator and this CLIP."""
        sizes, read = (self.num_ws, self.w_dim), text_width(clip, self.text)
        return sizes == (generator.num_ws, generator.w_dim) and self.text_dim in (None, read)


def text_width(clip: ClipGuide, text: str) -> int:
    """E, the width of the text features that a mapper with this ``text``, one of :data:`TEXTS`, reads."""
    return clip.word_dim if text == "tokens" else clip.embed_dim


class PixelNormMLP(nn.Module):
    """PixelNorm, then four ``EqualLinear(lr_mul=0.01)`` with leaky ReLU. [N, L', D_in] -> [N, L', D].

    ``norm_axis="layer"`` normalises over dim 1 as the published code does: for a single layer ``x / sqrt(x^2
    + 1e-8)``, which keeps only the sign of x. ``"channel"`` normalises over the last dim, as the paper's
    figure suggests.
    """

    def __init__(self, in_dim: int, dim: int, norm_axis: str):
        super().__init__()
        self.dim = NORM_AXES[norm_axis]
        widths = (in_dim, dim, dim, dim)
        self.layers = nn.ModuleList(EqualLinear(width, dim, lr_mul=0.01, activate=True) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_norm(x, self.dim)
        for layer in self.layers:
            x = layer(x)
        return x


class Mapper(nn.Module):
    """CF-CLIP's mapper; with ``text_dim=None`` StyleCLIP's."""

    def __init__(self, config: MapperConfig):
        super().__init__()
        self.config = config
        d, norm = config.w_dim, config.norm_axis
        if config.text_dim is not None:
            self.text = nn.ModuleList(PixelNormMLP(config.text_dim, d, norm) for _ in range(config.num_ws))
            self.fuse = EqualLinear(2 * d, d, lr_mul=0.01, activate=True)
        self.levels = nn.ModuleDict({name: PixelNormMLP(d, d, norm) for name in config.levels})

    @staticmethod
    def of(config: MapperConfig) -> "Mapper":
        """A mapper for ``config`` whose weights have yet to be loaded or drawn."""
        return WordMapper(config) if config.text == "tokens" else Mapper(config)

    @staticmethod
    def initialised(config: MapperConfig, generator: torch.Generator) -> "Mapper":
        """An untrained mapper on the CPU, its weights drawn from ``generator`` alone."""
        with torch.device("meta"):
            mapper = Mapper.of(config)
        mapper.to_empty(device="cpu").reset(generator)
        return mapper

    def reset(self, generator: torch.Generator) -> None:
        """Draw all weights from ``generator``."""
        for layer in self.modules():
            if isinstance(layer, EqualLinear):
                layer.reset(generator)

    @property
    def metadata(self) -> dict:
        """The configuration, for a file's header."""
        return asdict(self.config)

    def read(self, clip: ClipGuide, texts: str | Sequence[str]) -> Tensor:
        """The ``text_feature`` of P prompts: CLIP's raw features [P, E]."""
        return clip.encode_text(texts)

    def embed_text(self, text_feature: Tensor) -> Tensor:
        """TEM: raw CLIP feature [1 or N, E] of a plain prompt -> t [1 or N, L, D]. ValueError otherwise."""
        if text_feature.ndim != 2 or text_feature.shape[1] != self.config.text_dim:
            raise ValueError(
                f"this mapper takes a text feature of shape [N, {self.config.text_dim}], "
                f"not {list(text_feature.shape)}: it was trained with another CLIP"
            )
        return torch.cat([mlp(text_feature[:, None]) for mlp in self.text], 1)

    def check(self, w: Tensor, text_feature: Tensor | None) -> None:
        """Raise ValueError if ``w`` has the wrong shape, or if a text is needed but missing."""
        num_ws, w_dim = self.config.num_ws, self.config.w_dim
        if w.ndim != 3 or w.shape[1:] != (num_ws, w_dim):
            raise ValueError(
                f"this mapper takes w of shape [N, {num_ws}, {w_dim}], not {list(w.shape)}: "
                "it belongs to a generator of another size"
            )
        if self.config.text_dim is not None and text_feature is None:
            raise ValueError("this mapper needs text_feature: what its read(clip, prompt) returns")

    def residual(self, w: Tensor, text_feature: Tensor | None = None) -> Tensor:
        """The unscaled residual delta [N, L, D]. Raises ValueError for a wrong shape or a missing text."""
        self.check(w, text_feature)
        x = w
        if self.config.text_dim is not None:
            t = self.embed_text(text_feature).expand(len(w), -1, -1)
            x = self.fuse(torch.cat([w, t], -1))
        deltas = [
            self.levels[name](x[:, layers]) if name in self.levels else torch.zeros_like(w[:, layers])
            for name, layers in level_slices(self.config.split).items()
        ]
        return torch.cat(deltas, 1)

    def edit(self, w: Tensor, text_feature: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """``w' = w + strength * 0.1 * delta(w, text)``. w: [N, L, D]; text_feature: of 1 or N prompts."""
        return w + (strength * RESIDUAL_SCALE) * self.residual(w, text_feature)

    forward = edit


class Slots(nn.Module):
    """K slots that edit the given ``layers`` of W+, see :class:`WordMapper`."""

    RATES: ClassVar[Mapping[str, float]] = {"share": 0.1, "target": 0.1, "place": 0.1, "move": 1.0}
    """The relative learning rate of each weight: the stored parameter is the weight divided by it."""

    def __init__(self, config: MapperConfig, layers: Sequence[int]):
        super().__init__()
        self.layers, k, r, width = list(layers), config.slots, config.rank, config.text_dim // 2
        n = len(self.layers) * config.w_dim
        self.share = nn.Parameter(torch.zeros(width, k + 1))  # S
        self.target = nn.Parameter(torch.zeros(width, r))  # B
        self.place = nn.Parameter(torch.zeros(n, k, r))  # C
        self.move = nn.Parameter(torch.zeros(k, r + 1, n))  # U

    def reset(self, generator: torch.Generator) -> None:
        scales = {"share": 1.5 / len(self.share) ** 0.5, "target": 1 / len(self.target) ** 0.5}
        scales |= {"place": 0.2 / len(self.place) ** 0.5, "move": 0.1}
        for name, scale in scales.items():
            weight = getattr(self, name)
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * (scale / self.RATES[name]))

    def shares(self, words: Tensor) -> Tensor:
        """words [N, T, E] -> a [N, T, K]: the share of each word that each slot gets."""
        meant = words.chunk(2, -1)[0]
        shares = torch.softmax(meant @ self._weight("share"), -1)[..., :-1]
        return shares * (meant != 0).any(-1, keepdim=True)  # a row of zeros is not a word

    def forward(self, w: Tensor, words: Tensor) -> Tensor:
        """w [N, L, D], words [1 or N, T, E] -> the unscaled residual of ``layers`` [N, L', D]."""
        moved = torch.einsum("nkr,krd->nd", self.ways(w, words), self._weight("move"))
        return moved.unflatten(1, (len(self.layers), -1))

    def sizes(self, w: Tensor, words: Tensor) -> Tensor:
        """The norm over all ``layers`` of each slot's part of the residual, [N, K]."""
        return torch.einsum("nkr,krd->nkd", self.ways(w, words), self._weight("move")).norm(dim=-1)

    def ways(self, w: Tensor, words: Tensor) -> Tensor:
        """``sum_t a_tk [B c_t - C_k w, 1]`` of each slot [N, K, r + 1], see :class:`WordMapper`."""
        a = self.shares(words)
        said = torch.einsum("ntk,ntr->nkr", a, words.chunk(2, -1)[1] @ self._weight("target"))
        here = torch.einsum("nd,dkr->nkr", w[:, self.layers].flatten(1), self._weight("place"))
        amount = a.sum(1)[..., None]
        return torch.cat([said - amount * here, amount.expand(len(w), -1, 1)], -1)

    @torch.no_grad()
    def silence(self, silent: Tensor, spoken: Tensor) -> None:
        """Make the slots ignore the words ``silent``, which none of their prompts contains.

        S and B change as little as possible (least squares). For the embeddings ``silent`` [n, E / 2] the
        logit of "none" rises by 20 and the target becomes 0. For ``spoken`` [m, E / 2] both stay.
        """
        known = torch.cat([silent, spoken]).double()
        solve = torch.linalg.pinv(known, rtol=1e-2)
        share = known.new_zeros(len(known), self.share.shape[1])
        target = known @ self._weight("target").double()
        share[: len(silent), -1] = 20.0
        target[len(silent) :] = 0
        for name, change in ("share", share), ("target", -target):
            weight = getattr(self, name)
            weight += (solve @ change).to(weight) / self.RATES[name]

    def _weight(self, name: str) -> Tensor:
        return self.RATES[name] * getattr(self, name)


class WordMapper(Mapper):
    """A mapper that reads word by word, so that it can follow combinations that no training prompt contains.

    Each word has a meaning e_t and a context c_t, the words before it, see :meth:`.ClipGuide.encode_words`.
    The words are divided among K slots. Each slot learns to edit one part of the picture, and the residual is
    the sum of their edits:

        delta = sum_t sum_k a_tk [B c_t - C_k w, 1] U_k,    a_t = softmax(S e_t) over the slots and "none",

    where B c_t [r] is the target of the part, C_k w [r] is its present state, and U_k [r + 1, L' D] turns the
    difference into a change of the slots' L' layers. The coarse and medium levels share one set of slots, and
    the fine level has another. All slots of a set share B, so a colour learned with one part serves all
    parts. Two requests in a sentence add up.
    """

    def __init__(self, config: MapperConfig):
        nn.Module.__init__(self)
        self.config = config
        of, every = level_slices(config.split), range(config.num_ws)
        drawing = [name for name in config.levels if name in SHAPE_LEVELS]
        colouring = [name for name in config.levels if name not in SHAPE_LEVELS]
        layers = [[i for name in some for i in every[of[name]]] for some in (drawing, colouring)]
        self.groups = nn.ModuleList(Slots(config, some) for some in layers if some)

    def reset(self, generator: torch.Generator) -> None:
        for group in self.groups:
            group.reset(generator)

    def read(self, clip: ClipGuide, texts: str | Sequence[str]) -> Tensor:
        """The ``text_feature`` of P prompts: their words [P, T, E], see :meth:`.ClipGuide.encode_words`."""
        return clip.encode_words(texts)

    def busiest(self, w: Tensor, words: Tensor) -> "WordMapper":
        """A mapper with only the set of slots that changes ``w`` most for ``words``."""
        group = max(self.groups, key=lambda group: float(group(w, words).square().mean()))
        of = level_slices(self.config.split)
        levels = tuple(name for name in self.config.levels if of[name].start in group.layers)
        part = WordMapper(replace(self.config, levels=levels))
        part.groups = nn.ModuleList([group])
        return part

    def residual(self, w: Tensor, text_feature: Tensor | None = None) -> Tensor:
        self.check(w, text_feature)
        if text_feature.ndim != 3 or text_feature.shape[2] != self.config.text_dim:
            raise ValueError(
                f"this mapper takes words of shape [N, T, {self.config.text_dim}], "
                f"not {list(text_feature.shape)}: read them by its read(clip, prompt), with the CLIP that it "
                "was trained with"
            )
        delta = torch.zeros_like(w)
        for group in self.groups:
            delta[:, group.layers] = group(w, text_feature)
        return delta
