"""The operators for a frozen generator, Triton's and those in plain torch, against the reference."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfclip.models import ops, stylegan2
from cfclip.models.ops import Epilogue, frozen, reference
from cfclip.models.stylegan2 import Generator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ((torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False))
"""dtype and whether the channels are last."""
pytestmark = pytest.mark.usefixtures("kernels")


def draw(shape: tuple, dtype: torch.dtype = torch.float32, last: bool = False, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def values_and_gradients(
    op: Callable, module: ModuleType, inputs: tuple[Tensor | None, ...], dtype: torch.dtype | None
) -> list[Tensor]:
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    ys = op(module, *leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    cotangents = [draw(y.shape, inputs[0].dtype, seed=i).to(y.dtype) for i, y in enumerate(ys)]
    return [*ys, *torch.autograd.grad(ys, [t for t in leaves if t is not None], cotangents)]


def check(module: ModuleType, op: Callable, *inputs: Tensor | None) -> None:
    """Values of ``op(module, *inputs)`` and gradients of ``inputs`` are the reference's in float32."""
    ours = values_and_gradients(op, module, inputs, None)
    for a, b in zip(ours, values_and_gradients(op, reference, inputs, torch.float32), strict=True):
        assert torch.isfinite(a).all()
        # the frozen operators compute all gradients from a y that is rounded to the dtype of x
        dtype, ulps = (inputs[0].dtype, 16) if module is frozen else (a.dtype, 4)
        tolerance = 3e-6 if dtype == torch.float32 else ulps * torch.finfo(dtype).eps
        largest = max(1, b.abs().max().item() if b.numel() else 1)
        torch.testing.assert_close(a.float(), b, rtol=0, atol=tolerance * largest)


def check_epilogue(module: ModuleType, x: Tensor, e: Epilogue) -> None:
    """:func:`check` of an epilogue, for x, d and all styles."""

    def op(module: ModuleType, x: Tensor, d: Tensor | None, *styles: Tensor) -> tuple[Tensor, ...]:
        rgb = None if e.rgb is None else (e.rgb[0], styles[-1])
        styles = styles if e.rgb is None else styles[:-1]
        out = module.epilogue(x, e._replace(d=d, styles=styles, rgb=rgb))
        return out.scaled if out.rgb is None else (*out.scaled, out.rgb)

    check(module, op, x, e.d, *e.styles, *(e.rgb[1:] if e.rgb else ()))


def layer(parts: str, dtype: torch.dtype, last: bool) -> tuple[Tensor, Epilogue]:
    """x and its epilogue for 2 images of 5 channels.

    parts: demodulation, noise, bias, clamp, filter; s: read by a convolution, r: by an RGB layer; +: shuffle.
    """
    size = (14, 6) if "+" in parts else (6, 2) if "f" in parts else (7, 3)
    options = {
        "d": {"d": draw((2, 5), seed=3).abs() + 0.5},
        "n": {"noise": draw((2, 1, *size), seed=2)},
        "b": {"bias": draw((5,), seed=4)},
        "c": {"clamp": 0.7},
        "s": {"styles": [draw((2, 5), seed=5 + i) for i in range(parts.count("s"))]},
        "r": {"rgb": (draw((3, 5, 1, 1), seed=6), draw((2, 5), seed=7))},
        "+": {"shuffle": True},
        "f": {"fir": draw((4, 4), seed=8) / 4},
    }
    chosen = {name: value for part in set(parts) for name, value in options[part].items()}
    return draw((2, 20 if "+" in parts else 5, 7, 3), dtype, last), Epilogue(**chosen)


UPFIRDN = {
    "up": (2, 1, (2, 1, 2, 1), (4, 4)),
    "down": (1, 2, (1, 1, 1, 1), (4, 4)),
    "same": (1, 1, (2, 1, 2, 1), (4, 4)),
    "blur": (1, 1, (1, 1, 1, 1), (3, 3)),
    "box": (1, 2, (0, 0, 0, 0), (2, 2)),
    "both": (3, 2, (4, -1, 0, 3), (5, 3)),
    "cropped": (2, 1, (-3, 2, 1, -2), (1, 6)),
    "long": (2, 3, (7, 3, 5, 5), (7, 8)),
}


@pytest.mark.parametrize(("dtype", "last"), KINDS)
@pytest.mark.parametrize("case", UPFIRDN)
def test_upfirdn2d(case, dtype, last, kernels):
    up, down, pad, taps = UPFIRDN[case]
    f = draw(taps, seed=1)
    check(kernels, lambda m, x: m.upfirdn2d(x, f, up, down, pad, 1.5), draw((2, 3, 7, 5), dtype, last))


SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))
TAPS = st.tuples(st.integers(1, 5), st.integers(1, 5))
PADS = st.tuples(*[st.integers(-3, 6)] * 4)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 2),
    st.integers(1, 9),
    SIZES,
    st.integers(1, 4),
    st.integers(1, 4),
    PADS,
    TAPS,
    st.booleans(),
)
def test_upfirdn2d_of_any_shape(kernels, n, c, size, up, down, pad, taps, last):
    f, x = draw(taps, seed=1), draw((n, c, *size), last=last)
    pads = (pad[2:], pad[:2])  # vertical, horizontal
    padded = [s * up + sum(p) for s, p in zip(size, pads, strict=True)]
    cropped = [s * up + sum(min(side, 0) for side in p) for s, p in zip(size, pads, strict=True)]
    if padded[0] < taps[0] or padded[1] < taps[1]:
        with pytest.raises(ValueError, match="does not fit"):
            kernels.upfirdn2d(x, f, up, down, pad)
    elif min(cropped) > 0:
        check(kernels, lambda m, x: m.upfirdn2d(x, f, up, down, pad), x)


def test_upfirdn2d_is_differentiable_twice(kernels):
    f, results = draw((4, 4)), []
    for module in (kernels, reference):
        x = draw((1, 2, 5, 4)).requires_grad_()
        y = module.upfirdn2d(x, f, up=2, pad=(2, 1, 2, 1))
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("dtype", "last"), KINDS)
@pytest.mark.parametrize(
    "parts",
    ["dnbsc", "dnbssc", "dnbss+", "dns+", "b", "bc", "n", "", "d+", "nb+", "dnbsf", "dbf", "dbr", "dbsr"],
)
def test_triton_epilogue(parts, dtype, last, kernels):
    if dtype != torch.float32 and set(parts) & {"f", "r"}:
        pytest.skip("rounds between the steps, unlike the float32 reference")
    check_epilogue(kernels, *layer(parts, dtype, last))


FROZEN = [
    "dnb",
    "dnbs",
    "dnbss",
    "dbss",
    "dnbssc",
    "dnb+",
    "dnbs+",
    "dnbssc+",
    "dnbsf",
    "dnbsr",
    "dnbr",
    "dnbssrcf",
]


@pytest.mark.parametrize(("dtype", "last"), KINDS)
@pytest.mark.parametrize("parts", FROZEN)
@pytest.mark.parametrize("piece", [7, 2**18])
def test_frozen_epilogue(parts, dtype, last, piece, monkeypatch):
    monkeypatch.setattr(frozen, "PIECE", piece)
    check_epilogue(frozen, *layer(parts, dtype, last))


SMALL = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2), st.integers(1, 40), SMALL, st.booleans(), st.booleans(), st.booleans())
def test_triton_epilogue_of_any_shape(kernels, n, c, size, shuffle, last, each):
    shuffle = shuffle and n > 0  # torch's gradient of an empty pixel shuffle has the wrong shape
    h, w = (2 * s for s in size) if shuffle else size
    d, *styles = (draw((n, c), seed=seed) for seed in (3, 5, 6))
    noise, bias = draw((n, 1, h, w) if each else (h, w), seed=2), draw((c,), seed=4)
    x = draw((n, 4 * c if shuffle else c, *size), last=last)
    check_epilogue(kernels, x, Epilogue(d.abs(), noise, bias, clamp=2, styles=styles, shuffle=shuffle))


@pytest.mark.parametrize(
    "shape",
    [(4, 3), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 3, 4), (0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (2, 1, 1, 1)],
)
@pytest.mark.parametrize("options", [{}, {"slope": 1, "gain": 1, "clamp": 0.5}, {"slope": 0.1, "gain": 3}])
def test_bias_act(shape, options, kernels):
    bias = draw(shape[1:2], seed=1)
    check(kernels, lambda m, x: m.bias_act(x, bias, **options), draw(shape))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 3),
        lambda x: x[:, ::2, 1:, ::3],
        lambda x: x.flip(2)[:, :, :1].expand(-1, -1, 6, -1),
        lambda x: x.permute(1, 0, 3, 2),
    ],
)
def test_tensors_of_any_strides(view, kernels):
    f, x = draw((3, 3), seed=1), draw((4, 5, 6, 7))
    check(kernels, lambda m, x: m.bias_act(view(x), clamp=1).transpose(2, 3), x)
    check(kernels, lambda m, x: m.upfirdn2d(view(x), f, pad=(1, 1, 1, 1)).transpose(2, 3), x)


