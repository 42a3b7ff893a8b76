"""The Triton operators against the reference: on the GPU where there is one, else through Triton's interpreter."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cfclip
from cfclip.models import ops
from cfclip.models.ops import choice, convolution, dispatch, frozen, reference
from cfclip.models.stylegan2 import Generator

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ((torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False))
"""dtype and whether channels lie last."""


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The module of the kernels. The interpreter takes over what is decorated while its variable is set."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setattr(
                triton.language, "sum", triton.jit(triton.language.sum.fn)
            )  # others may have imported Triton before
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        from cfclip.models.ops import triton_ops

        yield triton_ops


def draw(shape: tuple, dtype: torch.dtype = torch.float32, last: bool = False, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def check(op, *inputs: torch.Tensor | None) -> None:
    """Values and gradients with respect to ``inputs`` of ``op(module, *inputs)``; the reference works in float32, from the same numbers."""
    from cfclip.models.ops import triton_ops

    results = []
    for module, dtype in ((triton_ops, None), (reference, torch.float32)):
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        ys = op(module, *leaves)
        ys = ys if isinstance(ys, tuple) else (ys,)
        cotangents = [draw(y.shape, inputs[0].dtype, seed=i).to(y.dtype) for i, y in enumerate(ys)]
        results.append([*ys, *torch.autograd.grad(ys, [t for t in leaves if t is not None], cotangents)])
    for a, b in zip(*results, strict=True):
        eps = torch.finfo(
            a.dtype
        ).eps  # sums of many are as precise as float32 makes them, in units of the largest
        torch.testing.assert_close(
            a.float(),
            b,
            rtol=4 * eps,
            atol=(4 * eps if eps > 1e-5 else 2e-6) * max(1, b.abs().max().item() if b.numel() else 1),
        )


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
def test_upfirdn2d(case, dtype, last):
    up, down, pad, taps = UPFIRDN[case]
    f = draw(taps, seed=1)
    check(lambda m, x: m.upfirdn2d(x, f, up, down, pad, 1.5), draw((2, 3, 7, 5), dtype, last))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 2),
    st.integers(1, 9),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(1, 4),
    st.integers(1, 4),
    st.tuples(*[st.integers(-3, 6)] * 4),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.booleans(),
)
def test_upfirdn2d_of_any_shape(n, c, size, up, down, pad, taps, last):
    from cfclip.models.ops import triton_ops

    f, x = draw(taps, seed=1), draw((n, c, *size), last=last)
    padded = size[0] * up + pad[2] + pad[3], size[1] * up + pad[0] + pad[1]
    if padded[0] < taps[0] or padded[1] < taps[1]:
        with pytest.raises(ValueError, match="does not fit"):
            triton_ops.upfirdn2d(x, f, up, down, pad)
    elif (
        min(size[0] * up + min(pad[2], 0) + min(pad[3], 0), size[1] * up + min(pad[0], 0) + min(pad[1], 0))
        > 0
    ):
        check(lambda m, x: m.upfirdn2d(x, f, up, down, pad), x)


def test_upfirdn2d_is_differentiable_twice(kernels):
    f, results = draw((4, 4)), []
    for upfirdn2d in (kernels.upfirdn2d, reference.upfirdn2d):
        x = draw((1, 2, 5, 4)).requires_grad_()
        (g,) = torch.autograd.grad(
            upfirdn2d(x, f, up=2, pad=(2, 1, 2, 1)).square().sum(), x, create_graph=True
        )
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("dtype", "last"), KINDS)
@pytest.mark.parametrize(
    "parts", ["dnbsc", "dnbssc", "dnbss+", "dns+", "b", "bc", "n", "", "d+", "nb+", "dnbsf", "dbf"]
)
def test_epilogue(parts, dtype, last):
    """Demodulation, noise, bias, the styles of the readers, clamp; +: pixel shuffle; f: a filter before all."""
    shuffle, c = "+" in parts, 5
    x, size = (
        (draw((2, 4 * c, 7, 3), dtype, last), (14, 6))
        if shuffle
        else (draw((2, c, 7, 3), dtype, last), (7, 3))
    )
    fir, size = (draw((4, 4), seed=8) / 4, (6, 2)) if "f" in parts else (None, size)
    noise = draw((2, 1, *size), seed=2) if "n" in parts else None
    d, bias = (
        draw((2, c), seed=3).abs() if "d" in parts else None,
        draw((c,), seed=4) if "b" in parts else None,
    )
    styles = [draw((2, c), seed=5 + i) for i in range(parts.count("s"))]
    clamp = 0.7 if "c" in parts else None
    if fir is not None and dtype != torch.float32:
        pytest.skip("what the filter makes is rounded before the rest, unlike the float32 reference")
    check(
        lambda m, x, d, *styles: m.epilogue(
            x, d, noise, bias, clamp=clamp, styles=styles, shuffle=shuffle, fir=fir
        ),
        x,
        d,
        *styles,
    )


@pytest.mark.parametrize("parts", ["r", "sr"])
def test_rgb(parts):
    """The layer after it and the RGB layer read an output, or just the latter."""
    weight, bias, styles = (
        draw((3, 5, 1, 1), seed=3),
        draw((5,), seed=4),
        [draw((2, 5), seed=5 + i) for i in range(len(parts))],
    )
    check(
        lambda m, x, d, *styles: m.epilogue(x, d, None, bias, styles=styles[:-1], rgb=(weight, styles[-1])),
        draw((2, 5, 7, 3)),
        draw((2, 5)).abs(),
        *styles,
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 3),
    st.integers(1, 70),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_epilogue_of_any_shape(n, c, size, shuffle, last, each):
    shuffle = shuffle and n > 0  # torch's gradient of an empty pixel shuffle has the wrong shape
    h, w = (2 * s for s in size) if shuffle else size
    noise, bias = draw((n, 1, h, w) if each else (h, w), seed=2), draw((c,), seed=4)
    check(
        lambda m, x, d, *styles: m.epilogue(x, d, noise, bias, clamp=2, styles=styles, shuffle=shuffle),
        draw((n, 4 * c if shuffle else c, *size), last=last),
        draw((n, c), seed=3).abs(),
        draw((n, c), seed=5),
        draw((n, c), seed=6),
    )


@pytest.mark.parametrize(
    "shape",
    [(4, 3), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 3, 4), (0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (2, 1, 1, 1)],
)
@pytest.mark.parametrize("options", [{}, {"slope": 1, "gain": 1, "clamp": 0.5}, {"slope": 0.1, "gain": 3}])
def test_bias_act(shape, options):
    bias = draw(shape[1:2], seed=1)
    check(lambda m, x: m.bias_act(x, bias, **options), draw(shape))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 3),
        lambda x: x[:, ::2, 1:, ::3],
        lambda x: x.flip(2)[:, :, :1].expand(-1, -1, 6, -1),
        lambda x: x.permute(1, 0, 3, 2),
    ],
)
def test_strides(view):
    f, x = draw((3, 3), seed=1), draw((4, 5, 6, 7))
    check(lambda m, x: m.bias_act(view(x), clamp=1).transpose(2, 3), x)
    check(lambda m, x: m.upfirdn2d(view(x), f, pad=(1, 1, 1, 1)).transpose(2, 3), x)


def test_what_is_no_number_is_passed_on(kernels):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], device=DEVICE).reshape(1, 1, 2, 2)
    for clamp in (None, 3.0):
        a, b = (m.bias_act(x, clamp=clamp) for m in (kernels, reference))
        torch.testing.assert_close(a, b, equal_nan=True)


def test_offsets_beyond_int32(kernels):
    n, (c, p, C, P) = np.int64(5), (np.array(x, np.int32) for x in (511, 2**21 - 1, 512, 2**21))
    for last in (False, True):
        offset = kernels._offset.fn(n, c, p, C, P, last)
        assert offset.dtype == np.int64 and offset == 6 * 512 * 2**21 - 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 10 GB of GPU memory")
def test_tensors_beyond_int32(kernels):
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.float16, device=DEVICE)
    x[-1] = draw((64, 1024, 1024), x.dtype)
    torch.testing.assert_close(kernels.bias_act(x)[-1:], reference.bias_act(x[-1:]))


def test_empty_shuffle(kernels):
    x = draw((0, 20, 3, 2)).requires_grad_()
    (y,) = kernels.epilogue(x, shuffle=True)
    assert y.shape == (0, 5, 6, 4) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_gradients_it_does_not_give(kernels):
    x, t = draw((1, 1, 2, 2)).requires_grad_(), draw((2, 2)).requires_grad_()
    with pytest.raises(NotImplementedError, match="of noise"):
        kernels.epilogue(x, noise=t)
    with pytest.raises(NotImplementedError, match="of f"):
        kernels.upfirdn2d(x, t)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(kernels.bias_act(x).square().sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="of 1 pictures as x is, not of 2"):
        kernels.epilogue(x, torch.ones(2, 1, device=DEVICE))


@pytest.mark.parametrize("operators", ["triton", "frozen"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1), (1, 2, 1), (1,)])
def test_modulated_conv2d(operators, fold, taps):
    """With the filter in the kernel or behind it, as the reference with it behind."""
    f = ops.setup_filter(taps).to(DEVICE) if taps else None
    weight = draw((6, 4, 3, 3), seed=1)

    def convolve(module, x, style):
        ours = module is not reference
        with ops.using(operators if ours else "reference"), ops.folding(fold and ours):
            return ops.modulated_conv2d(x, weight, style, f=f)

    check(convolve, draw((3, 4, 5, 7)), draw((3, 4), seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["const", "none"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("operators", ["triton", "frozen"])
def test_generator(operators, fold, dtype, noise):
    """Images, and gradients with respect to w, of a whole generator; the reference in float32."""
    torch.manual_seed(0)
    g = Generator(32, (12, 8, 8, 6), 16, 16, 2, conv_clamp=2.0).requires_grad_(False)
    for layer in (*g.convs, *g.rgbs):
        layer.bias.normal_(0, 0.1)
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
        else:  # of all together: at a kink or a clamp a single one has either slope
            assert (a - b).norm() < 0.08 * b.norm()


@pytest.mark.parametrize(("dtype", "last"), KINDS)
@pytest.mark.parametrize(
    "parts",
    [
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
    ],
)
@pytest.mark.parametrize("piece", [7, 2**18])
def test_frozen_epilogue(parts, dtype, last, piece, monkeypatch):
    """As :func:`test_epilogue`, of a frozen bias; r: an RGB layer reads it too; what is rounded between the steps is rounded otherwise."""
    monkeypatch.setattr(frozen, "PIECE", piece)
    shuffle, c = "+" in parts, 5
    x, size = (
        (draw((2, 4 * c, 7, 3), dtype, last), (14, 6))
        if shuffle
        else (draw((2, c, 7, 3), dtype, last), (7, 3))
    )
    fir, size = (draw((4, 4), seed=8) / 4, (6, 2)) if "f" in parts else (None, size)
    d, bias, noise = (
        draw((2, c), seed=3).abs() + 0.5,
        draw((c,), seed=4),
        draw((2, 1, *size), seed=2) if "n" in parts else None,
    )
    styles, rgb = [draw((2, c), seed=5 + i) for i in range(parts.count("s"))], parts.count("r")
    styles += [draw((2, c), seed=7)] * rgb
    weight, results = draw((3, c, 1, 1), seed=6), []
    for module, kind in ((frozen, dtype), (reference, torch.float32)):
        leaves = [
            t.detach().to(k).requires_grad_()
            for t, k in zip((x, d, *styles), (kind, *[torch.float32] * 4), strict=False)
        ]
        readers = {"styles": leaves[2:-1], "rgb": (weight, leaves[-1])} if rgb else {"styles": leaves[2:]}
        ys = module.epilogue(
            leaves[0],
            leaves[1],
            noise,
            bias,
            clamp=0.7 if "c" in parts else None,
            shuffle=shuffle,
            fir=fir,
            **readers,
        )
        results.append([
            *ys,
            *torch.autograd.grad(ys, leaves, [draw(y.shape, dtype, seed=9).to(y.dtype) for y in ys]),
        ])
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        tolerance = 3e-6 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.float(), b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))


def test_a_half_precision_layer_is_rounded_once():
    """Every value is the float32 one's nearest, whatever is done between."""
    x, d, bias = draw((2, 5, 9, 6), torch.bfloat16, True), draw((2, 5), seed=1).abs(), draw((5,), seed=2)
    style, f = draw((2, 5), seed=3), ops.setup_filter((1, 3, 3, 1)).to(DEVICE)
    (y,) = frozen.epilogue(x, d, None, bias, styles=[style], fir=f)
    (exact,) = reference.epilogue(x.float(), d, None, bias, styles=[style], fir=f)
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2 + 1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "last"), KINDS)
@pytest.mark.parametrize(("k", "up"), [(1, False), (3, False), (3, True)])
def test_frozen_convolution(k, up, dtype, last):
    x, kernel = draw((2, 4, 6, 5), dtype, last).requires_grad_(), draw((3, 4, k, k), dtype, last, seed=1)
    cotangent = draw((2, 3, 13, 11) if up else (2, 3, 6, 5), dtype, last, seed=2)
    (y, g), (y0, g0) = (
        ((y := module.conv2d(x, kernel, up)), torch.autograd.grad(y, x, cotangent)[0])
        for module in (frozen, reference)
    )
    torch.testing.assert_close(y, y0)
    torch.testing.assert_close(g, g0)
    assert g.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), (
        "the next pass would copy it"
    )


