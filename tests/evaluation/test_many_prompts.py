import dataclasses
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from cfclip import domains
from cfclip.checkpoints import weights
from cfclip.checkpoints.mappers import load_mapper
from cfclip.evaluation.many_prompts import compare, summarise
from cfclip.evaluation.stats import half_width, plus_minus
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.losses import clip_nce, identity_loss, latent_l2
from cfclip.method.trainer import MapperTrainer, train_mapper
from cfclip.method.views import perspective_views
from cfclip.models.mapper import Mapper, MapperConfig
from cfclip.toonfaces.captions import claim_of
from cfclip.toonfaces.factors import HELD_OUT, NATURAL, PARTS, colours
from cfclip.toonfaces.train import cards, multi

PROMPTS = ("green lipstick", "blue hair", "red skin")
CONFIG = MultiPromptConfig(prompts=PROMPTS, steps=6, train_latents=6)


def without_clock(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("prompts_at_once", [1, 2])
def test_a_resumed_run_is_one_never_stopped(prompts_at_once, domain, tmp_path):
    config = dataclasses.replace(CONFIG, prompts_at_once=prompts_at_once)
    whole, _ = train_mapper(domain, config, progress=False)
    train_mapper(domain, dataclasses.replace(config, steps=4), tmp_path, progress=False)
    resumed, _ = train_mapper(domain, config, tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_one_prompt_of_many_is_the_single_run(domain):
    """To the digit: a step draws nothing more where there is nothing to choose."""
    single, rows = train_mapper(
        domain, CFCLIPConfig("blue hair", steps=5, train_latents=6, norm_axis="channel"), progress=False
    )
    many, rows2 = train_mapper(
        domain, dataclasses.replace(CONFIG, prompts=("blue hair",), steps=5), progress=False
    )
    assert all(torch.equal(a, b) for a, b in zip(single.parameters(), many.parameters(), strict=True))
    assert without_clock(rows) == without_clock(rows2)


def test_the_step_is_the_losses_of_its_prompts(domain):
    """Two prompts and two pictures each, written out from pictures one prompt after the other, nothing cached."""
    run = MapperTrainer(domain, dataclasses.replace(CONFIG, batch=4, prompts_at_once=2))
    mapper = Mapper(run.mapper.config)
    mapper.load_state_dict(run.mapper.state_dict())
    torch.manual_seed(5)
    logs = run.step(0)
    torch.manual_seed(5)
    w = run.w[torch.randint(6, (4,))]
    prompts = [PROMPTS[k] for k in torch.randperm(3)[:2].tolist()]
    w_edited = torch.cat([
        mapper.edit(part, domain.clip.encode_text(prompt))
        for part, prompt in zip(w.split(2), prompts, strict=True)
    ])
    source, edited = domain.generator.synthesis(w), domain.generator.synthesis(w_edited)
    drawn = torch.get_rng_state()
    losses = []
    for rows, prompt in zip((slice(0, 2), slice(2, 4)), prompts, strict=True):
        torch.set_rng_state(drawn)  # all parts see the same eight warps
        views, unit = (
            F.normalize(domain.clip.encode_image(x), dim=-1)
            for x in (perspective_views(edited[rows]), source[rows])
        )
        losses.append(
            clip_nce(
                views, unit, domain.clip.template_features(prompt), domain.clip.template_features("face")
            )
        )
    nce = (losses[0] + losses[1]) / 2
    assert logs["nce"] == pytest.approx(nce.item(), rel=1e-5)
    loss = 0.3 * nce + 0.2 * identity_loss(domain.identity, edited, source) + 0.8 * latent_l2(w_edited, w)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_drawn_prompts_cover_the_list(domain):
    run = MapperTrainer(domain, dataclasses.replace(CONFIG, prompts_at_once=2))
    torch.manual_seed(0)
    drawn = [run.draw() for _ in range(300)]
    assert all(len(set(step)) == 2 for step in drawn)
    counts = Counter(k for step in drawn for k in step)
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 150


def test_only_the_prompts_of_the_list_are_encoded(domain, monkeypatch):
    """A prompt that is not among the config's cannot be drawn: its text is never read."""
    read, encode = set(), domain.clip.encode_text
    monkeypatch.setattr(
        domain.clip,
        "encode_text",
        lambda texts: read.update([texts] if isinstance(texts, str) else texts) or encode(texts),
    )
    train_mapper(domain, dataclasses.replace(CONFIG, steps=2), progress=False)
    for prompt in ("cyan skin", "purple eyebrows"):
        assert not any(prompt in text for text in read)
    assert all(any(prompt in text for text in read) for prompt in PROMPTS)


def test_lr_falls_at_the_end(domain):
    run = MapperTrainer(domain, dataclasses.replace(CONFIG, steps=4, ramp_down=0.5, lr=2.0))
    rates = []
    for i in range(4):
        run.step(i)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2, 2, 2, 1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompts": ()}, "prompts"),
        ({"prompts": "blue hair"}, "prompts .*'blue hair'"),
        ({"prompts": ("x", "x")}, "different"),
        ({"prompts_at_once": 0}, "prompts_at_once"),
        ({"prompts_at_once": 4, "batch": 4}, "prompts_at_once.* 3 prompts, not 4"),
        ({"prompts_at_once": 2, "batch": 3}, "prompts_at_once.*batch of 3"),
        ({"ramp_down": 2.0}, "ramp_down"),
        ({"text_mapper": False}, "text_mapper"),
        ({"steps": 0}, "steps"),
    ],
)
def test_wrong_settings_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **wrong)
    with pytest.raises(TypeError, match="promts"):
        MultiPromptConfig(promts=PROMPTS)


