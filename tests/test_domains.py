"""The paper's domains from small files in the official formats; what is missing is named."""

import dataclasses
import hashlib
import re
from pathlib import Path

import official
import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from written_out import one_step

import cfclip
from cfclip import domains, latents
from cfclip.checkpoints import networks, sources, weights
from cfclip.checkpoints.convert import convert
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.networks import load_openai_clip
from cfclip.checkpoints.weights import WeightsError
from cfclip.cli import app
from cfclip.evaluation import metrics
from cfclip.method.config import CFCLIPConfig
from cfclip.method.losses import latent_l2, perceptual_loss
from cfclip.method.trainer import MapperTrainer
from cfclip.models import clip as clip_module
from cfclip.models.arcface import IRSE
from cfclip.models.e4e import Encoder4Editing
from cfclip.models.mapper import Mapper, MapperConfig
from cfclip.models.vgg import VGG19
from cfclip.toonfaces.clip import build


def shapes(make) -> dict:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in make().state_dict().items()}


@pytest.fixture
def folder(tmp_path, domain, monkeypatch):
    """data/downloads with small networks under the official names; CLIP is the tests' own."""
    monkeypatch.setattr(sources, "elsewhere", lambda source: None)
    monkeypatch.setattr(domains, "load_openai_clip", lambda path, *model: domain.clip)
    g = official.random_generator(16, (6, 5, 4))
    for name in ("stylegan2-ffhq-config-f.pkl", "afhqdog.pkl", "afhqcat.pkl"):
        official.tensorflow(g, tmp_path / name)
    torch.save(official.shared_views(shapes(IRSE)), tmp_path / "model_ir_se50.pth")
    torch.save(official.shared_views(shapes(VGG19)), tmp_path / "vgg19_conv.pth")
    (tmp_path / "ViT-B-32.pt").touch()
    return tmp_path


def test_ffhq(folder):
    d = domains.load_ffhq(folder)
    assert (d.name, d.source_text, d.truncation, d.perceptual, d.readout) == ("ffhq", "face", 1.0, None, None)
    assert d.identity.crop and d.prompts[0] == "green lipstick"
    assert torch.equal(d.latents(3), latents.sample(d.generator, 3))


def test_a_held_out_clip_is_taken_where_it_is(folder, monkeypatch):
    assert domains.load_ffhq(folder).heldout_clip is None
    monkeypatch.setattr(domains, "load_openai_clip", lambda *asked: asked)
    (folder / "ViT-B-16.pt").touch()
    for load in (domains.load_ffhq, domains.DOMAINS["afhq-dog"]):
        d = load(folder=folder)
        assert d.heldout_clip == (folder / "ViT-B-16.pt", "ViT-B-16-quickgelu") and d.clip == (
            folder / "ViT-B-32.pt",
        )


def test_ffhq_takes_the_photos_codes(folder):
    codes = torch.randn(20, 6, 8)
    torch.save(codes, folder / "train_faces.pt")
    d = domains.load_ffhq(folder)
    w = d.latents(5, seed=3)
    assert all(any(torch.equal(one, code) for code in codes) for one in w) and len(w.unique(dim=0)) == 5
    assert torch.equal(w, d.latents(9, seed=3)[:5]) and not torch.equal(w, d.latents(5, seed=4))
    assert len(d.latents(50)) == 20
    assert torch.equal(d.latents(2, "test"), latents.sample(d.generator, 2, "test"))
    assert MapperTrainer(d, CFCLIPConfig("x", train_latents=50)).w.shape == (20, 6, 8)
    torch.save(torch.randn(2, 18, 8), folder / "train_faces.pt")
    with pytest.raises(WeightsError, match=r"train_faces\.pt.*18 layers"):
        d.latents(2)


@pytest.mark.parametrize(("animal", "prompt"), [("dog", "blue dog"), ("cat", "spotty cat")])
def test_afhq(animal, prompt, folder):
    d = domains.DOMAINS[f"afhq-{animal}"](folder)
    assert (d.source_text, d.truncation, d.identity, d.prompts[0]) == (animal, 0.7, None, prompt)
    assert torch.equal(d.latents(2), latents.sample(d.generator, 2, truncation=0.7))
    x = d.generator.synthesis(d.latents(2))
    assert metrics.identity(metrics.Edit(d, prompt, x, x)) == {}


def test_the_step_with_the_perceptual_term_is_the_published_loss(folder):
    """One step written out from images; the weights are large, so that no term hides behind another."""
    d = domains.load_afhq("dog", ("blue dog",), folder)
    logs, w, w_edited, x, edited, nce = one_step(
        MapperTrainer(d, CFCLIPConfig("blue dog", lambda_id=0.0, lambda_perc=2.0, train_latents=6))
    )
    perc = perceptual_loss(d.perceptual, edited, x)
    loss = 0.3 * nce + 2 * perc + 0.8 * latent_l2(w_edited, w)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5) and logs["perc"] == pytest.approx(
        perc.item(), rel=1e-5
    )
    assert perc > 0 and "id" not in logs


