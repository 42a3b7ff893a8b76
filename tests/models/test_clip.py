"""The guide for half precision against the guide it was made from."""

import torch
import torch.nn.functional as F
from torch import nn

from cfclip.models.clip import ClipGuide, fold_batch_norms
from cfclip.toonfaces.clip import build


def guide() -> ClipGuide:
    torch.manual_seed(0)
    model = build().train()
    with torch.no_grad():  # statistics and scales that a fold can get wrong
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
        model.encode_image(torch.randn(32, 3, 64, 64))
    return ClipGuide(model)


def test_folded_batch_norms_change_nothing_but_rounding():
    made = guide()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    expected = made.encode_image(images)
    fold_batch_norms(made.model.visual)
    assert not [m for m in made.model.visual.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(
        made.encode_image(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )


def test_in_dtype_is_as_near_to_float32_as_autocast_is():
    made = guide()
    fast = made.in_dtype(torch.bfloat16)
    images = (torch.rand(8, 3, 64, 64) * 2 - 1).requires_grad_()
    exact = made.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        plain, half = made.encode_image(images), fast.encode_image(images)
    assert (
        F.cosine_similarity(half.float(), exact).min()
        > F.cosine_similarity(plain.float(), exact).min() - 1e-3
        > 0.99
    )
    half.float().sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_in_float32_only_batch_norms_are_folded(domain):
    assert domain.clip.in_dtype(torch.float32) is domain.clip, "a ViT has none"
    made = guide()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    expected = made.encode_image(images)
    torch.testing.assert_close(
        made.in_dtype(torch.float32).encode_image(images),
        expected,
        rtol=1e-4,
        atol=1e-4 * expected.abs().max().item(),
    )
    assert torch.equal(made.encode_image(images), expected) and made.in_dtype(torch.float32) is not made


def test_in_bfloat16_a_transformer_casts_no_weight_again(domain):
    visual = domain.clip.in_dtype(torch.bfloat16).model.visual
    assert {p.dtype for name, p in visual.transformer.named_parameters() if p.ndim > 1} == {torch.bfloat16}
    images = (torch.rand(4, 3, 32, 32) * 2 - 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        half = domain.clip.in_dtype(torch.bfloat16).encode_image(images)
    assert F.cosine_similarity(half.float(), domain.clip.encode_image(images)).min() > 0.99
    half.float().sum().backward()
    assert images.grad.any()


def test_in_dtype_leaves_the_guide_and_its_words_alone():
    made = guide()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    fast = made.in_dtype(torch.bfloat16)
    assert fast is not made
    assert torch.equal(fast.encode_text("green lipstick"), made.encode_text("green lipstick"))
    after = made.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before
    )
