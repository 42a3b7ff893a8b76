"""toonfaces' mapper of every prompt: its slots, its strengths, its card."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cfclip.checkpoints import weights
from cfclip.checkpoints.mappers import load_mapper
from cfclip.files import DATA
from cfclip.method.config import MultiPromptConfig
from cfclip.method.trainer import MapperTrainer
from cfclip.models.mapper import Mapper, MapperConfig
from cfclip.toonfaces.captions import claim_of, claims_of
from cfclip.toonfaces.domain import load_toonfaces
from cfclip.toonfaces.factors import HELD_OUT, NATURAL, PARTS, colours
from cfclip.toonfaces.train import cards, multi

PROMPTS = ("green lipstick", "blue hair", "red skin")
CONFIG = MultiPromptConfig(prompts=PROMPTS, steps=6, train_latents=6, levels=("fine",))


def mapper_of_slots(domain):
    """One that reads a colour's prompt and a shape's, as it begins."""
    config = dataclasses.replace(CONFIG, prompts=("blue hair", "bald"), shapes=("bald",), text="tokens")
    return MapperTrainer(dataclasses.replace(domain, level_split=(1, 3)), config).mapper


def test_each_slot_that_colours_gets_the_least_gain_that_is_as_good_as_any(domain, monkeypatch):
    mapper = mapper_of_slots(domain)
    before = [group.move.detach().clone() for group in mapper.groups]
    prompts, codes = ("red eyes", "blue eyes", "blue hair"), domain.latents(2, "train")
    monkeypatch.setattr(multi, "split", lambda: (sum(((one, "") for one in prompts), ()), ()))
    monkeypatch.setattr(multi, "faces_for", lambda domain, asked, n, split: dict.fromkeys(asked, codes))
    monkeypatch.setattr(
        mapper.groups[-1], "sizes", lambda w, words: torch.eye(16)[[2 + bool((words - hair).any())]]
    )
    hair = mapper.read(domain.clip, "blue hair")
    monkeypatch.setattr(multi, "GAINS", (1.0, 1.15, 1.3, 1.45, 1.6))
    success = {  # of red eyes, blue eyes and blue hair
        1.0: [(1, 0), (0, 1), (1, 1)], 1.15: [(1, 1), (0, float("nan")), (1, 1)],
        1.3: [(1, 1), (1, 0), (1, 0)], 1.45: [(1, 1), (1, 1), (1, 0)], 1.6: [(1, 1), (1, 1), (1, 1)],
    }  # fmt: skip
    identity = {1.0: 1.0, 1.15: 0.9, 1.3: 0.9, 1.45: 0.9, 1.6: 0.2}

    def compared(domain, mapper, asked, gain):
        assert tuple(asked) == prompts
        found = dict(zip(prompts, success[gain], strict=True))
        rows = [(prompt, hit) for prompt in asked for hit in found[prompt]]
        table = pd.DataFrame(rows, columns=["prompt", "success_after"])
        return table.assign(identity=identity[gain], leakage=0.3 if gain > 1.4 else 0.2, strength=gain)

    monkeypatch.setattr(multi, "compare", compared)
    after = [group.move for group in multi.calibrate(domain, mapper).groups]
    gains = torch.ones(16, 1, 1)
    gains[3] = 1.3
    assert torch.equal(after[0], before[0]) and torch.allclose(after[1], gains * before[1])


def test_a_slot_is_left_with_what_colours_its_own_part(domain, monkeypatch):
    mapper = mapper_of_slots(domain)
    slots = mapper.groups[-1]
    before, n = slots.move.detach().clone(), slots.move.shape[-1]
    first, even = (torch.arange(n) < n // 2).double(), (torch.arange(n) % 2 == 0).double()
    colour = torch.zeros(len(domain.truth.parts), n, n, dtype=torch.float64)
    eyes, hair, skin = (domain.truth.parts.index(part) for part in ("eyes", "hair", "skin"))
    colour[eyes], colour[hair] = first.diag(), (1 - first).diag()
    change, uneven = torch.zeros_like(colour), torch.zeros_like(colour)
    change[skin] = torch.eye(n)  # as large as all colours together
    change[hair] = uneven[hair] = 1e-9 * (1 - even).diag()
    uneven[eyes] = (1 - even).diag()
    monkeypatch.setattr(multi, "split", lambda: (("red eyes", "blue eyes", "blue hair"), ()))
    found = {"red eyes": 2, "blue eyes": 2, "blue hair": 3}
    monkeypatch.setattr(multi, "slots_of", lambda domain, mapper, faces: found)
    monkeypatch.setattr(multi, "faces_for", lambda *given: {})
    monkeypatch.setattr(multi, "colour_gradients", lambda domain, w, layers, random: (colour, change, uneven))
    monkeypatch.setattr(multi, "natural_spread", lambda truth: (np.ones(len(truth.parts)),) * 2)
    multi.purify(domain, mapper, n=8, own=3.0, pixels=0.5, keep=0.25)
    kept = torch.ones_like(before)
    # eps = 0.25 of the mean eigenvalue, which is 1; of any move 0.5 as a change of the skin, 0.5 if uneven
    kept[2] = torch.where(first > 0, 3.25 / (3.75 + 0.5 * (1 - even)), 0.25 / (1.75 + 0.5 * (1 - even)))
    kept[3] = torch.where(first > 0, 0.25 / 1.75, 3.25 / 3.75)
    assert torch.allclose(slots.move, kept * before, atol=1e-6)


def test_the_gradients_of_colours_foretell_how_they_move(domain):
    w, layers = domain.latents(2, "train"), [1, 2, 3]

    def gradients(w):
        return multi.colour_gradients(domain, w, layers, torch.Generator().manual_seed(0), probes=64)

    step = 1e-3 * torch.randn(w[:, layers].shape, generator=torch.Generator().manual_seed(0))
    moved = w.clone()
    moved[:, layers] += step
    with torch.no_grad():
        masks = domain.truth.masks(domain.generator.synthesis(w))
        change = (domain.generator.synthesis(moved) - domain.generator.synthesis(w)).double() / 2
    area = masks.double().sum((2, 3)).clamp_min(1e-6)
    colours = torch.einsum("nphw,nchw->npc", masks.double(), change) / area.clamp_min(12.0)[..., None]
    squares = torch.einsum("nphw,nchw->np", masks.double(), change.square())
    even = torch.einsum("nphw,nchw->npc", masks.double(), change).square().sum(2) / area
    alone = [gradients(w[k : k + 1]) for k in range(2)]
    found = gradients(w)[0]
    assert torch.allclose(found, alone[0][0] + alone[1][0], atol=1e-3 * float(found.abs().max()))
    for k, u in enumerate(step.flatten(1).double()):
        colour, whole, uneven = (torch.einsum("i,pij,j->p", u, one, u) for one in alone[k])
        assert torch.allclose(colour, colours[k].square().sum(1), rtol=0.05)
        seen = area[k] > 12
        assert seen.sum() >= 2
        assert torch.allclose(whole[seen], squares[k][seen], rtol=0.3)
        assert torch.allclose(uneven[seen], (squares - even)[k][seen], rtol=0.5)


def test_each_part_and_each_colour_has_seen_prompts_and_each_part_has_unseen_ones():
    seen, unseen = multi.split()
    claims = {prompt: claim_of(prompt) for prompt in seen + unseen}
    assert sorted(claims.values()) == sorted((part, colour) for part in PARTS for colour in colours(part))
    assert not set(seen) & set(unseen) and len(unseen) >= 0.2 * len(claims)
    assert {claims[p][0] for p in seen} == set(PARTS) == {claims[p][0] for p in unseen}
    # every word is known, only the pair is not
    assert {claims[p][1] for p in unseen} <= {claims[p][1] for p in seen}
    assert {claims[p] for p in unseen} >= HELD_OUT
    natural = [p for p in unseen if claims[p][1] in NATURAL[claims[p][0]] and claims[p][0] != "shirt"]
    assert len(natural) <= 2  # every colour of a shirt is natural
    assert (seen, unseen) == multi.split()
    whole = multi.config()
    assert multi.heldout_config().prompts == seen and whole.prompts == seen + unseen + whole.shapes
    assert {frozenset(claims_of(prompt)) for prompt in whole.shapes} == {
        frozenset([fact]) for fact in multi.SHAPES
    }


@pytest.fixture
def folder(tmp_path):
    """The networks of toonfaces without a mapper."""
    for name in ("generator", "clip", "identity", "readout"):
        (tmp_path / f"{name}.safetensors").symlink_to(DATA / "toonfaces" / f"{name}.safetensors")
    return tmp_path


def test_the_stored_mapper_is_the_domains(folder, monkeypatch):
    assert load_toonfaces(folder).mapper is None
    monkeypatch.setattr(multi, "split", lambda: (PROMPTS, ("purple skin",)))
    short = {"steps": 2, "batch": 2, "prompts_at_once": 2, "train_latents": 2, "seed": 3}
    short |= {"prompts": PROMPTS, "shapes": (), "shape_share": None}
    monkeypatch.setattr(multi, "GAINS", (1.0,))
    path = cards.train("multi", folder / "run", folder, **short)
    domain, stored = load_toonfaces(folder), load_mapper(path)
    assert stored.config.text == "tokens" and stored.config.levels == ("fine",)
    text, w = stored.read(domain.clip, ["blue hair", "purple skin"]), domain.latents(2, "test")
    assert torch.equal(domain.mapper.edit(w, text), stored.edit(w, text))
    assert not torch.equal(stored.edit(w, text[:1]), stored.edit(w, text[1:]))
    training = weights.read(path, "mapper")[2]["training"]
    assert tuple(training["prompts"]) == PROMPTS and (training["seed"], training["steps"]) == (3, 2)
    for name in ("measure", "calibration"):  # two faces
        monkeypatch.setattr(multi, name, partial(getattr(multi, name), n=2))
    assert domain.confidence is None
    card = cards.write_card("multi", folder).read_text(encoding="utf-8")
    known = json.loads((folder / "confidence.json").read_text(encoding="utf-8"))
    assert load_toonfaces(folder).confidence == known and "purple skin" in known["measured"]
    for words in (
        "counterfactual, held out from CLIP",
        "lipstick",
        "success after",
        "train multi",
        "ramp_down",
    ):
        assert words in card


def test_the_probe_reads_what_is_there():
    """Text features made of a part's and a colour's vector are read whole; random ones are not."""
    seen, unseen = multi.split()
    torch.manual_seed(0)
    words = {word: torch.randn(64) for prompt in seen + unseen for word in prompt.split()}

    def told(encode_text):
        return multi.probe(SimpleNamespace(clip=SimpleNamespace(encode_text=encode_text))).set_index(
            "prompts"
        )

    whole = told(lambda texts: torch.stack([sum(words[word] for word in text.split()) for text in texts]))
    assert whole.loc["unseen", "both"] > 0.9 and whole.loc["unseen", "n"] == len(unseen)
    assert told(lambda texts: torch.randn(len(texts), 64)).loc["unseen", "both"] < 0.2


def test_a_mapper_of_other_sizes_is_left_out(folder):
    other = Mapper(MapperConfig(num_ws=10, w_dim=64, text_dim=256))
    weights.save(other, folder / "multi.safetensors", "mapper", other.metadata)
    with pytest.warns(UserWarning, match=r"multi\.safetensors was trained for other networks"):
        assert load_toonfaces(folder).mapper is None
    with pytest.warns(UserWarning), pytest.raises(weights.WeightsError, match="train multi"):
        cards.write_card("multi", folder)