def test_a_weight_without_its_network(folder, domain):
    dog = domains.load_afhq("dog", ("blue dog",), folder)
    with pytest.raises(
        ValueError, match=r"lambda_id is 0\.2, but domain afhq-dog has no identity network: set lambda_id=0"
    ):
        MapperTrainer(dog, CFCLIPConfig("blue dog"))
    with pytest.raises(ValueError, match=r"lambda_perc is 0\.02, but domain tiny has no perceptual network"):
        MapperTrainer(domain, CFCLIPConfig("x", lambda_perc=0.02))


@pytest.mark.parametrize(
    ("name", "load"), [(name, load) for name, load in domains.DOMAINS.items() if name != "toonfaces"]
)
def test_missing_files_are_named(name, load, folder):
    for role, needed in sources.require(name, folder).items():
        content = needed.read_bytes()
        needed.unlink()
        with pytest.raises(WeightsError) as caught:
            load(folder)
        (source,) = (s for s in sources.sources_of(name) if s.name == needed.name)
        assert all(
            text in str(caught.value)
            for text in (role, str(needed), source.urls[0] if source.urls else source.page)
        ), role
        needed.write_bytes(b"<html>Quota exceeded</html>")
        if role != "clip":
            with pytest.raises(WeightsError, match=f"{needed.name} is a web page"):
                load(folder)
        needed.write_bytes(content)


# ---- OpenAI's CLIP ------------------------------------------------------------------------------------------------------


@pytest.fixture
def toon_clip():
    torch.manual_seed(0)
    build()  # open_clip now knows our configs
    return open_clip.create_model("toonfaces-rn", load_weights=False).eval()


def test_clip_from_open_clips_files(toon_clip, tmp_path):
    from safetensors.torch import save_file

    state = {k: v.clone() for k, v in toon_clip.state_dict().items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, tmp_path / "clip.safetensors")
    torch.save(state | {"input_resolution": torch.tensor(64)}, tmp_path / "clip.pt")
    images = torch.rand(2, 3, 64, 64)
    expected = clip_module.ClipGuide(toon_clip).encode_image(images)
    before = torch.get_rng_state()
    for path, tolerance in ((tmp_path / "clip.safetensors", 1e-2), (tmp_path / "clip.pt", 0)):
        # a convolutional CLIP of ours stands in: the same reader at a hundredth of the size
        guide = load_openai_clip(path, "toonfaces-rn")
        torch.testing.assert_close(guide.encode_image(images), expected, rtol=0, atol=tolerance)
        assert not any(p.requires_grad for p in guide.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(WeightsError, match=r"clip\.safetensors.*it is not a ViT-B-32-quickgelu"):
        load_openai_clip(tmp_path / "clip.safetensors")


def test_the_papers_clip_has_quick_gelu():
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_only_the_known_torchscript_archive_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)), path)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("an unknown archive was opened"))
    with pytest.raises(WeightsError, match=r"ViT-B-32\.pt.*TorchScript archive, but not OpenAI's"):
        load_openai_clip(path)
    monkeypatch.undo()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(networks.OPENAI_SHA256, "ViT-B-16-quickgelu", digest)
    with pytest.raises(WeightsError, match=r"not OpenAI's ViT-B-32\.pt"):
        load_openai_clip(path)  # the checksum of one model opens no other
    with pytest.raises(WeightsError, match="it has no positional_embedding"):
        load_openai_clip(path, "ViT-B-16-quickgelu")  # opened, and found to be something else


# ---- convert ------------------------------------------------------------------------------------------------------------


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_convert_generators(tmp_path):
    g = official.random_generator(16, (6, 5, 4), conv_clamp=256)
    for path in (
        official.nvidia(g, tmp_path / "a.pkl"),
        official.tensorflow(g, tmp_path / "b.pkl", conv_clamp=256),
    ):
        out = tmp_path / "new" / f"{path.stem}.safetensors"
        result = CliRunner().invoke(app, ["convert", str(path), str(out)])
        assert result.exit_code == 0 and "a generator" in result.output
        same(load_generator(out), load_generator(path))
        assert load_generator(out).conv_clamp == 256
    assert convert(out, tmp_path / "again.safetensors") == "generator"
    same(load_generator(tmp_path / "again.safetensors"), load_generator(out))


