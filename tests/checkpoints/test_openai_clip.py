"""OpenAI's CLIP from its own file and from open_clip's copies, with a small CLIP in their place."""

import hashlib

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cfclip.checkpoints import networks
from cfclip.checkpoints.networks import load_openai_clip
from cfclip.checkpoints.weights import WeightsError
from cfclip.models.clip import ClipGuide
from cfclip.toonfaces.clip import build


@pytest.fixture
def toon_clip():
    torch.manual_seed(0)
    build()  # open_clip now knows our configs
    return open_clip.create_model("toonfaces-rn", load_weights=False).eval()


def test_clip_is_read_from_open_clips_files(toon_clip, tmp_path):
    state = {k: v.clone() for k, v in toon_clip.state_dict().items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, tmp_path / "clip.safetensors")
    torch.save(state | {"input_resolution": torch.tensor(64)}, tmp_path / "clip.pt")
    images = torch.rand(2, 3, 64, 64)
    expected = ClipGuide(toon_clip).encode_image(images)
    before = torch.get_rng_state()
    for name, tolerance in (("clip.safetensors", 1e-2), ("clip.pt", 0)):
        guide = load_openai_clip(tmp_path / name, "toonfaces-rn")
        torch.testing.assert_close(guide.encode_image(images), expected, rtol=0, atol=tolerance)
        assert not any(p.requires_grad for p in guide.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(WeightsError, match=r"clip\.safetensors.*it is not a ViT-B-32-quickgelu"):
        load_openai_clip(tmp_path / "clip.safetensors")
    with pytest.raises(WeightsError, match=r"no model 'ViT-B-33'; OpenAI's are ViT-B-"):
        load_openai_clip(tmp_path / "clip.safetensors", "ViT-B-33")


def test_the_papers_clip_has_quick_gelu():
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_only_the_known_torchscript_archive_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)), path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("an unknown archive was opened"))
        with pytest.raises(WeightsError, match=r"ViT-B-32\.pt.*TorchScript archive, but not OpenAI's"):
            load_openai_clip(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(networks.OPENAI_SHA256, "ViT-B-16-quickgelu", digest)
    with pytest.raises(WeightsError, match=r"not OpenAI's ViT-B-32\.pt"):  # known, but as another model
        load_openai_clip(path)
    with pytest.raises(WeightsError, match="it has no positional_embedding"):  # opened, and not a CLIP
        load_openai_clip(path, "ViT-B-16-quickgelu")
