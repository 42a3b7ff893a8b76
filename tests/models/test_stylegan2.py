import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from cfclip.models import ops
from cfclip.models.ops import bias_act, folding, modulated_conv2d, setup_filter, upfirdn2d
from cfclip.models.stylegan2 import Generator, upsample2x


def test_upfirdn2d_by_hand():
    x = torch.tensor([[[[1.0, 2.0]]]])
    f = torch.tensor([[1.0, 10.0]])
    assert upfirdn2d(x, f, pad=(1, 1, 0, 0)).flatten().tolist() == [1, 12, 20]  # a true convolution
    row, one = torch.arange(6.0).reshape(1, 1, 1, 6), torch.ones(1, 1)
    assert upfirdn2d(x, one, up=2).tolist() == [[[[1, 0, 2, 0], [0, 0, 0, 0]]]]
    assert upfirdn2d(row, one, down=2).flatten().tolist() == [0, 2, 4]
    assert upfirdn2d(row, one, pad=(-1, -2, 0, 0), gain=3).flatten().tolist() == [3, 6, 9]


def test_bias_act_by_hand():
    x = torch.tensor([[-1.0, 2.0]])
    assert bias_act(x, torch.tensor([0.0, 1.0]), gain=2, clamp=5).tolist() == [[pytest.approx(-0.4), 5.0]]


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_conv_is_the_papers_per_sample_convolution(up, demodulate):
    torch.manual_seed(0)
    x, weight, style = (torch.randn(shape).double() for shape in ((3, 4, 5, 7), (6, 4, 3, 3), (3, 4)))
    f = torch.rand(4, 4).double()
    w = weight[None] * style[:, None, :, None, None]
    if demodulate:
        w = w / (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    rows = []
    for image, kernel in zip(x, w, strict=True):
        if up:
            y = F.conv_transpose2d(image[None], kernel.transpose(0, 1), stride=2)
            rows.append(upfirdn2d(y, f, pad=(1, 1, 1, 1), gain=4))
        else:
            rows.append(F.conv2d(image[None], kernel, padding=1))
    result = modulated_conv2d(x, weight, style, demodulate, f if up else None)
    torch.testing.assert_close(result, torch.cat(rows), rtol=1e-9, atol=1e-9)


def test_upsampling_keeps_a_constant():
    y = upsample2x(torch.full((1, 1, 8, 8), 3.0), setup_filter((1, 3, 3, 1)))
    torch.testing.assert_close(y[..., 3:-3, 3:-3], torch.full((1, 1, 10, 10), 3.0))


def test_truncation_pulls_the_first_layers_towards_the_mean(generator):
    z = torch.randn(3, 12)
    w = generator.mapping(z)
    assert w.shape == (3, generator.num_ws, 16) and generator.num_ws == 6
    half = generator.mapping(z, truncation=0.5, truncation_cutoff=2)
    torch.testing.assert_close(half[:, :2], (w[:, :2] + generator.w_avg) / 2)
    torch.testing.assert_close(half[:, 2:], w[:, 2:])


def test_synthesis_from_w_styles_and_given_noise(generator):
    w = generator.mapping(torch.randn(2, 12))
    image = generator.synthesis(w)
    assert image.shape == (2, 3, 16, 16)
    torch.testing.assert_close(image, generator.synthesis_from_styles(generator.style_space(w)))
    torch.testing.assert_close(image, generator.synthesis(w, [conv.noise_const for conv in generator.convs]))
    assert not torch.allclose(image, generator.synthesis(w, "none"))
    torch.testing.assert_close(image, generator.synthesis(w, dtype=torch.bfloat16), rtol=0, atol=0.2)


def test_wrong_shapes_are_named(generator):
    with pytest.raises(ValueError, match=r"\[N, 6, 16\], not \[2, 16\]"):
        generator.synthesis(torch.randn(2, 16))
    with pytest.raises(ValueError, match="'loud'"):
        generator.synthesis(generator.mapping(torch.randn(1, 12)), "loud")
    with pytest.raises(ValueError, match="power of two"):
        Generator(48, (8, 8, 8))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_generator_is_differentiable_after_inference_mode(dtype, generator):
    w = generator.mapping(torch.randn(1, 12))
    with torch.inference_mode():
        shown, born = generator.synthesis(w, dtype=dtype), copy.deepcopy(generator)
        torch.testing.assert_close(born.synthesis(w, dtype=dtype), shown)
    w.requires_grad_()
    generator.synthesis(w, dtype=dtype).square().sum().backward()
    assert w.grad.norm() > 0


def test_two_threads_can_share_a_generator(generator):
    def drawn(dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.no_grad():
            return [generator.synthesis(w, dtype=dtype) for _ in range(30)]

    w, between = generator.mapping(torch.randn(1, 12)), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            for pictures in threads.map(drawn, (torch.float32, torch.bfloat16)):
                assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    finally:
        sys.setswitchinterval(between)


def test_all_styles_are_for_the_same_number_of_images(generator):
    styles = generator.style_space(generator.mapping(torch.randn(2, 12)))
    with pytest.raises(ValueError, match="the same number of images, not for 1, 2"):
        generator.synthesis_from_styles([styles[0][:1], *styles[1:]])


@pytest.fixture
def prepared(monkeypatch) -> list:
    """The calls of ``ops.prepare`` by generators."""
    calls, prepare = [], ops.prepare
    monkeypatch.setattr(ops, "prepare", lambda *args: calls.append(args) or prepare(*args))
    return calls


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_frozen_kernels_are_prepared_once_and_again_after_they_change(dtype, prepared):
    torch.manual_seed(0)
    g = Generator(32, [8] * 4, 16, 16, 2)
    w = torch.randn(2, g.num_ws, 16)

    @torch.no_grad()
    def drawn(g: Generator, expected: int, fold: bool = False) -> torch.Tensor:
        """An image, for which ``expected`` kernels are prepared."""
        prepared.clear()
        with folding(fold):  # else it is measured
            image = g.synthesis(w, dtype=dtype)
        assert len(prepared) == expected
        return image

    everything = len(g.convs)
    fresh = drawn(g, everything)
    assert torch.equal(drawn(g, everything), fresh), "trained weights: nothing is kept"
    g.requires_grad_(False)
    assert torch.equal(drawn(g, everything), fresh) and torch.equal(drawn(g, 0), fresh)
    assert torch.equal(drawn(copy.deepcopy(g), everything), fresh), "a copy prepares its own"
    g.convs[1].weight[0].mul_(1.5)
    other = drawn(g, 1)
    assert not torch.equal(other, fresh)
    # not a common factor: that would be demodulated away
    g.convs[2].weight.data = g.convs[2].weight.data + 1
    assert not torch.equal(drawn(g, 1), other)
    for _ in range(3):  # the weights may come back to the addresses they had, with other values
        g.convs[2].weight[0].mul_(1.1)
        drawn(g, 1)
        assert torch.equal(drawn(g.bfloat16().float(), everything), drawn(copy.deepcopy(g), everything))
    folded = drawn(g, everything // 2, fold=True)
    g.fir.mul_(0.5)
    again = drawn(g, everything // 2, fold=True)
    assert not torch.equal(again, folded), "a folded kernel holds the filter"
    g.fir.mul_(2)
    other = drawn(g, everything // 2)
    g.requires_grad_(True)
    assert torch.equal(drawn(g, everything), other)