def test_convert_mappers(tmp_path):
    m = Mapper(official.SMALL_MAPPER).eval()
    g = official.random_generator(64, (6, 5, 4, 3, 2))
    decoder = {f"decoder.{k}": v for k, v in official.rosinality(g).items()}
    torch.save(
        {
            "state_dict": official.mapper_state(m) | decoder,
            "opts": {"stylegan_size": 64, "description": "green lipstick"},
        },
        tmp_path / "m.pt",
    )
    assert convert(tmp_path / "m.pt", tmp_path / "m.safetensors") == "mapper"
    same(load_mapper(tmp_path / "m.safetensors"), m)
    assert list(cfclip.find_mappers(tmp_path)) == ["green lipstick"]
    assert convert(tmp_path / "m.safetensors", tmp_path / "m2.safetensors") == "mapper"
    assert weights.read(tmp_path / "m2.safetensors", "mapper")[2]["training"] == {"prompt": "green lipstick"}
    assert convert(tmp_path / "m.pt", tmp_path / "g.safetensors", "generator") == "generator"
    assert load_generator(tmp_path / "g.safetensors").resolution == 64


def test_convert_says_what_is_wrong(tmp_path):
    (tmp_path / "page.pt").write_bytes(b"<html>")
    path = official.tensorflow(official.random_generator(), tmp_path / "g.pkl")
    convert(path, tmp_path / "g.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "g.safetensors")
    own = (tmp_path / "g.safetensors").read_bytes()
    for words, message in (
        ((tmp_path / "page.pt", tmp_path / "o.safetensors"), "web page"),
        ((tmp_path / "none.pt", tmp_path / "o.safetensors"), "does not exist"),
        ((path, tmp_path / "o.pt"), "must end in .safetensors"),
        ((tmp_path / "g.safetensors", tmp_path / "g.safetensors"), "is the input itself"),
        ((tmp_path / "g.safetensors", tmp_path / "link.safetensors"), "is the input itself"),
        ((path, tmp_path / "o.safetensors", "--kind", "mapper"), "a pickle file, but"),
        ((path, tmp_path / "o.safetensors", "--kind", "x"), "kind must be"),
        ((path, path / "o.safetensors"), "g.pkl"),
    ):
        result = CliRunner().invoke(app, ["convert", *map(str, words)])
        text = str(result.exception)
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1
        assert message in result.output + text, message
        assert "\n" not in text and not (tmp_path / "o.safetensors").exists()
    assert (tmp_path / "g.safetensors").read_bytes() == own


def test_the_readme_lines_work_when_pasted(folder, monkeypatch):
    readme = (
        (Path(cfclip.__file__).parents[1] / "README.md")
        .read_text()
        .split("## Bring your own")[1]
        .split("\n## ")[0]
    )
    g = official.random_generator(16, (6, 5, 4), z_dim=512, w_dim=512)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(domains.DOMAINS, "ffhq", lambda: domains.load_ffhq(folder))
    official.nvidia(g, "my.pkl")
    official.tensorflow(g, "stylegan2-ffhq-config-f.pkl")
    clip = domains.load_ffhq(folder).clip
    mapper = Mapper(MapperConfig(num_ws=6, w_dim=512, text_dim=clip.embed_dim))
    torch.save({"state_dict": official.mapper_state(mapper), "opts": {}}, "green_lipstick.pt")
    encoder = {
        f"encoder.{k}": v
        for k, v in official.shared_views(shapes(lambda: Encoder4Editing(6))).items()
        if k != "latent_avg"
    }
    torch.save({"state_dict": encoder, "latent_avg": torch.zeros(6, 512), "opts": {}}, "e4e_ffhq_encode.pt")
    Image.new("RGB", (800, 900), "grey").save("me.jpg")
    # LPIPS' AlexNet cannot be had here
    monkeypatch.setattr(
        cfclip.metrics,
        "perceptual_distance",
        lambda domain: ("stand-in", lambda a, b: (a - b).square().mean((1, 2, 3))),
    )
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        exec(block, space)
    assert space["w"].shape == (4, 6, 512) and space["start"].shape == space["found"].w_plus.shape == (
        1,
        6,
        512,
    )
    assert space["images"].shape == (1, 3, 16, 16)
    for line in re.findall(r"bin/cfclip (.*)", readme):
        words = line.replace("my.", f"{folder}/my.").split()
        if words[0] == "fetch":
            monkeypatch.setattr(sources, "fetch", lambda domain, *a, **k: sources.check(domain, folder))
        elif words[0] == "check":
            words += ["--folder", str(folder)]
        result = CliRunner().invoke(app, words)
        assert "Usage" not in result.output and (result.exit_code == 0 or words[0] != "convert"), (
            result.output
        )
    assert load_generator("my.safetensors").resolution == 16


def test_domains_can_still_be_replaced(domain):
    assert dataclasses.replace(domain, name="x").latents(2).shape == (2, 6, 16)