def test_nan_and_infinity_are_passed_on(kernels):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], device=DEVICE).reshape(1, 1, 2, 2)
    for clamp in (None, 3.0):
        a, b = (m.bias_act(x, clamp=clamp) for m in (kernels, reference))
        torch.testing.assert_close(a, b, equal_nan=True)


def test_offsets_beyond_int32(kernels):
    n, (c, p, C, P) = np.int64(5), (np.array(x, np.int32) for x in (511, 2**21 - 1, 512, 2**21))
    for last in (False, True):
        offset = kernels.offset_of.fn(n, c, p, C, P, last)
        assert offset.dtype == np.int64 and offset == 6 * 512 * 2**21 - 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 10 GB of GPU memory")
def test_tensors_beyond_int32(kernels):
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.float16, device=DEVICE)
    x[-1] = draw((64, 1024, 1024), x.dtype)
    torch.testing.assert_close(kernels.bias_act(x)[-1:], reference.bias_act(x[-1:]))


def test_no_images(kernels):
    constants = Epilogue(d=torch.ones(0, 5, device=DEVICE), bias=torch.zeros(5, device=DEVICE), shuffle=True)
    for module, e in ((frozen, constants), (kernels, constants), (kernels, Epilogue(shuffle=True))):
        x = draw((0, 20, 3, 2)).requires_grad_()
        (y,) = module.epilogue(x, e).scaled
        assert y.shape == (0, 5, 6, 4) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_gradients_of_constants_are_refused(kernels):
    x, d, t = draw((1, 1, 2, 2)), draw((1, 1)), draw((1,)).requires_grad_()
    for module in (frozen, kernels):
        for name in ("noise", "bias"):
            with pytest.raises(NotImplementedError, match=f"of {name}"):
                module.epilogue(x, Epilogue(d, **{name: t}))
    with pytest.raises(NotImplementedError, match="of kernel"):
        frozen.conv2d(x, t.reshape(1, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="of f"):
        kernels.upfirdn2d(x, t.reshape(1, 1))


def test_gradients_of_gradients_are_refused(kernels):
    x, d, bias = draw((1, 1, 2, 2)).requires_grad_(), draw((1, 1)), draw((1,))
    ys = [module.epilogue(x, Epilogue(d, bias=bias)).scaled[0] for module in (frozen, kernels)]
    for y in (*ys, frozen.conv2d(x, d.reshape(1, 1, 1, 1)), kernels.bias_act(x)):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_the_number_of_images_must_agree(kernels):
    x, bias = draw((1, 1, 2, 2)), draw((1,))
    for module in (frozen, kernels):
        with pytest.raises(ValueError, match="for 1 images like x, not for 3"):
            module.epilogue(x, Epilogue(torch.ones(3, 1, device=DEVICE), bias=bias))


@pytest.mark.parametrize("operators", ["triton", "frozen"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1), (1, 2, 1), (1,)])
def test_modulated_conv2d(operators, fold, taps, kernels):
    """With the filter in the kernel or after it, like the reference with the filter after it."""
    f = ops.setup_filter(taps).to(DEVICE) if taps else None
    weight, ours = draw((6, 4, 3, 3), seed=1), kernels if operators == "triton" else frozen

    def convolve(module, x, style):
        with ops.using(operators if module is ours else "reference"), ops.folding(fold and module is ours):
            return ops.modulated_conv2d(x, weight, style, f=f)

    check(ours, convolve, draw((3, 4, 5, 7)), draw((3, 4), seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["const", "none"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("operators", ["triton", "frozen"])
def test_a_whole_generator(operators, fold, dtype, noise, monkeypatch):
    """Images and gradients with respect to w; the reference in float32."""
    monkeypatch.setattr(stylegan2, "HALF_FROM", 16)
    torch.manual_seed(0)
    g = Generator(16, (12, 8, 6), 16, 16, 2, conv_clamp=2.0).requires_grad_(False)
    for module in (*g.convs, *g.rgbs):
        module.bias.normal_(0, 0.1)
    for conv in g.convs:
        conv.noise_strength.fill_(0.1)
    g, results = g.to(DEVICE), []
    for chosen in (operators, "reference"):
        w = draw((2, g.num_ws, 16)).requires_grad_()
        with ops.using(chosen), ops.folding(fold and chosen != "reference"):
            image = g.synthesis(w, noise, dtype if chosen != "reference" else None)
        assert image.dtype == torch.float32
        results.append((image, *torch.autograd.grad(image, w, draw(image.shape, seed=1))))
    for a, b in zip(*results, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
        else:  # of all together: at a kink or a clamp a single value may have either slope
            assert (a - b).norm() < 0.08 * b.norm()


def test_a_half_precision_layer_is_rounded_once():
    """Every value is the nearest to the float32 one, whatever is computed in between."""
    x, d, bias = draw((2, 5, 9, 6), torch.bfloat16, True), draw((2, 5), seed=1).abs(), draw((5,), seed=2)
    fir = ops.setup_filter((1, 3, 3, 1)).to(DEVICE)
    e = Epilogue(d, bias=bias, styles=[draw((2, 5), seed=3)], fir=fir)
    (y,), (exact,) = frozen.epilogue(x, e).scaled, reference.epilogue(x.float(), e).scaled
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2 + 1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "last"), KINDS)
@pytest.mark.parametrize(("k", "up"), [(1, False), (3, False), (3, True)])
def test_frozen_convolution(k, up, dtype, last):
    x, kernel = draw((2, 4, 6, 5), dtype, last).requires_grad_(), draw((3, 4, k, k), dtype, last, seed=1)
    cotangent = draw((2, 3, 13, 11) if up else (2, 3, 6, 5), dtype, last, seed=2)
    y, y0 = (module.conv2d(x, kernel, up) for module in (frozen, reference))
    (g,), (g0,) = (torch.autograd.grad(out, x, cotangent) for out in (y, y0))
    torch.testing.assert_close((y, g), (y0, g0))
    layout = torch.channels_last if last else torch.contiguous_format
    assert g.is_contiguous(memory_format=layout), "the next pass would copy it"


@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_spread_and_summed_in_their_own_layout(last):
    layout = torch.channels_last if last else torch.contiguous_format
    of_rgb, mixing, noise, grad = (
        draw((2, 3, 4, 5)),
        draw((2, 3, 6)),
        draw((2, 4, 5)),
        draw((2, 6, 4, 5), last=last),
    )
    spread = frozen._spread(of_rgb, mixing, layout)
    assert spread.is_contiguous(memory_format=layout), "all that reads it beside others would take longer"
    torch.testing.assert_close(spread, (mixing[..., None, None] * of_rgb[:, :, None]).sum(1))
    torch.testing.assert_close(frozen._along(grad, noise, layout), (grad * noise[:, None]).sum((2, 3)))


def test_a_frozen_generator_is_not_differentiated_twice(generator):
    """Nor to a wrong number: hvp names its inputs, and would bypass torch's once_differentiable."""
    w = generator.mapping(torch.randn(1, 12))

    def size(w: Tensor) -> Tensor:
        return generator.synthesis(w).square().sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hvp(size, w, w)
    with ops.using("reference"):
        assert torch.autograd.functional.hvp(size, w, w)[1].isfinite().all()


def test_what_the_frozen_operators_leave_to_the_reference(generator):
    x, e = draw((2, 3, 4, 4)), Epilogue(draw((2, 3), seed=1), bias=draw((3,), seed=2), gain=-1.0)
    torch.testing.assert_close(frozen.epilogue(x, e), reference.epilogue(x, e))
    w = generator.mapping(torch.randn(1, 12)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        generator.synthesis(w).square().sum().backward()
    assert w.grad.norm() > 0
    generator.rgbs[1].weight.requires_grad_()
    generator.synthesis(w.detach()).square().sum().backward()
    assert generator.rgbs[1].weight.grad.norm() > 0, "an RGB layer is trained alone"


def test_a_frozen_layer_keeps_one_activation():
    """Count the elements that the graph of an image holds, those of each storage once."""
    torch.manual_seed(0)
    g, kept = Generator(32, (16, 16, 16, 16), 8, 8, 1).requires_grad_(False), {}
    for operators in ("frozen", "reference"):
        held = {}

        def hold(t: Tensor, held=held) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t
            return t

        with ops.using(operators), torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            image = g.synthesis(torch.randn(4, g.num_ws, 8, requires_grad=True))
        kept[operators] = sum(t.numel() for t in held.values() if t.ndim == 4 and t.shape[:2] == (4, 16))
        del image
    # two layers at each resolution; at 4² the constant takes the place of the first
    outputs = sum(4 * 16 * r * r * 2 for r in (4, 8, 16, 32))
    assert kept["frozen"] == outputs and kept["reference"] > 2.5 * outputs, kept
