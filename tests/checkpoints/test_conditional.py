"""Class-conditional generators of StyleGAN2-ADA: read, drawn from, and refused without a class."""

import numpy as np
import official
import pytest
import torch
from test_wrappers import nvidia_state

from cfclip.checkpoints import weights
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.weights import WeightsError
from cfclip.inversion.projector import w_spread

CLASSES = 5


def conditional(**kwargs):
    """Every width differs, so that no two tensors can be confused."""
    sizes = {"z_dim": 6, "w_dim": 8, "c_dim": CLASSES, "conv_clamp": 256} | kwargs
    return official.random_generator(16, (6, 5, 4), **sizes)


def write(form, g, folder):
    """The generator in a file of the format ``form``."""
    path = folder / form
    match form:
        case "pytorch.pkl":
            return official.nvidia(g, path)
        case "tensorflow.pkl":
            return official.tensorflow(g, path, conv_clamp=256)
        case "state.pt":
            torch.save(nvidia_state(g), path)
        case "saved-again.pt":  # the moving average beside the network that was trained, under a prefix
            state = {f"module.{name}": tensor for name, tensor in nvidia_state(g).items()}
            torch.save({"g_ema": state, "step": 3}, path)
        case "ours.safetensors":
            weights.save(g, path, "generator", g.config)
    return path


FORMS = ("pytorch.pkl", "tensorflow.pkl", "state.pt", "saved-again.pt", "ours.safetensors")


