"""The training of the embedded CLIPs, at tiny sizes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.special import log_softmax, logsumexp
from test_devices import PretendedDevice, replace_tensors
from torch import Tensor

from cfclip.checkpoints import weights
from cfclip.models.clip import ClipGuide
from cfclip.models.ops import using
from cfclip.models.stylegan2 import Generator
from cfclip.toonfaces.captions import FACTS, claims_of, facts_of
from cfclip.toonfaces.clip import MODELS, build
from cfclip.toonfaces.domain import COLOURING
from cfclip.toonfaces.factors import HELD_OUT, PARTS, colours, sample_face
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.render import MASKS
from cfclip.toonfaces.train import augment, clip, clip_losses, clip_scores, moved
from cfclip.toonfaces.train.pool import Pool, part_masks
from cfclip.toonfaces.train.run import seeded

SIZES = {"resolution": 16, "channels": (8, 8, 8), "z_dim": 8, "w_dim": 8, "mapping_layers": 1}
TINY = clip.CLIPConfig(
    model="toonfaces-regnet", batch=6, steps=2, pool=8, captions=40, moved_pool=3, moved_captions=2, warmup=1,
    dtype="float32",
)  # fmt: skip


def make_networks():
    with seeded(0):
        made = Generator(**SIZES), Readout(4)
    return [one.eval().requires_grad_(False) for one in made]


@pytest.fixture
def networks():
    return make_networks()


@pytest.fixture
def folder(tmp_path, networks):
    generator, readout = networks
    weights.save(generator, tmp_path / "generator.safetensors", "generator", generator.config)
    weights.save(readout, tmp_path / "readout.safetensors", "readout", readout.metadata)
    return tmp_path


def tensors(model):
    return model.state_dict().values()


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def test_the_three_clips_are_of_different_make_and_small():
    configs = clip.CLIPConfig(), clip.GuideConfig(), clip.JudgeConfig()
    assert {one.model for one in configs} == set(MODELS) and len({one.seed for one in configs}) == 3
    assert sum(p.numel() for one in configs for p in build(one.model).parameters()) * 2 < 30e6


def test_a_pair_of_unknown_truth_is_neither_positive_nor_negative():
    rng = np.random.default_rng(0)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 5, 4)))
    verdict = rng.integers(0, 3, (5, 5))  # 0: false, 1: true, 2: unknown
    verdict[2], verdict[:, 3] = np.where(verdict[2] == 1, 2, verdict[2]), 2  # one without a true one
    logits = 7 * image @ text.T
    losses = []
    for scores, truth in ((logits, verdict), (logits.T, verdict.T)):
        each = []
        for row, true in zip(scores, truth, strict=True):
            if (true == 1).any():
                each.append(np.mean(logsumexp(row[true < 2]) - row[true == 1]))
        losses.append(np.mean(each))
    true, false = (torch.from_numpy(verdict == k) for k in (1, 0))
    image, text = torch.from_numpy(image), torch.from_numpy(text)
    found = clip_losses.contrastive_loss(image, text, torch.tensor(7.0), true, false)
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_facts_are_predicted_within_groups_of_which_one_is_known():
    head = clip_losses.FactHead(4)
    x = torch.nn.functional.normalize(torch.randn(2, 4, generator=generator_of(0)), dim=1)
    facts = torch.zeros(2, len(FACTS), dtype=torch.bool)
    facts[0, FACTS.index(("hair", "blue"))] = facts[1, FACTS.index(("smile", "no"))] = True
    logits = head.logits(x).detach().numpy()
    hair = [f for f in FACTS if f[0] == "hair" and f not in HELD_OUT]
    columns = [FACTS.index(f) for f in hair], [FACTS.index(("smile", a)) for a in ("yes", "no")]
    wanted = -log_softmax(logits[0, columns[0]])[hair.index(("hair", "blue"))]
    wanted -= log_softmax(logits[1, columns[1]])[1]
    assert head(x, facts).item() == pytest.approx(wanted / 2, rel=1e-5)


@pytest.fixture(scope="module")
def training():
    return clip.CLIPTraining(replace(TINY, smeared=0.0), torch.device("cpu"), *make_networks())


def test_the_facts_of_a_painted_shape_are_those_of_the_face(training):
    renders = training.renders
    shapes, colours = torch.arange(8), torch.arange(8).flip(0)
    true, known = renders.facts(shapes, colours)
    for i, j, row, sure in zip(shapes, colours, true, known, strict=True):
        face = renders.pool.faces[i].in_the_colours_of(renders.pool.faces[j])
        assert {FACTS[k] for k in row.nonzero()[:, 0]} == facts_of(face)
        assert (sure | ~row).all()
        assert all(sure[k] for k, fact in enumerate(FACTS) if fact[0] in PARTS)
        assert sure[FACTS.index(("person", "man"))] == bool(
            {("person", "man"), ("person", "woman")} & facts_of(face)
        )


def test_every_caption_is_true_of_its_picture_and_says_what_it_claims(training):
    captions, tokenizer = training.renders.captions, ClipGuide(build("toonfaces-rn")).tokenizer
    true, _ = training.renders.facts(*captions.of.unbind(1))
    assert (true | ~captions.claims).all()
    for tokens, claims in zip(captions.tokens, captions.claims, strict=True):
        words = tokenizer.decode(tokens[tokens > 0].tolist())
        words = words.replace("<start_of_text>", "").replace("<end_of_text>", "")
        text = words.replace("clean - shaven", "clean-shaven").replace("t - shirt", "t-shirt")
        assert claims_of(text) == {FACTS[k] for k in claims.nonzero()[:, 0]}, text


def test_a_smeared_part_is_unknown_and_a_new_coat_is_its_colour_unless_it_is_thin(training):
    true, known = training.renders.facts(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]))
    hidden, painted, tinted = torch.zeros(3, 3, 8, dtype=torch.bool)
    hidden[0, PARTS.index("lipstick")] = hidden[1:, PARTS.index("skin")] = True
    painted[1, PARTS.index("skin")] = tinted[2, PARTS.index("skin")] = True
    green = augment.PAINTS.index(("skin", "green"))
    done = augment.Smears(None, hidden, painted, tinted, torch.tensor([0, green, green]))
    left, sure = training.renders.smeared_facts(true, known, done)
    lips = torch.tensor([fact[0] == "lipstick" for fact in FACTS])
    skin = torch.tensor([fact[0] == "skin" for fact in FACTS])
    assert not left[0, lips].any() and not sure[0, lips].any()
    assert (left[0, ~lips] == true[0, ~lips]).all() and (sure[0, ~lips] == known[0, ~lips]).all()
    assert sure[1, skin].all() and [FACTS[k] for k in (left[1] & skin).nonzero()[:, 0]] == [("skin", "green")]
    assert (left[1, ~skin] == true[1, ~skin]).all()
    assert not (left[2] & skin).any()
    assert [FACTS[k] for k in (sure[2] & skin).nonzero()[:, 0]] == [("skin", "green")]


def test_smears_hide_what_they_cover_and_halos_leave_small_parts_alone():
    pool = Pool((5,), 40, support="known")
    rows = torch.arange(40)
    images, masks = pool.paint(rows), part_masks(pool.covered(rows))
    smear = augment.Smear(torch.device("cpu"))
    done = smear(images, masks, 1.0, generator_of(0))
    again = smear(images, masks, 1.0, generator_of(0))
    assert torch.equal(done.images, again.images) and done.images.abs().max() <= 1
    change = (done.images - images).abs().sum(1, keepdim=True)
    parts = masks[:, [MASKS.index(part) for part in PARTS]]
    moved_by = (parts * change).sum((2, 3)) / parts.sum((2, 3)).clamp_min(1)
    assert (moved_by[~done.hidden & ~done.painted] < 6 * augment.HIDDEN).all()
    assert done.painted.any() and done.hidden.any() and (done.painted <= done.hidden).all()
    assert done.tinted.any() and not (done.tinted & done.painted).any()
    for face, part in done.tinted.nonzero().tolist():
        seen = (done.images[face] * parts[face, part]).sum((1, 2)) / parts[face, part].sum()
        wanted = torch.tensor(colours(PARTS[part])[augment.PAINTS[done.paint[face]][1]]) / 127.5 - 1
        assert (seen - wanted).norm() > augment.TINTED - 0.25
    for face, part in done.painted.nonzero().tolist():
        name, colour = augment.PAINTS[done.paint[face]]
        assert name == PARTS[part] and (name, colour) not in HELD_OUT
    assert torch.equal(smear(images, masks, 0.0, generator_of(0)).images, images)


def test_a_blur_is_a_gaussian_of_each_pictures_own_width():
    x = torch.rand(2, 1, 32, 32, generator=generator_of(0))
    blurred = augment.blur(x, torch.tensor([0.0, 2.0]))
    assert torch.allclose(blurred[0], x[0], atol=1e-6)
    wanted = x[1, 0].numpy()
    for axis in (0, 1):  # near the edges ours has only the pixels of the picture
        wanted = gaussian_filter1d(wanted, 2.0, axis=axis, truncate=6)
    assert np.allclose(blurred[1, 0, 12:20, 12:20], wanted[12:20, 12:20], atol=1e-4)


def test_augmentations_draw_from_their_generator_and_keep_shapes():
    images = torch.rand(3, 3, 32, 32, generator=generator_of(0)) * 2 - 1
    for change in (augment.degrade, lambda x, g: augment.random_warp(x, 0.5, g)):
        first = change(images, generator_of(1))
        assert torch.equal(first, change(images, generator_of(1))) and first.shape == images.shape
    assert torch.equal(augment.random_warp(images, 0.0, generator_of(0)), images)


class Measured:
    """Three pictures: green lips; lips between two names; no face."""

    hair_style = np.array([4, 0, 0])
    is_face = np.array([True, True, False])
    lab = np.zeros((3, len(MASKS), 3))

    def __init__(self, on_the_device=True):
        assert on_the_device

    def has(self, part):
        return np.array([part != "hair", part not in ("beard", "glasses"), True])

    def distance(self, part, colour):
        if part == "lipstick":
            return np.array([
                5.0 if colour == "green" else 60.0,
                15.0 if colour in ("red", "rose") else 50.0,
                5.0,
            ])
        return np.full(3, np.nan)


def test_only_what_the_readout_is_sure_of_is_known_of_a_moved_sample():
    true, known = moved.sure_facts(Measured())
    facts = [{FACTS[k] for k in np.flatnonzero(row)} for row in true]
    assert facts[0] == {("lipstick", "green"), ("style", "bald"), ("beard?", "yes"), ("glasses?", "yes")}
    assert facts[1] == {("style", "short"), ("beard?", "no"), ("glasses?", "no")}
    assert not facts[2] and not known[2].any()
    sure = [{FACTS[k] for k in np.flatnonzero(row)} for row in known]
    assert ("lipstick", "red") in sure[0] and ("lipstick", "red") not in sure[1]
    assert ("lipstick", "green") in sure[1]  # it is far: surely not green
    assert ("hair", "red") in sure[0] and ("hair", "red") not in sure[1]  # a bald head has no red hair
    assert ("smile", "yes") not in sure[0] and ("skin", "red") not in sure[0]


def test_codes_are_moved_a_little_and_wildly_and_in_one_layer_or_all(networks):
    before, codes = moved.random_moves(networks[0], 200, generator_of(0))
    assert before.shape == codes.shape == (200, networks[0].num_ws, 8)
    assert (before == before[:, :1]).all() and not (before == codes).all(2).all(1).any()
    alike = (codes == codes[:, :1]).all(2)
    assert alike.all(1).any() and (alike.sum(1) == 1).any()
    assert torch.equal(codes, moved.random_moves(networks[0], 200, generator_of(0))[1])


def test_aimed_codes_come_nearer_to_a_colour_on_their_way(networks):
    codes = moved.aimed_moves(*networks, 10, generator_of(0))
    assert codes.shape == (10, networks[0].num_ws, 8) and not codes.requires_grad
    assert torch.equal(codes, moved.aimed_moves(*networks, 10, generator_of(0)))
    apart = (codes - codes[:, :1]).abs().amax((0, 2))
    assert (apart[COLOURING:] > 0).all()  # the layers that colour moved, each in its way


def test_similar_colours_have_similar_codes_whatever_part_they_are_of():
    codes = clip_losses.colour_codes()
    names = [(key, value) for key, value in FACTS if key in PARTS]
    like = codes @ codes.T

    def alike(one, other):
        return float(like[names.index(one), names.index(other)])

    assert alike(("lipstick", "orange"), ("eyes", "orange")) > 0.95
    assert alike(("eyes", "orange"), ("eyes", "yellow")) > alike(("eyes", "orange"), ("eyes", "blue"))


def test_training_on_moved_samples_resumes_and_leaves_the_callers_random_state(folder, monkeypatch):
    before = torch.get_rng_state()
    whole = clip.train(TINY, folder / "whole", folder=folder)
    assert torch.equal(torch.get_rng_state(), before)
    steps, step = [], clip.CLIPTraining.step

    def stopping(self, i, generator):
        steps.append(i)
        if len(steps) == 2:
            raise InterruptedError
        return step(self, i, generator)

    monkeypatch.setattr("cfclip.toonfaces.train.run.CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(clip.CLIPTraining, "step", stopping)
    with pytest.raises(InterruptedError):
        clip.train(TINY, folder / "cut", folder=folder)
    resumed = clip.train(TINY, folder / "cut", folder=folder)
    assert steps == [0, 1, 1]
    assert all(map(torch.equal, tensors(whole), tensors(resumed)))
    assert not whole.training


def test_without_a_generator_it_says_which_file_is_missing(tmp_path):
    with pytest.raises(weights.WeightsError, match=r"generator\.safetensors does not exist"):
        clip.train(TINY, tmp_path / "run", folder=tmp_path)


@pytest.mark.filterwarnings("ignore")  # they are about numbers that are made up
def test_a_step_mixes_no_devices(networks, monkeypatch):
    real = torch.Generator
    monkeypatch.setattr(Tensor, "backward", lambda self: None)
    monkeypatch.setattr(torch.nn.Module, "_apply", replace_tensors)
    monkeypatch.setattr(moved, "aimed_moves", lambda g, _, n, random: moved.random_moves(g, n, random)[1])
    readout = SimpleNamespace(measure=lambda images: Measured(images.device.type == "cuda"))
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": real())  # one of a GPU needs a driver
    with PretendedDevice(), using("frozen"):  # Triton needs a real GPU
        device = torch.device("cuda")
        run = clip.CLIPTraining(TINY, device, networks[0].to(device), readout)
        logged = run.step(0, generator_of(0))
    assert set(logged) == {"loss", "facts", "mentions", "top1", "scale"}
    assert all(isinstance(x, Tensor) and x.ndim == 0 and x.device.type == "cuda" for x in logged.values())


def test_measurements_have_a_row_per_part_and_shape(networks):
    with seeded(0):
        guide = ClipGuide(build("toonfaces-regnet"))
    guide.template_features = lambda text: guide.encode_text([text])  # 79 templates take long
    rows = clip_scores.colour_accuracy(guide, faces=20)
    assert [row["part"] for row in rows] == list(PARTS)
    people = [sample_face((10_000, k), "both") for k in range(20)]
    for row in rows:
        present = sum(face.has(row["part"]) for face in people)
        secret = sum(
            (row["part"], getattr(f, row["part"]).name) in HELD_OUT for f in people if f.has(row["part"])
        )
        assert row["n_accuracy"] + row["n_natural"] == present - secret
        assert row["n_held_out"] == (0 if row["part"] == "shirt" else min(2, present))
    shapes = clip_scores.shape_accuracy(guide, faces=20)
    assert [row["shape"] for row in shapes] == ["hair style", "bald", "smile", "glasses", "beard"]
    assert all(0 <= row["accuracy"] <= 1 for row in shapes)
    assert [row["part"] for row in clip_scores.moved_accuracy(guide, *networks, n=4)] == list(PARTS)