def test_an_empty_prompt_in_the_list(domain):
    with pytest.raises(ValueError, match="empty"):
        MapperTrainer(domain, dataclasses.replace(CONFIG, prompts=("blue hair", "")))


@pytest.fixture
def compared(domain, monkeypatch) -> pd.DataFrame:
    monkeypatch.setattr("cfclip.metrics.natural_spread", lambda domain: (1.0, 1.0))
    torch.manual_seed(0)
    config = MapperConfig(
        domain.generator.num_ws, domain.generator.w_dim, domain.clip.embed_dim, norm_axis="channel"
    )
    many = {("some", seed): Mapper(config) for seed in range(2)} | {("all", 0): Mapper(config)}
    return pd.DataFrame(
        compare(
            domain,
            many,
            {("cyan skin", 0): Mapper(config), ("red eyes", 0): Mapper(config)},
            ("blue hair", "cyan skin"),
            n=3,
        )
    )


def test_compare_is_a_row_per_face(compared):
    assert len(compared) == (3 + 4) * 3 and {
        "prompt",
        "trained_on",
        "seed",
        "index",
        "success_after",
        "leakage",
        "identity",
    } <= set(compared)
    assert compared[compared["trained_on"] == "this prompt"]["prompt"].unique().tolist() == ["cyan skin"]
    assert not compared["identity"].eq(1).any()


def test_summarise_takes_trainings_for_tries(compared):
    compared["success_after"] = compared["seed"] + compared["prompt"].eq("cyan skin") * 0.5
    lines = summarise(compared.assign(group="all of them"), "group").set_index("trained on")
    assert lines.loc["some", "success %"] == plus_minus(0.75, half_width([0.25, 1.25]), 100)
    assert (
        lines.loc["some", "seeds"],
        lines.loc["some", "prompts"],
        lines.loc["this prompt", "prompts"],
    ) == (2, 2, 1)
    assert "nan" not in lines.loc["all", "success %"]  # one training has no interval


def test_found_mappers_are_told_apart(domain, tmp_path):
    train_mapper(domain, dataclasses.replace(CONFIG, steps=1, seed=4), tmp_path / "many", progress=False)
    for seed in (0, 1):
        train_mapper(
            domain,
            CFCLIPConfig("blue hair", steps=1, batch=1, train_latents=1, seed=seed),
            tmp_path / f"one-{seed}",
            progress=False,
        )
    many, alone = find(tmp_path)
    assert list(many) == [4] and list(alone) == [("blue hair", 0), ("blue hair", 1)]
    assert list(find(tmp_path / "many" / "mapper.safetensors")[0]) == [4]
    with pytest.raises(ValueError, match="the second mapper of 4"):
        find(tmp_path, tmp_path / "many" / "mapper.safetensors")


