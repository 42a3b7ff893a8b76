"""The CLIP guide: its cache of text features, and the guide for half precision."""

import copy
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.models.clip import ClipGuide, Patches, fold_batch_norms
from cfclip.toonfaces.clip import build

TEXT = "green lipstick"


@pytest.fixture
def guide() -> ClipGuide:
    torch.manual_seed(0)
    model = build().train()
    with torch.no_grad():  # statistics and scales that folding could get wrong
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
        model.encode_image(torch.randn(32, 3, 64, 64))
    return ClipGuide(model)


@pytest.fixture
def images() -> Tensor:
    return (torch.rand(8, 3, 64, 64) * 2 - 1).requires_grad_()


def assert_equal_but_for_rounding(features: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def assert_current(clip: ClipGuide) -> None:
    """Its text feature is what its text tower computes now."""
    expected = clip.model.encode_text(clip.tokenize(TEXT).to(clip.mean.device))
    assert torch.equal(clip.encode_text(TEXT), expected)


def test_a_text_is_encoded_once(domain):
    encoded = []
    domain.clip.model.ln_final.register_forward_hook(lambda *_: encoded.append(TEXT))
    features = domain.clip.encode_text([TEXT, "blue hair", TEXT])
    assert torch.equal(features[:1], features[2:]) and not torch.equal(features[0], features[1])
    assert torch.equal(domain.clip.encode_text(TEXT), features[:1]) and len(encoded) == 2


def test_a_copied_guide_encodes_text_with_its_own_weights(domain):
    clip = domain.clip
    before = clip.encode_text(TEXT)
    copied = copy.deepcopy(clip)
    copied.model.text_projection.add_(1)
    assert torch.equal(clip.encode_text(TEXT), before)
    assert_current(copied)
    clip.model.token_embedding.weight.mul_(2)
    copied_before = copied.encode_text(TEXT)
    assert_current(clip)
    assert torch.equal(copied.encode_text(TEXT), copied_before)


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded"])
def test_text_is_encoded_again_after_a_weight_changes(change, domain):
    clip = domain.clip
    before = clip.encode_text(TEXT)
    if change == "in place":
        clip.model.ln_final.bias.add_(1)
    elif change == "replaced":
        clip.model.text_projection = nn.Parameter(clip.model.text_projection + 1, requires_grad=False)
    else:
        state = {name: tensor + 0.1 for name, tensor in clip.model.state_dict().items()}
        clip.model.load_state_dict(state)
    assert not torch.equal(clip.encode_text(TEXT), before)
    assert_current(clip)


def test_text_is_encoded_again_after_a_move(domain):
    clip = domain.clip
    before = clip.encode_text(TEXT)
    assert clip.double().encode_text(TEXT).dtype == torch.float64
    assert_current(clip)
    for _ in range(3):  # the weights may come back to the addresses they had, with other values
        rounded = clip.bfloat16().float().encode_text(TEXT)
        assert not torch.equal(rounded, before)
        assert_current(clip)
    assert copy.deepcopy(clip).to("meta").encode_text(TEXT).is_meta
    assert_current(clip)


def test_folding_batch_norms_changes_only_rounding(guide, images):
    expected = guide.encode_image(images)
    fold_batch_norms(guide.model.visual)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in guide.model.visual.modules())
    assert_equal_but_for_rounding(guide.encode_image(images), expected)


def test_in_dtype_is_as_close_to_float32_as_autocast_is(guide, images):
    fast, exact = guide.in_dtype(torch.bfloat16), guide.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        plain, half = guide.encode_image(images), fast.encode_image(images)
    plain, fast = (F.cosine_similarity(x.float(), exact).min() for x in (plain, half))
    assert fast > plain - 1e-3 > 0.99
    half.float().sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_in_float32_only_batch_norms_are_folded(domain, guide, images):
    assert domain.clip.in_dtype(torch.float32) is domain.clip, "a ViT has none"
    expected, folded = guide.encode_image(images), guide.in_dtype(torch.float32)
    assert_equal_but_for_rounding(folded.encode_image(images), expected)
    assert torch.equal(guide.encode_image(images), expected) and folded is not guide


