"""The generator of StyleGAN2, config-f.

"Analyzing and Improving the Image Quality of StyleGAN", Karras et al. 2020. :class:`Generator` is for
NVIDIA's, rosinality's and our own checkpoints. N images, R = resolution, L = num_ws = 2 log2(R) - 2 layers,
D = w_dim.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cfclip.models import ops

Noise = str | Sequence[Tensor]
"""Noise maps: "const" (the stored maps), "random", "none", or one tensor per convolution."""
Classes = int | Sequence[int] | Tensor
"""Classes of N pictures: one number for all, N numbers, or label vectors as floats, [c_dim] or [N, c_dim]."""
HALF_FROM = 32
"""The lowest resolution in half precision: smaller layers cost little, but their errors reach all others."""


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: ``y = act(x (W lr_mul / sqrt(in))^T + b lr_mul)``.

    [..., in] -> [..., out]. With ``activate``, act is leaky ReLU (0.2) times sqrt(2).
    """

    def __init__(
        self, in_dim: int, out_dim: int, lr_mul: float = 1.0, bias_init: float = 0.0, activate: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init)))
        self.lr_mul, self.scale, self.activate = lr_mul, lr_mul / math.sqrt(in_dim), activate
        self.bias_init = float(bias_init)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Initialise the weights as the constructor does, with random numbers from ``generator``."""
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) / self.lr_mul)
        self.bias.fill_(self.bias_init)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight * self.scale, self.bias * self.lr_mul)
        return nn.functional.leaky_relu(y, 0.2) * math.sqrt(2) if self.activate else y


def pixel_norm(x: Tensor, dim: int = 1) -> Tensor:
    """``x / sqrt(mean_dim(x^2) + 1e-8)``."""
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + 1e-8)


class StyledConv(nn.Module):
    """Modulated 3x3 convolution (doubling the resolution if ``up``), noise, bias, leaky ReLU."""

    def __init__(self, in_ch: int, out_ch: int, w_dim: int, resolution: int, up: bool):
        super().__init__()
        self.affine = EqualLinear(w_dim, in_ch, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_ch, in_ch, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.bias = nn.Parameter(torch.zeros(out_ch))
        self.scale, self.up = 1 / math.sqrt(in_ch * 9), up
        self._kept: tuple[tuple, ops.Prepared] | None = None

    def prepared(self, dtype: torch.dtype, fir: Tensor | None) -> ops.Prepared:
        """The prepared weights: cached if they are frozen, computed at every call if they are trained.

        Frozen weights may be changed in place or replaced. A change through ``weight.data`` is not noticed
        and leaves the cached kernel stale.
        """
        if self.weight.requires_grad or self.weight.is_inference():
            return ops.prepare(self.weight * self.scale, fir, dtype)
        state = (self.weight.data_ptr(), self.weight._version, self.weight.device, dtype)
        if fir is not None:
            state += fir.data_ptr(), fir._version, ops.folds(self.weight, fir, dtype)
        kept = self._kept  # read once: another thread may replace it at any time
        if kept is None or kept[0] != state:
            with torch.inference_mode(False):  # autograd cannot save an inference tensor
                kept = self._kept = state, ops.prepare(self.weight * self.scale, fir, dtype)
        return kept[1]

    def _apply(self, *args, **kwargs) -> "StyledConv":
        self._kept = None  # a converted weight may get the address of a freed one, as in .half().float()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}  # a copy prepares its own weights

    def forward(self, x: Tensor, style: Tensor, fir: Tensor, e: ops.Epilogue) -> ops.LayerOutput:
        """x: [N, in, r, r], already multiplied by ``style`` [N, in] in the previous layer.

        e: noise (not yet multiplied by its strength), clamp, and styles and RGB weights of the layers that
            read the output.
        """
        noise = None if e.noise is None else e.noise * self.noise_strength
        fir = fir if self.up else None
        prepared = self.prepared(x.dtype, fir)
        return ops.styled_conv2d(x, prepared, style, fir, e._replace(noise=noise, bias=self.bias))


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to RGB, without demodulation; the previous layer computes the convolution."""

    def __init__(self, in_ch: int, w_dim: int):
        super().__init__()
        self.affine = EqualLinear(w_dim, in_ch, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, in_ch, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.scale = 1 / math.sqrt(in_ch)

    def forward(self, x: Tensor, clamp: float | None) -> Tensor:
        """x: the convolution's result [N, 3, H, W]."""
        return ops.bias_act(x, self.bias, slope=1, gain=1, clamp=clamp)


class Generator(nn.Module):
    """The StyleGAN2 generator.

    Args:
        resolution: R, a power of two from 8.
        channels: number of channels at each resolution 4, 8, …, R.
        z_dim, w_dim: widths of Z and W.
        mapping_layers: depth of the mapping network.
        fir: taps of the (separable) resampling filter, or the 2-D filter itself.
        conv_clamp: largest absolute value of a layer's output (NVIDIA); None: no limit.
        c_dim: number of classes; 0: the generator is not class-conditional.
    """

    def __init__(
        self,
        resolution: int,
        channels: Sequence[int],
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        fir: Sequence[float] | Tensor = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        c_dim: int = 0,
    ):
        super().__init__()
        levels = int(math.log2(resolution)) - 1
        if resolution < 8 or 2 ** (levels + 1) != resolution:
            raise ValueError(f"resolution must be a power of two from 8, not {resolution}")
        if len(channels) != levels:
            raise ValueError(
                f"resolution {resolution} needs {levels} numbers of channels (4 … {resolution}), "
                f"not {len(channels)}"
            )
        self.resolution, self.channels, self.z_dim, self.w_dim = resolution, tuple(channels), z_dim, w_dim
        self.mapping_layers, self.conv_clamp, self.num_ws = mapping_layers, conv_clamp, 2 * levels
        self.c_dim, self.label = c_dim, None  # label: the default class, see for_class
        if c_dim:
            self.embed = EqualLinear(c_dim, w_dim)
        first = z_dim + w_dim if c_dim else z_dim
        self.style = nn.ModuleList(
            EqualLinear(first if i == 0 else w_dim, w_dim, lr_mul=0.01, activate=True)
            for i in range(mapping_layers)
        )
        self.const = nn.Parameter(torch.randn(channels[0], 4, 4))
        self.convs, self.rgbs = nn.ModuleList(), nn.ModuleList()
        for level, ch in enumerate(channels):
            res = 4 * 2**level
            if level:
                self.convs.append(StyledConv(channels[level - 1], ch, w_dim, res, up=True))
            self.convs.append(StyledConv(ch, ch, w_dim, res, up=False))
            self.rgbs.append(ToRGB(ch, w_dim))
        self.register_buffer("w_avg", torch.zeros(w_dim))
        fir = torch.as_tensor(fir, dtype=torch.float32)
        self.register_buffer("fir", fir if fir.ndim == 2 else ops.setup_filter(fir.tolist()))

    @property
    def config(self) -> dict:
        """The constructor arguments for a file's header; ``fir`` is among the tensors."""
        names = ("resolution", "channels", "z_dim", "w_dim", "mapping_layers", "conv_clamp", "c_dim")
        return {name: getattr(self, name) for name in names} | {"channels": list(self.channels)}

    def mapping(
        self,
        z: Tensor,
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        c: Classes | None = None,
    ) -> Tensor:
        """z [N, z_dim] -> w [N, L, D]; see :meth:`truncate` for psi = ``truncation``.

        c: the classes, see :data:`Classes`; default: the class of :meth:`for_class`. Raises ValueError if a
            class-conditional generator has neither, and for classes that this generator does not have.
        """
        w = self.map_one(z, c)[:, None].repeat(1, self.num_ws, 1)
        return self.truncate(w, truncation, truncation_cutoff)

    def map_one(self, z: Tensor, c: Classes | None = None) -> Tensor:
        """z [N, z_dim] -> w [N, D], untruncated; c as in :meth:`mapping`."""
        x, labels = pixel_norm(z), self._labels(c, len(z))
        if labels is not None:  # as in StyleGAN2-ADA (Karras et al. 2020)
            x = torch.cat([x, pixel_norm(self.embed(labels)).to(x)], 1)
        for layer in self.style:
            x = layer(x)
        return x

    def _labels(self, c: Classes | None, n: int) -> Tensor | None:
        """The labels [n, c_dim] of ``c``, one-hot for class numbers; None if the generator has no classes."""
        c = self.label if c is None else c
        if not self.c_dim:
            if c is not None:
                raise ValueError("this generator has no classes: leave the class out")
            return None
        which = f"one of 0 to {self.c_dim - 1}"
        if c is None:
            raise ValueError(
                f"this generator is class-conditional, so it needs a class, {which}: G.mapping(z, c=0), or "
                "label=0 of a domain"
            )
        needed = f"one whole number, {n} of them, or labels as floats"
        try:
            c = torch.as_tensor(c)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"classes must be {needed}, not {c!r}") from None
        if c.is_floating_point():  # need not be one-hot: classes may be mixed
            if c.shape not in ((self.c_dim,), (n, self.c_dim)) or not c.isfinite().all():
                shapes = f"[{self.c_dim}] or [{n}, {self.c_dim}]"
                raise ValueError(f"labels must be finite, of shape {shapes}, not of shape {list(c.shape)}")
            return c.to(self.embed.weight).expand(n, -1)
        if c.shape not in ((), (1,), (n,)) or c.dtype == torch.bool or c.is_complex():
            raise ValueError(f"classes must be {needed}, not {c.dtype} of shape {list(c.shape)}")
        if (wrong := c[(c < 0) | (c >= self.c_dim)]).numel():
            raise ValueError(f"the class must be {which}, not {int(wrong.flatten()[0])}")
        return nn.functional.one_hot(c.long(), self.c_dim).to(self.embed.weight).expand(n, -1)

    def for_class(self, label: int) -> "Generator":
        """A copy that shares all weights and uses class ``label`` where none is given."""
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"label must be a whole number, the class, not {label!r}")
        self._labels(label, 1)
        chosen = copy.copy(self)
        chosen.label = label
        return chosen

    def every_class(self, n: int) -> Tensor | None:
        """Class numbers [n], each class in turn, for means over all classes; None if there are no classes."""
        return torch.arange(n) % self.c_dim if self.c_dim else None

    def truncate(self, w: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
        """``w_avg + psi (w - w_avg)`` on the first ``cutoff`` layers (default all). w: [N, L, D]."""
        if psi == 1:
            return w
        cutoff = self.num_ws if cutoff is None else cutoff
        return torch.cat([self.w_avg + psi * (w[:, :cutoff] - self.w_avg), w[:, cutoff:]], 1)

    def _layers(self):
        """(layer, index into W+) in the order of StyleSpace."""
        for i, conv in enumerate(self.convs):
            yield conv, i
            if i % 2 == 0:
                yield self.rgbs[i // 2], i + 1

    def style_space(self, w: Tensor) -> list[Tensor]:
        """w [N, L, D] -> modulation vectors [N, C_i]: conv, rgb, then conv, conv, rgb for each resolution."""
        if w.ndim != 3 or w.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(
                f"this generator takes w of shape [N, {self.num_ws}, {self.w_dim}], not {list(w.shape)}; "
                "repeat one w per image over the layers with w[:, None].repeat(1, G.num_ws, 1)"
            )
        return [layer.affine(w[:, i]) for layer, i in self._layers()]

    def synthesis(self, w: Tensor, noise: Noise = "const", dtype: torch.dtype | None = None) -> Tensor:
        """w [N, L, D] -> images [N, 3, R, R], nominally in [-1, 1].

        noise: see :data:`Noise`; tensors must be broadcastable to [N, 1, r, r].
        dtype: of the convolutions (default: that of ``w``). Half precision starts at resolution
        :data:`HALF_FROM`; the image is at least float32.
        """
        return self.synthesis_from_styles(self.style_space(w), noise, dtype)

    def synthesis_from_styles(
        self, styles: Sequence[Tensor], noise: Noise = "const", dtype: torch.dtype | None = None
    ) -> Tensor:
        """As :meth:`synthesis`, from the modulation vectors of :meth:`style_space`."""
        if isinstance(noise, str) and noise not in ("const", "random", "none"):
            known = f"'const', 'random', 'none' or {len(self.convs)} tensors"
            raise ValueError(f"noise must be {known}, not {noise!r}")
        if not isinstance(noise, str) and len(noise) != len(self.convs):
            raise ValueError(f"this generator takes {len(self.convs)} noise tensors, not {len(noise)}")
        if len(counts := {len(style) for style in styles}) > 1:
            counts = ", ".join(map(str, sorted(counts)))
            raise ValueError(f"all styles must be for the same number of images, not for {counts}")
        n, dtype, styles, image = styles[0].shape[0], dtype or styles[0].dtype, list(styles), None
        const = self.const[None].expand(n, -1, -1, -1).to(styles[0].dtype if dtype in ops.HALF else dtype)
        x = ops.modulate(const, styles[0])  # each layer multiplies its output by the style of its reader
        for i, conv in enumerate(self.convs):
            style, rgb = styles.pop(0), None
            if i % 2 == 0:
                layer = self.rgbs[i // 2]
                rgb = layer.weight * layer.scale, styles.pop(0)
            if x.dtype != dtype and conv.noise_const.shape[-1] >= HALF_FROM:
                x = x.to(dtype, memory_format=ops.layout_of(dtype))
            noise_map = self._noise(noise, i, n)
            e = ops.Epilogue(noise=noise_map, clamp=self.conv_clamp, styles=styles[:1], rgb=rgb)
            out = conv(x, style, self.fir, e)
            x = out.scaled[0] if out.scaled else None  # None: no convolution reads the last layer
            if rgb is not None:
                shown = layer(out.rgb, self.conv_clamp)
                image = shown if image is None else shown + upsample2x(image, self.fir)
        return image

    def _noise(self, noise: Noise, i: int, n: int) -> Tensor | None:
        const = self.convs[i].noise_const
        if noise == "random":
            return torch.randn(n, 1, *const.shape, device=const.device)
        return {"none": None, "const": const}[noise] if isinstance(noise, str) else noise[i]

    def forward(
        self, z: Tensor, truncation: float = 1.0, noise: str = "const", c: Classes | None = None
    ) -> Tensor:
        return self.synthesis(self.mapping(z, truncation, c=c), noise)


def upsample2x(x: Tensor, f: Tensor) -> Tensor:
    """Up-sampling by 2 with the FIR filter ``f`` [n, n]. [N, C, H, W] -> [N, C, 2 H, 2 W]."""
    n = f.shape[-1]
    before, after = (n + 1) // 2, (n - 2) // 2
    return ops.upfirdn2d(x, f, up=2, pad=(before, after, before, after), gain=4.0)


def max_batch(generator: Generator) -> int:
    """Number of images to synthesise together: 64 of 1024² would take 50 GB."""
    return max(1, min(64, 64 * 256**2 // generator.resolution**2))
