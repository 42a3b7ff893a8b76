"""The paper's domains from small files in the official formats; moving a domain; the README's snippets."""

import copy
import dataclasses
import re
import shlex

import official
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner
from written_out import one_step

import cfclip
from cfclip import domains, latents
from cfclip.baselines.stylespace import GlobalConfig, channel_statistics
from cfclip.checkpoints import sources, weights
from cfclip.checkpoints.weights import WeightsError
from cfclip.cli import app
from cfclip.evaluation import metrics
from cfclip.files import DATA, ROOT
from cfclip.method.config import CFCLIPConfig
from cfclip.method.losses import latent_l2, perceptual_loss
from cfclip.method.trainer import MapperTrainer
from cfclip.models.arcface import IRSE
from cfclip.models.e4e import Encoder4Editing
from cfclip.models.mapper import Mapper, MapperConfig
from cfclip.models.vgg import VGG19
from cfclip.toonfaces import domain as toonfaces
from cfclip.toonfaces.clip import build


def random_tensors(make) -> dict:
    """A random state dict of the network ``make()``, in a small file."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    return official.shared_views(shapes)


@pytest.fixture
def folder(tmp_path, domain, monkeypatch):
    """data/downloads with small networks under the official names; CLIP is that of the tiny domain."""
    monkeypatch.setattr(sources, "elsewhere", lambda source: None)
    monkeypatch.setattr(domains, "load_openai_clip", lambda path, *model: domain.clip)
    g = official.random_generator(16, (6, 5, 4))
    for name in ("stylegan2-ffhq-config-f.pkl", "afhqdog.pkl", "afhqcat.pkl"):
        official.tensorflow(g, tmp_path / name)
    torch.save(random_tensors(IRSE), tmp_path / "model_ir_se50.pth")
    torch.save(random_tensors(VGG19), tmp_path / "vgg19_conv.pth")
    (tmp_path / "ViT-B-32.pt").touch()
    return tmp_path


def test_an_unknown_domain_is_named_with_the_known_ones():
    known = "toonfaces, ffhq, afhq-dog, afhq-cat"
    with pytest.raises(ValueError, match=f"unknown domain 'atlantis'; choose one of {known}"):
        domains.load_domain("atlantis")


def test_ffhq_is_the_papers_faces(folder):
    d = domains.load_ffhq(folder)
    assert (d.name, d.source_text, d.truncation, d.perceptual, d.truth) == ("ffhq", "face", 1.0, None, None)
    assert d.identity.crop and d.prompts[0] == "green lipstick"
    assert torch.equal(d.latents(3), latents.sample(d.generator, 3))
    assert d.group_of("face") == "null edit" and d.group_of("green lipstick") == "other"


@pytest.mark.parametrize(("animal", "prompt"), [("dog", "blue dog"), ("cat", "spotty cat")])
def test_afhq_has_truncated_codes_and_no_identity_network(animal, prompt, folder):
    d = domains.DOMAINS[f"afhq-{animal}"](folder)
    assert (d.source_text, d.truncation, d.identity, d.prompts[0]) == (animal, 0.7, None, prompt)
    assert torch.equal(d.latents(2), latents.sample(d.generator, 2, truncation=0.7))
    x = d.generator.synthesis(d.latents(2))
    assert metrics.identity(metrics.Edit(d, prompt, x, x)) == {}


def test_the_last_clip_whose_file_is_there_judges_and_the_others_guide(folder, monkeypatch):
    assert domains.load_ffhq(folder).heldout_clip is None
    monkeypatch.setattr(domains, "load_openai_clip", lambda *asked: asked)
    (folder / "ViT-B-16.pt").touch()
    for load in (domains.load_ffhq, domains.DOMAINS["afhq-dog"]):
        d = load(folder=folder)
        assert d.heldout_clip == (folder / "ViT-B-16.pt", "ViT-B-16-quickgelu")
        assert d.guides == ((folder / "ViT-B-32.pt",),)
    (folder / "ViT-L-14.pt").touch()
    for load in (domains.load_ffhq, domains.DOMAINS["afhq-dog"]):
        d = load(folder=folder)
        assert d.guides == ((folder / "ViT-B-32.pt",), (folder / "ViT-B-16.pt", "ViT-B-16-quickgelu"))
        assert d.heldout_clip == (folder / "ViT-L-14.pt", "ViT-L-14-quickgelu")


def test_toonfaces_has_a_second_guide_where_its_file_is(tmp_path):
    for path in (DATA / "toonfaces").glob("*.safetensors"):
        if path.stem in (*toonfaces.REQUIRED, "heldout_clip"):
            (tmp_path / path.name).symlink_to(path)
    tensors, config, _ = weights.read(tmp_path / "heldout_clip.safetensors", "heldout_clip")
    second = weights.load_into(build(config["model"]), tensors, tmp_path)
    assert len(toonfaces.load_toonfaces(tmp_path).guides) == 1
    weights.save(second, tmp_path / "guide2.safetensors", "guide2", config)
    d = toonfaces.load_toonfaces(tmp_path)
    assert d.guides == (d.clip, *d.more_guides) and d.heldout_clip not in d.guides
    assert torch.equal(d.guides[1].encode_text("blue hair"), d.heldout_clip.encode_text("blue hair"))
    (row,) = (row for row in toonfaces.check(tmp_path) if row.source.role == "guide2")
    assert row.good and not row.source.required


def test_ffhq_takes_the_codes_of_photos(folder):
    codes = torch.randn(20, 6, 8)
    torch.save(codes, folder / "train_faces.pt")
    d = dataclasses.replace(domains.load_ffhq(folder), identity=None)
    w = d.latents(5, seed=3)
    assert all(any(torch.equal(one, code) for code in codes) for one in w) and len(w.unique(dim=0)) == 5
    assert torch.equal(w, d.latents(9, seed=3)[:5]) and not torch.equal(w, d.latents(5, seed=4))
    assert len(d.latents(50)) == 20
    assert torch.equal(d.latents(2, "test"), latents.sample(d.generator, 2, "test"))
    assert MapperTrainer(d, CFCLIPConfig("x", train_latents=50, lambda_id=0.0)).w.shape == (20, 6, 8)
    torch.save(torch.randn(2, 18, 8), folder / "train_faces.pt")
    with pytest.raises(WeightsError, match=r"train_faces\.pt.*18 layers"):
        d.latents(2)


def test_the_step_with_the_perceptual_term_is_the_published_loss(folder):
    """One step written out from images; the weights are large, so that no term hides behind another."""
    d = domains.load_afhq("dog", ("blue dog",), folder)
    config = CFCLIPConfig("blue dog", lambda_id=0.0, lambda_perc=2.0, train_latents=6)
    logs, w, w_edited, x, edited, nce = one_step(MapperTrainer(d, config))
    perc = perceptual_loss(d.perceptual(edited), d.perceptual(x))
    loss = 0.3 * nce + 2 * perc + 0.8 * latent_l2(w_edited, w)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logs["perc"] == pytest.approx(perc.item(), rel=1e-5)
    assert perc > 0 and "id" not in logs


def test_on_toonfaces_the_perceptual_term_is_the_change_of_the_pixels():
    config = CFCLIPConfig("blue hair", lambda_perc=2.0, train_latents=6)
    logs, _, _, x, edited, _ = one_step(MapperTrainer(toonfaces.load_toonfaces(), config))
    assert logs["perc"] == pytest.approx((edited - x).abs().mean().item(), rel=1e-5) and logs["perc"] > 0


def test_a_loss_without_its_network_is_named(folder, domain):
    dog = domains.load_afhq("dog", ("blue dog",), folder)
    identity = r"lambda_id is 0\.2, but domain afhq-dog has no identity network: set lambda_id=0"
    with pytest.raises(ValueError, match=identity):
        MapperTrainer(dog, CFCLIPConfig("blue dog"))
    with pytest.raises(ValueError, match=r"lambda_perc is 0\.02, but domain tiny has no perceptual network"):
        MapperTrainer(domain, CFCLIPConfig("x", lambda_perc=0.02))


@pytest.mark.parametrize("name", [name for name in domains.DOMAINS if name != "toonfaces"])
def test_missing_and_damaged_files_are_named(name, folder):
    load = domains.DOMAINS[name]
    for role, needed in sources.require(name, folder).items():
        content = needed.read_bytes()
        needed.unlink()
        with pytest.raises(WeightsError) as caught:
            load(folder)
        (source,) = (s for s in sources.sources_of(name) if s.name == needed.name)
        address = source.urls[0] if source.urls else source.page
        assert all(text in str(caught.value) for text in (role, str(needed), address)), role
        needed.write_bytes(b"<html>Quota exceeded</html>")
        if role != "clip":
            with pytest.raises(WeightsError, match=f"{needed.name} is a web page"):
                load(folder)
        needed.write_bytes(content)


# ---- moving and replacing ----


def devices(domain) -> set[str]:
    """The devices of all tensors of a domain's networks, the judge's included."""
    networks = [getattr(domain, one.name) for one in dataclasses.fields(domain)]
    networks += [domain.truth.readout, *domain.guides]
    networks = [one for one in networks if isinstance(one, nn.Module)]
    return {t.device.type for one in networks for t in one.state_dict().values()}


def test_moving_a_domain_copies_its_networks_and_leaves_the_original(two_guides):
    domain = dataclasses.replace(two_guides, heldout_clip=copy.deepcopy(two_guides.clip), perceptual=VGG19())
    moved = domain.to("meta")
    assert moved.device == torch.device("meta") and devices(moved) == {"meta"}
    assert domain.device == torch.device("cpu") and devices(domain) == {"cpu"}
    assert domain.to("cpu") is domain and moved.to(torch.device("meta")) is moved
    assert moved.clip is not domain.clip and (moved.name, moved.prompts) == (domain.name, domain.prompts)


def test_a_part_of_a_domain_can_be_replaced(domain):
    assert dataclasses.replace(domain, name="x").latents(2).shape == (2, 6, 16)


# ---- classes ----


@pytest.fixture
def classes(domain):
    """The tiny domain with a class-conditional generator of five classes."""
    sizes = {"z_dim": 12, "w_dim": 16, "mapping_layers": 2, "c_dim": 5}
    return dataclasses.replace(domain, generator=official.random_generator(16, (8, 8, 8), **sizes))


def test_a_domain_samples_its_class(classes):
    seeds = [2 * i + 1 for i in range(3)]  # of the test latents
    z = [torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    z, g = torch.cat(z), classes.generator
    for label in (0, 4):
        d = dataclasses.replace(classes, label=label, truncation=0.7)
        assert torch.equal(d.latents(3, "test"), g.mapping(z, 0.7, c=label))
        assert dataclasses.replace(d, name="x").latents(2).equal(d.latents(2))
        assert d.to("meta").label == d.to("meta").generator.label == label
    assert classes.label is None and g.label is None
    assert dataclasses.replace(classes, generator=g.for_class(3)).label == 3
    channels = []
    for label in (0, 4):
        d, few = dataclasses.replace(classes, label=label), GlobalConfig("x", samples=2, style_samples=50)
        channels.append(channel_statistics(d, few, progress=False)[0])
    assert not torch.equal(channels[0].mean, channels[1].mean)


def test_a_domain_without_the_class_that_it_needs_says_so(classes, domain, monkeypatch):
    with pytest.raises(ValueError, match=r"needs a class, one of 0 to 4: .*label=0 of a domain"):
        classes.latents(2)
    with pytest.raises(ValueError, match="must be one of 0 to 4, not 5"):
        dataclasses.replace(classes, label=5)
    with pytest.raises(ValueError, match="has no classes"):
        dataclasses.replace(domain, label=0)
    monkeypatch.setitem(domains.DOMAINS, "tiny", lambda: classes)
    assert domains.load_domain("tiny", label=3).label == 3
    for label in (5, -1, "cat", True):
        with pytest.raises(ValueError, match=f"label {label!r} does not fit domain tiny: "):
            domains.load_domain("tiny", label=label)


def test_a_run_of_another_class_is_refused_by_name(classes, tmp_path):
    config = CFCLIPConfig("x", steps=1, batch=1, train_latents=2)
    for label in (1, 1, None, 2):
        d = dataclasses.replace(classes, label=label) if label else classes
        if label == 1:
            cfclip.train_mapper(d, config, out=tmp_path, progress=False)
        else:
            with pytest.raises(ValueError, match="holds a run with another label"):
                cfclip.train_mapper(d, config, out=tmp_path, progress=False)


# ---- README.md ----


class MeanSquare(nn.Module):
    """In place of LPIPS, whose AlexNet need not be on this machine."""

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def test_the_readmes_lines_work_when_pasted(folder, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Your own prompt")[1].split("\n## ")[0]
    g = official.random_generator(16, (6, 5, 4), z_dim=512, w_dim=512)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(domains.DOMAINS, "ffhq", lambda: domains.load_ffhq(folder))
    monkeypatch.setattr("cfclip.domain.find_lpips", lambda device: MeanSquare())
    official.nvidia(g, "my.pkl")
    official.tensorflow(g, "stylegan2-ffhq-config-f.pkl")
    clip = domains.load_ffhq(folder).clip
    mapper = Mapper(MapperConfig(num_ws=6, w_dim=512, text_dim=clip.embed_dim))
    torch.save({"state_dict": official.mapper_state(mapper), "opts": {}}, "green_lipstick.pt")
    encoder = random_tensors(lambda: Encoder4Editing(6))
    encoder = {f"encoder.{key}": value for key, value in encoder.items() if key != "latent_avg"}
    torch.save({"state_dict": encoder, "latent_avg": torch.zeros(6, 512), "opts": {}}, "e4e_ffhq_encode.pt")
    Image.new("RGB", (800, 900), "grey").save("me.jpg")
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(block.replace("steps=300", "steps=3"), space)
    assert space["found"].w_plus.shape == (1, 6, 512) and space["images"].shape == (1, 3, 16, 16)
    monkeypatch.setattr(sources, "fetch", lambda domain, *a, **k: sources.check(domain, folder))
    for line in re.findall(r"bin/cfclip (.*)", section):
        words = shlex.split(line, comments=True)
        if words[0] == "check":
            words += ["--folder", str(folder)]
        result = CliRunner().invoke(app, words)
        assert "Usage" not in result.output, result.output
        assert result.exit_code == 0 or words[0] != "convert", result.output
    assert cfclip.load_generator("my.safetensors").resolution == 16