@pytest.mark.parametrize("bias", [False, True])
def test_patches_are_those_of_the_convolution(bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (4, 2), (4, 2), bias=bias)
    patches, x = Patches.of(conv), torch.randn(2, 3, 9, 6, requires_grad=True)
    assert isinstance(patches, Patches) and patches.state_dict().keys() == conv.state_dict().keys()
    values = [layer(x) for layer in (patches, conv)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in values))
    overlapping = nn.Conv2d(3, 5, 4, 2)
    assert Patches.of(overlapping) is overlapping


def test_the_first_layer_of_a_transformer_is_a_product(domain):
    assert isinstance(domain.clip.model.visual.conv1, Patches)
    assert isinstance(domain.clip.in_dtype(torch.bfloat16).model.visual.conv1, Patches)


def test_in_bfloat16_a_transformer_has_already_cast_its_weights(domain):
    clip = domain.clip.in_dtype(torch.bfloat16)
    weights = [p for p in clip.model.visual.transformer.parameters() if p.ndim > 1]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    images = (torch.rand(4, 3, 32, 32) * 2 - 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        half = clip.encode_image(images)
    assert F.cosine_similarity(half.float(), domain.clip.encode_image(images)).min() > 0.99
    half.float().sum().backward()
    assert images.grad.any()


def test_in_dtype_leaves_the_guide_and_its_text_tower_unchanged(guide):
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    fast = guide.in_dtype(torch.bfloat16)
    assert fast is not guide and torch.equal(fast.encode_text(TEXT), guide.encode_text(TEXT))
    after = guide.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before)


UNKNOWN = {
    "zebra lipstick": ["zebra"],
    "tiny lipstick": ["tiny"],
    "Lipstik, GREEN hair": ["lipstik"],
    "a man with a Plaid hat and a plaid hat": ["plaid", "hat"],
    "green lipstick!": ["!"],
    "red-haired woman": ["haired"],
    "grün 🙂": ["grün", "🙂"],
    "a photo of a person with green lipstick and blue hair.": [],
    "corrupted jpeg, pixelated": [],  # words of several tokens
}


@pytest.mark.filterwarnings("ignore:this CLIP does not know")
@pytest.mark.parametrize("text", UNKNOWN)
def test_a_guide_with_a_vocabulary_names_the_words_that_it_does_not_know(guide, text):
    assert guide.unknown_words(text) == UNKNOWN[text]
    # what it says is so: exchanging an unknown word for another unknown one changes nothing
    replaced = text.lower().replace("zebra", "tiger").replace("hat", "dog")
    assert torch.equal(guide.encode_text(text), guide.encode_text(replaced))


def test_a_guide_with_an_open_vocabulary_knows_every_word(domain):
    assert all(domain.clip.unknown_words(text) == [] for text in UNKNOWN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        domain.clip.encode_text(list(UNKNOWN))


def told(call, *args):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args)
    assert {one.category for one in caught} <= {UserWarning}
    assert all(one.filename == __file__ for one in caught), "a warning names the line of the caller"
    return [str(one.message) for one in caught]


def test_unknown_words_are_a_warning_once_per_text(guide):
    (first,) = told(lambda: guide.encode_text(["lipstik", TEXT]))
    assert "'lipstik'" in first and "lipstick" in first.split("near words that it knows")[1]
    (second,) = told(lambda: guide.encode_text(["lipstik", "zebra hair"]))
    assert "'zebra'" in second and "'zebra hair'" in second
    assert told(lambda: guide.encode_text(["lipstik", "zebra hair", TEXT])) == []
    guide.model.ln_final.bias.add_(1)  # the text is encoded again, and was told already
    assert told(lambda: guide.encode_text("lipstik")) == []
    (of_all_templates,) = told(lambda: guide.template_features("purple zebra"))
    assert "'purple zebra'" in of_all_templates
    assert told(lambda: guide.template_features(TEXT)) == []


@pytest.mark.parametrize("text", ["x" * 10_000_000, "green " * 1_000_000, "!" * 100_000, "é" * 100_000])
def test_a_text_that_is_far_too_long_is_refused_at_once(domain, text):
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"characters, but this CLIP reads at most .* shorten it") as error:
        domain.clip.encode_text(text)
    assert time.process_time() - begun < 1 and len(str(error.value)) < 300


@pytest.mark.parametrize("text", [None, 42, True, ["green"], b"green"])
def test_a_prompt_that_is_no_text_is_named(domain, text):
    with pytest.raises(ValueError, match="must be a text"):
        domain.clip.tokenize(text)
    with pytest.raises(ValueError, match="must be a text"):
        domain.clip.template_features(text)