def written_out(g, z, labels):
    """w of z [N, z_dim] and labels [N, c_dim] by NVIDIA's formula, in numpy and double precision."""

    def array(tensor):
        return tensor.detach().double().numpy()

    def normalised(x):
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-8)

    y = array(labels) @ array(g.embed.weight).T / np.sqrt(CLASSES) + array(g.embed.bias)
    x = np.concatenate([normalised(array(z)), normalised(y)], 1)
    for layer in g.style:
        x = x @ array(layer.weight).T * 0.01 / np.sqrt(x.shape[1]) + 0.01 * array(layer.bias)
        x = np.sqrt(2) * np.where(x > 0, x, 0.2 * x)
    return torch.from_numpy(x)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_classes_give_what_the_formula_says_from_every_format(form, tmp_path):
    made, z = conditional(), torch.randn(4, 6)
    g = load_generator(write(form, made, tmp_path))
    assert (g.c_dim, g.z_dim, g.w_dim, g.num_ws) == (CLASSES, 6, 8, 6)
    one_hot = torch.eye(CLASSES)
    numbers = torch.tensor([4, 0, 2, 2])
    mixed = torch.rand(4, CLASSES)
    for c, labels in (
        (3, one_hot[[3] * 4]),
        ([1], one_hot[[1] * 4]),
        (numbers, one_hot[numbers]),
        (numbers.int(), one_hot[numbers]),
        ([4, 0, 2, 2], one_hot[numbers]),
        (one_hot[numbers], one_hot[numbers]),
        (one_hot[2], one_hot[[2] * 4]),
        (mixed.double(), mixed),
    ):
        right = written_out(made, z, labels)
        w = g.mapping(z, c=c)
        assert w.shape == (4, 6, 8)
        for layer in range(6):
            torch.testing.assert_close(w[:, layer].double(), right, rtol=1e-5, atol=1e-5)
        cut = g.mapping(z, 0.6, 2, c=c).double()  # towards the file's mean, which is that of all classes
        torch.testing.assert_close(cut[:, 1], made.w_avg + 0.6 * (right - made.w_avg), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cut[:, 2], right, rtol=1e-5, atol=1e-5)
        assert torch.equal(g(z, c=c), g.synthesis(w))
    assert (g.mapping(z, c=0) - g.mapping(z, c=1)).abs().max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_a_class_that_is_missing_or_wrong_is_named(form, tmp_path):
    g, z = load_generator(write(form, conditional(), tmp_path)), torch.randn(4, 6)
    for call in (lambda: g.mapping(z), lambda: g(z), lambda: g.map_one(z), lambda: g.mapping(z, 0.7)):
        with pytest.raises(ValueError, match=r"class-conditional.* needs a class, one of 0 to 4: G\.mapping"):
            call()
    for c, message in (
        (5, "must be one of 0 to 4, not 5"),
        (-1, "must be one of 0 to 4, not -1"),
        ([0, 1, 2, 7], "must be one of 0 to 4, not 7"),
        ([0, 1, 2], r"one whole number, 4 of them, or labels as floats, not torch\.int64 of shape \[3\]"),
        (torch.eye(5, dtype=torch.int64)[:4], r"not torch\.int64 of shape \[4, 5\]"),
        (True, r"not torch\.bool"),
        ("cat", "classes must be one whole number, 4 of them, or labels as floats, not 'cat'"),
        (3.0, r"labels must be finite, of shape \[5\] or \[4, 5\], not of shape \[\]"),
        (torch.zeros(5, 4), r"not of shape \[5, 4\]"),
        (torch.full((4, 5), float("nan")), "labels must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            g.mapping(z, c=c)
    plain = official.random_generator()
    for call in (lambda: plain.mapping(torch.randn(2, 8), c=0), lambda: plain.for_class(0)):
        with pytest.raises(ValueError, match="has no classes: leave the class out"):
            call()


def test_a_generator_of_one_class_shares_its_weights():
    g, z = conditional(), torch.randn(3, 6)
    two = g.for_class(2)
    assert torch.equal(two.mapping(z), g.mapping(z, c=2)) and torch.equal(two(z), g(z, c=2))
    assert torch.equal(two.mapping(z, c=4), g.mapping(z, c=4)) and g.label is None
    assert all(a is b for a, b in zip(two.parameters(), g.parameters(), strict=True))
    for label, message in ((5, "one of 0 to 4"), ("2", "whole number"), (True, "whole number")):
        with pytest.raises(ValueError, match=message):
            g.for_class(label)


@torch.no_grad()
def test_means_over_samples_are_over_all_classes(tmp_path):
    g = conditional()
    state = {name: tensor for name, tensor in nvidia_state(g).items() if name != "mapping.w_avg"}
    torch.save(state, tmp_path / "g.pt")
    loaded = load_generator(tmp_path / "g.pt")
    w = torch.cat([g.map_one(torch.randn(4000, 6), c) for c in range(CLASSES)])
    assert ((loaded.w_avg - w.mean(0)).abs() < 6 * w.std(0) / 4096**0.5).all()
    loaded.w_avg.copy_(w.mean(0))
    assert w_spread(loaded) == pytest.approx((w - w.mean(0)).square().mean().sqrt().item(), rel=0.1)


def test_labels_that_cannot_be_used_say_why(tmp_path):
    g = conditional()
    state = nvidia_state(g)
    weight, narrow = state["mapping.embed.weight"], conditional(c_dim=0).style[0]
    path = tmp_path / "g.pt"
    for message, change in (
        (r"embed.weight of shape \[7, 5\], but needs \[8, 5\]", {"mapping.embed.weight": weight[:7]}),
        (r"its mapping.embed.weight is not all finite", {"mapping.embed.weight": weight / 0}),
        ("no room for z beside the labels", {"mapping.fc0.weight": narrow.weight}),
    ):
        torch.save(state | change, path)
        with pytest.raises(WeightsError, match=message):
            load_generator(path)
    label_concat = [("LabelConcat/weight", np.zeros((5, 8), np.float32))]
    official.tensorflow(official.random_generator(), path, mapping_extra=label_concat)
    with pytest.raises(WeightsError, match=r"5 classes.*not of StyleGAN2-ADA"):
        load_generator(path)


@pytest.mark.parametrize("sides", [(4, 8), (8, 4), (7, 4), (8, 8)])
def test_constants_of_other_sizes_are_refused_in_words_that_fit(sides, tmp_path):
    g = official.random_generator(16, (6, 5, 4))
    g.const.data = torch.randn(6, *sides)
    torch.save({"g_ema": official.rosinality(g)}, tmp_path / "r.pt")
    torch.save(nvidia_state(g), tmp_path / "n.pt")
    words = (
        f"is {sides[0]} high and {sides[1]} wide, so its pictures are not square, but only square ones work"
    )
    if sides[0] == sides[1]:
        words = "is 8 x 8, not StyleGAN2's 4 x 4: it is a modified StyleGAN2"
    pickles = official.nvidia(g, tmp_path / "n.pkl"), official.tensorflow(g, tmp_path / "t.pkl")
    for path in (tmp_path / "r.pt", tmp_path / "n.pt", *pickles):
        with pytest.raises(WeightsError, match=f"{path} cannot be used: its constant {words}"):
            load_generator(path)