# ---- toonfaces ----------------------------------------------------------------------------------------------------------


def test_the_split():
    seen, unseen = multi.split()
    claims = {prompt: claim_of(prompt) for prompt in seen + unseen}
    assert sorted(claims.values()) == sorted((part, colour) for part in PARTS for colour in colours(part))
    assert not set(seen) & set(unseen) and len(unseen) >= 0.2 * len(claims)
    assert {claims[p][0] for p in seen} == set(PARTS) == {claims[p][0] for p in unseen}
    assert {claims[p][1] for p in unseen} <= {
        claims[p][1] for p in seen
    }  # every word is known, the pair is not
    assert {claims[p] for p in unseen} >= HELD_OUT
    assert sum(claims[p][1] in NATURAL[claims[p][0]] for p in unseen) <= 2
    assert (
        (seen, unseen) == multi.split()
        and multi.heldout_config().prompts == seen
        and multi.config().prompts == seen + unseen
    )


def folder_of(tmp_path):
    for path in (domains.DATA / "toonfaces").glob("*.safetensors"):
        if path.stem in ("generator", "clip", "identity", "readout"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_stored_mapper_is_the_domains(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    assert domains.load_toonfaces(folder).mapper is None
    monkeypatch.setattr(domains, "DOMAINS", {"toonfaces": lambda: domains.load_toonfaces(folder)})
    monkeypatch.setattr(multi, "split", lambda: (PROMPTS, ("cyan skin",)))
    path = cards.train(
        "multi",
        tmp_path / "run",
        folder,
        steps=2,
        batch=2,
        prompts_at_once=2,
        train_latents=2,
        seed=3,
        prompts=PROMPTS,
    )
    d, stored = domains.load_toonfaces(folder), load_mapper(path)
    assert stored.config.norm_axis == "channel" and stored.config.levels == ("fine",)
    text = d.clip.encode_text(["blue hair", "cyan skin"])
    w = d.latents(2, "test")
    assert torch.equal(d.mapper.edit(w, text), stored.edit(w, text)) and not torch.equal(
        stored.edit(w, text[:1]), stored.edit(w, text[1:])
    )
    training = weights.read(path, "mapper")[2]["training"]
    assert tuple(training["prompts"]) == PROMPTS and (training["seed"], training["steps"]) == (3, 2)
    monkeypatch.setattr(
        multi, "compare", lambda domain, many, alone, prompts, n: compare(domain, many, alone, prompts, n=2)
    )
    card = cards.write_card("multi", folder).read_text()
    assert all(
        words in card
        for words in (
            "counterfactual, held out from CLIP",
            "cyan skin",
            "success after",
            "train multi",
            "ramp_down",
        )
    )


def test_the_probe_reads_what_is_there():
    """Text features made of a part's and a colour's vector are read whole; random ones are not."""
    seen, unseen = multi.split()
    torch.manual_seed(0)
    words = {word: torch.randn(64) for prompt in seen + unseen for word in prompt.split()}
    whole = SimpleNamespace(
        encode_text=lambda texts: torch.stack([sum(words[word] for word in text.split()) for text in texts])
    )
    nothing = SimpleNamespace(encode_text=lambda texts: torch.randn(len(texts), 64))
    told = multi.probe(SimpleNamespace(clip=whole)).set_index("prompts")
    assert told.loc["unseen", "both"] > 0.9 and told.loc["unseen", "n"] == len(unseen)
    assert multi.probe(SimpleNamespace(clip=nothing)).set_index("prompts").loc["unseen", "both"] < 0.2


def test_a_mapper_of_other_sizes_is_left_out(tmp_path):
    folder = folder_of(tmp_path)
    other = Mapper(MapperConfig(num_ws=10, w_dim=64, text_dim=256))
    weights.save(other, folder / "multi.safetensors", "mapper", other.metadata)
    with pytest.warns(UserWarning, match=r"multi\.safetensors was trained for other networks"):
        assert domains.load_toonfaces(folder).mapper is None
    with pytest.warns(UserWarning), pytest.raises(weights.WeightsError, match="train multi"):
        cards.write_card("multi", folder)