def test_frozen_operators_give_no_gradient_of_what_is_frozen(kernels):
    x, d, t = draw((1, 1, 2, 2)), draw((1, 1)), draw((1,)).requires_grad_()
    for module in (frozen, kernels):
        with pytest.raises(NotImplementedError, match="of bias"):
            module.epilogue(x, d, None, t)
    with pytest.raises(NotImplementedError, match="of kernel"):
        frozen.conv2d(x, t.reshape(1, 1, 1, 1))
    for y in (
        frozen.conv2d(x.requires_grad_(), d.reshape(1, 1, 1, 1)),
        frozen.epilogue(x, d, None, t.detach())[0],
    ):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="of 1 pictures as x is, not of 3"):
        frozen.epilogue(x, torch.ones(3, 1, device=DEVICE), None, t.detach())


def test_a_frozen_generator_is_not_differentiated_twice(generator):
    """Not to a wrong number, either: hvp names its inputs, and torch's once_differentiable would not be asked."""
    w = generator.mapping(torch.randn(1, 12))

    def size(w: torch.Tensor) -> torch.Tensor:
        return generator.synthesis(w).square().sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hvp(size, w, w)
    with ops.using("reference"):
        assert torch.autograd.functional.hvp(size, w, w)[1].isfinite().all()


def test_no_pictures(kernels):
    for module in (frozen, kernels):
        x, d, b = (
            draw((0, 8, 3, 2)).requires_grad_(),
            torch.ones(0, 2, device=DEVICE),
            torch.zeros(2, device=DEVICE),
        )
        (y,) = module.epilogue(x, d, None, b, shuffle=True)
        assert y.shape == (0, 2, 6, 4) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_what_a_frozen_layer_leaves_to_the_reference(generator):
    x, d, b = draw((2, 3, 4, 4)), torch.ones(2, 3, device=DEVICE), torch.ones(3, device=DEVICE)
    torch.testing.assert_close(
        frozen.epilogue(x, d, None, b, gain=-1.0), reference.epilogue(x, d, None, b, gain=-1.0)
    )
    w = generator.mapping(torch.randn(1, 12)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        generator.synthesis(w).square().sum().backward()
    assert w.grad.norm() > 0
    generator.rgbs[1].weight.requires_grad_()
    generator.synthesis(w.detach()).square().sum().backward()
    assert generator.rgbs[1].weight.grad.norm() > 0, "an RGB layer is trained alone"


def test_a_frozen_layer_keeps_one_activation():
    """Elements that the graph of a picture holds, those of each storage once; the reference's hold three times as many."""
    torch.manual_seed(0)
    g, kept = Generator(32, (16, 16, 16, 16), 8, 8, 1).requires_grad_(False), {}
    for operators in ("frozen", "reference"):
        held = {}

        def hold(t: torch.Tensor, held=held) -> torch.Tensor:
            held[t.untyped_storage().data_ptr()] = t
            return t

        with ops.using(operators), torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            image = g.synthesis(torch.randn(4, g.num_ws, 8, requires_grad=True))
        kept[operators] = sum(t.numel() for t in held.values() if t.ndim == 4 and t.shape[:2] == (4, 16))
        del image
    outputs = sum(
        4 * 16 * r * r * 2 for r in (4, 8, 16, 32)
    )  # of two layers each; at 4² the constant is in the first one's place
    assert kept["frozen"] == outputs and kept["reference"] > 2.5 * outputs, kept


def test_what_folds(monkeypatch):
    """Nothing in float32; in half precision what was measured, once for each number of channels, and clearly faster."""
    asked, seconds = [], {}
    monkeypatch.setattr(
        convolution, "quickest", lambda ways, device: asked.append(device) or seconds["found"]
    )
    f, weight = ops.setup_filter((1, 3, 3, 1)), torch.zeros(4, 3, 3, 3)
    assert not ops.folds(weight, f, torch.float32) and not ops.folds(weight, f, torch.float64) and not asked
    for found, pays in (([1.0, 0.5], True), ([1.0, 0.95], False), ([0.5, 1.0], False)):
        convolution._folding_pays.cache_clear()
        seconds["found"] = found
        assert (
            ops.folds(weight, f, torch.bfloat16) is pays and ops.folds(weight + 1, f, torch.bfloat16) is pays
        )
        assert ops.prepare(weight, f, torch.bfloat16).phases is pays
    assert len(asked) == 3
    convolution._folding_pays.cache_clear()
    assert not ops.folds(weight, ops.setup_filter((1, 2, 1)), torch.bfloat16), "only four taps can be"
    with ops.folding(True):
        assert ops.folds(weight, f, torch.float32) and not ops.folds(
            weight, ops.setup_filter((1, 2, 1)), torch.float32
        )


def test_folding_is_measured(monkeypatch):
    weight, f = torch.zeros(4, 3, 3, 3, device=DEVICE), ops.setup_filter((1, 3, 3, 1)).to(DEVICE)
    for seconds, fold in (([1.0, 0.5], True), ([1.0, 0.95], False), ([0.5, 1.0], False)):
        used = []

        def measured(ways, device, seconds=seconds, used=used):
            for way in ways:
                way()
            used.append(dispatch._operators(weight))
            return seconds

        monkeypatch.setattr(convolution, "quickest", measured)
        convolution._folding_pays.cache_clear()
        with ops.using("reference"), torch.inference_mode():
            assert ops.folds(weight, f, torch.bfloat16) is ops.folds(weight, f, torch.bfloat16) is fold
        assert len(used) == 1 and used[0] is not reference, "once, and of what runs elsewhere"
    convolution._folding_pays.cache_clear()


def test_the_quickest_way_and_dtype(monkeypatch):
    calls = []
    slow, quick = choice.quickest(
        [lambda: calls.append("slow") or time.sleep(0.02), lambda: calls.append("quick")],
        torch.device("cpu"),
        turns=3,
    )
    assert slow >= 0.02 and quick < slow and calls == ["slow", "quick"] * 4
    choice.quickest([lambda: calls.append("long") or time.sleep(0.02)], torch.device("cpu"), patience=0.03)
    assert calls[8:] == ["long"] * 2, "once to warm up, and the turn in which patience ends"
    for seconds, dtype in (
        ([1.0, 0.5], torch.bfloat16),
        ([1.0, 0.95], torch.float32),
        ([0.1, 1.0], torch.float32),
    ):
        monkeypatch.setattr(choice, "quickest", lambda ways, device, seconds=seconds: seconds)
        assert ops.fast_dtype.__wrapped__(torch.device("cpu")) is dtype
    monkeypatch.setattr(choice, "quickest", lambda *_: (_ for _ in ()).throw(TypeError("no bfloat16 here")))
    assert ops.fast_dtype.__wrapped__(torch.device("cpu")) is torch.float32


def test_which_operators(kernels, monkeypatch):
    monkeypatch.setattr(dispatch, "_compiles", lambda device: True)
    x, trained = (
        SimpleNamespace(is_cuda=True, dtype=torch.float16, device=None),
        torch.zeros(1, requires_grad=True),
    )
    assert dispatch._operators(x, None, trained.detach()) is kernels
    assert dispatch._operators(x, trained) is reference
    with torch.no_grad():
        assert dispatch._operators(x, trained) is kernels
    assert dispatch._operators(SimpleNamespace(is_cuda=True, dtype=torch.float64)) is frozen
    assert (
        dispatch._operators(torch.zeros(1)) is frozen
        and dispatch._operators(torch.zeros(1), trained) is reference
    )
    with ops.using("triton"):
        assert dispatch._operators(torch.zeros(1), trained) is kernels
        with ops.using("reference"):
            assert dispatch._operators(x) is reference
        assert dispatch._operators(torch.zeros(1)) is kernels
    assert dispatch._operators(torch.zeros(1)) is frozen
    with pytest.raises(ValueError, match="'cuda'"), ops.using("cuda"):
        pass


def test_where_triton_does_not_work(kernels, monkeypatch):
    def fails(x):
        raise RuntimeError("no C compiler")

    assert dispatch._compiles.__wrapped__(torch.device(DEVICE))
    monkeypatch.setattr(kernels, "epilogue", fails)
    with pytest.warns(UserWarning, match=r"in plain torch.*no C compiler"):
        assert not dispatch._compiles.__wrapped__(torch.device(DEVICE))


COMPILED = """
import sys, types
package = sys.modules["cfclip"] = types.ModuleType("cfclip")                   # its other modules import torchvision, which imports Triton
package.__path__ = sys.argv[1:]
import cfclip.ops
assert "triton" not in sys.modules and "cfclip.ops.triton_ops" not in sys.modules

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cfclip.models.ops import triton_ops as t
integers = {"C", "H", "W", "OUT_H", "OUT_W", "noise_step", "before_row", "before_col", "first_row", "first_col"}
activations = {"x", "y", "y0", "y1", "g0", "g1", "gx"}
dtypes = {"slope": "fp32", "gain": "fp32", "clamp": "fp32", **dict.fromkeys(integers, "i32"), **dict.fromkeys(activations, "*fp16")}
tile = {"LAST": True, "PIXELS": 32, "CHANNELS": 32}
fir = {"UP": 2, "DOWN": 1, "FH": 4, "FW": 4, "FLIPPED": False}
for kernel, constants in ((t._upfirdn2d, fir), (t._epilogue, {"SHUFFLE": True}), (t._epilogue_backward, {"SHUFFLE": True, "TILES": 8}),
                          (t._epilogue_backward, {"SHUFFLE": False, "TILES": 8, "C": 1, "H": 1, "W": 1,
                                                  **dict.fromkeys(("d", "noise", "style0", "style1", "g1", "clamp"))})):
    constants = tile | constants
    signature = {name: "constexpr" if name in constants else dtypes.get(name, "*fp32") for name in kernel.arg_names}
    binary = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32)).asm["cubin"]
    print(kernel.__name__, len(binary))
"""


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3), reason="the compiler's interface was another"
)
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """What the interpreter lets pass and the compiler does not; and importing ``cfclip.ops`` imports no Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *cfclip.__path__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
