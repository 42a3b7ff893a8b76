"""VGG19 against what the published loss computes with the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden_files import golden, recipe, rel

from cfclip.checkpoints.networks import load_vgg
from cfclip.checkpoints.reading import build
from cfclip.method.losses import perceptual_loss
from cfclip.models.vgg import VGG19


@pytest.fixture(scope="module")
def vgg():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VGG19().state_dict().items()}
    return build(VGG19, recipe.fill_state_dict(shapes, **recipe.VGG19), "VGG19")


@pytest.mark.parametrize("size", ["64", "256"])
def test_loss_gradient_and_features_are_the_published_codes(size, vgg):
    o, images = golden("vgg_loss.pt"), golden("images_u8.pt")
    if f"{size}_loss" not in o or f"src{size}" not in images:
        pytest.skip("only the full set of goldens has this size")
    source, edited = (recipe.u8_to_image(images[f"{name}{size}"][:2]) for name in ("src", "tgt"))
    assert rel(perceptual_loss(vgg(edited), vgg(source)), o[f"{size}_loss"]) < 5e-6
    # the gradient in float64: |.|, ReLU and max-pooling have kinks, where rounding chooses the side
    exact = edited.double().requires_grad_()
    double = copy.deepcopy(vgg).double()
    perceptual_loss(double(exact), double(source.double())).backward()
    norm, pooled = exact.grad.flatten(1).norm(dim=1).float(), F.adaptive_avg_pool2d(exact.grad, 16).float()
    known = o[f"{size}_grad_yhat_pool"]
    apart = (pooled - known).abs() / known.abs().max()
    norm_error = rel(norm, o[f"{size}_grad_yhat_norm"])
    if size == "64":
        assert norm_error < 5e-6 and apart.max() < 5e-6
    else:  # the golden, float32, is on the other side in some places
        assert norm_error < 2e-4 and (apart < 5e-6).float().mean() > 0.8 and apart.max() < 5e-3
    stride = max(1, int(size) // 16 // o[f"{size}_act_r52"].shape[-1])
    with torch.no_grad():
        assert rel(vgg(source)[:1, :8, ::stride, ::stride], o[f"{size}_act_r52"]) < 5e-6
    assert not any(p.requires_grad for p in vgg.parameters())


def test_layers_of_the_official_file_that_are_not_used_are_ignored(vgg, tmp_path):
    extra = {f"conv5_{i}.{part}": torch.zeros(1) for i in (3, 4) for part in ("weight", "bias")}
    torch.save(vgg.state_dict() | extra, tmp_path / "vgg19_conv.pth")
    loaded = load_vgg(tmp_path / "vgg19_conv.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in vgg.state_dict().items())
