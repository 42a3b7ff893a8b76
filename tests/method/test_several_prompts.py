"""One mapper for many prompts: its step, what it reads, and what it may move."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.loop import Callback, generator_for
from cfclip.method.losses import clip_nce, identity_loss, latent_l2
from cfclip.method.trainer import Batch, MapperTrainer, train_mapper
from cfclip.method.views import draw_perspectives, perspective_views
from cfclip.models.mapper import Mapper, MapperConfig

PROMPTS = ("green lipstick", "blue hair", "red skin")
CONFIG = MultiPromptConfig(prompts=PROMPTS, steps=6, train_latents=6)


def configured(**changed) -> MultiPromptConfig:
    return dataclasses.replace(CONFIG, **changed)


def trained(domain, config, out=None):
    mapper, rows = train_mapper(domain, config, out, progress=False)
    values = torch.cat([value.flatten() for value in mapper.parameters()])
    return values, [{name: row[name] for name in row if name != "seconds"} for row in rows]


def stop(step):
    raise InterruptedError


@pytest.mark.parametrize("prompts_at_once", [1, 2])
def test_a_resumed_run_equals_one_that_was_never_stopped(prompts_at_once, domain, tmp_path):
    config = configured(prompts_at_once=prompts_at_once)
    whole, _ = trained(domain, config)
    with pytest.raises(InterruptedError):
        stopped = Callback(4, stop)
        train_mapper(domain, config, tmp_path, progress=False, checkpoint_every=4, callbacks=[stopped])
    resumed, _ = trained(domain, config, tmp_path)
    assert torch.equal(whole, resumed)


def test_one_prompt_of_many_equals_the_single_run(domain):
    """To the bit: a step draws no more numbers where there is nothing to choose."""
    single = trained(domain, CFCLIPConfig("blue hair", steps=5, train_latents=6, norm_axis="channel"))
    many = trained(domain, configured(prompts=("blue hair",), steps=5))
    assert torch.equal(single[0], many[0]) and single[1] == many[1]


def test_the_step_is_the_losses_of_its_prompts(domain):
    """Two prompts with two pictures each, computed one prompt after the other, with nothing cached."""
    run = MapperTrainer(domain, configured(batch=4, prompts_at_once=2))
    mapper = Mapper(run.mapper.config)
    mapper.load_state_dict(run.mapper.state_dict())
    logs, generator = run.step(0, generator_for(5, 0)), generator_for(5, 0)
    w = run.w[torch.randint(6, (4,), generator=generator)]
    prompts = [PROMPTS[k] for k in torch.randperm(3, generator=generator)[:2].tolist()]
    texts = [domain.clip.encode_text(prompt) for prompt in prompts]
    w_edited = torch.cat([mapper.edit(part, text) for part, text in zip(w.split(2), texts, strict=True)])
    source, edited = domain.generator.synthesis(w), domain.generator.synthesis(w_edited)
    perspectives, losses = generator.get_state(), []
    for rows, prompt in zip((slice(0, 2), slice(2, 4)), prompts, strict=True):
        generator.set_state(perspectives)  # all parts see the same eight warps
        pictures = perspective_views(edited[rows], generator=generator), source[rows]
        views, unit = (F.normalize(domain.clip.encode_image(x), dim=-1) for x in pictures)
        target_text, source_text = (domain.clip.template_features(text) for text in (prompt, "face"))
        losses.append(clip_nce(views, unit, target_text, source_text))
    nce = (losses[0] + losses[1]) / 2
    assert logs["nce"] == pytest.approx(nce.item(), rel=1e-5)
    same = identity_loss(domain.identity(edited), domain.identity(source))
    loss = 0.3 * nce + 0.2 * same + 0.8 * latent_l2(w_edited, w)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_shape_moves_the_layers_that_draw_and_a_colour_those_that_colour(domain):
    """What a prompt should leave alone is not seen, and costs three for each squared move."""
    config = configured(
        prompts=("blue hair", "smiling"), shapes=("smiling",), batch=2, prompts_at_once=2, levels=("fine",)
    )
    domain = dataclasses.replace(domain, level_split=(1, 3))
    run = MapperTrainer(domain, dataclasses.replace(config, text="tokens"))
    fine = domain.level_split[1]
    assert run.mapper.config.levels == ("coarse", "medium", "fine")
    drawn = []
    synthesise, run.networks.synthesise = run.networks.synthesise, lambda w: drawn.append(w) or synthesise(w)
    index, prompts = torch.tensor([0, 1]), torch.tensor([0, 1])
    first = dict.fromkeys((0, 1), run.sources.clip[:1])
    perspectives = draw_perspectives(8, 16, 16, generator=generator_for(0, 0))
    logs = run.losses(Batch(index, prompts, run.text_feature, first, perspectives))
    w = run.w[index]
    edited = run.mapper.edit(w, run.text_feature[prompts])
    expected = torch.stack([
        torch.cat([w[0, :fine], edited[0, fine:]]),
        torch.cat([edited[1, :fine], w[1, fine:]]),
    ])
    assert torch.equal(drawn[-1], expected) and not torch.equal(expected, edited)
    silence = latent_l2(edited, expected)
    assert logs["silence"].item() == pytest.approx(silence.item()) and silence > 0
    terms = 0.3 * logs["nce"] + 0.2 * logs["id"] + 0.8 * latent_l2(expected, w) + 3 * silence
    assert logs["loss"].item() == pytest.approx(terms.item(), rel=1e-5)


def test_the_mapper_reads_prompts_in_all_forms_and_the_loss_reads_them_plain(domain):
    forms = ("{}", "a woman with {}")
    run = MapperTrainer(domain, configured(prompts_at_once=2, batch=2, text="tokens", forms=forms))
    plain, put = (run.mapper.read(domain.clip, form.format(PROMPTS[0])) for form in forms)
    read = [run.read([0], generator_for(0, i)) for i in range(30)]
    counts = [sum(torch.equal(words, one) for words in read) for one in (plain, put)]
    assert sum(counts) == 30 and min(counts) > 5
    assert torch.equal(run.target_text, MapperTrainer(domain, CONFIG).target_text)


def test_a_form_needs_a_place_for_the_prompt():
    with pytest.raises(ValueError, match="forms must be texts with one"):
        configured(forms=("a face",))


def test_slots_listen_to_no_word_that_none_of_their_prompts_has(domain):
    domain = dataclasses.replace(domain, level_split=(1, 3))
    config = configured(
        prompts=("blue hair", "red hair", "smiling"), shapes=("smiling",), text="tokens", steps=1,
        forms=("{}", "woman with {}"), levels=("fine",),
    )  # fmt: skip
    run, (mapper, _) = MapperTrainer(domain, config), train_mapper(domain, config, progress=False)
    draws, colours = mapper.groups
    w, read = domain.latents(2), lambda text: mapper.read(domain.clip, text)
    assert draws(w, read("blue hair")).abs().max() < 1e-5 < 1e-3 < draws(w, read("smiling")).abs().max()
    assert colours(w, read("smiling woman with")).abs().max() < 1e-5
    plain, put = (colours(w, read(text)) for text in ("blue hair", "smiling woman with blue hair"))
    assert torch.allclose(plain, put, atol=1e-4) and plain.abs().max() > 1e-3
    assert not torch.allclose(plain, colours(w, read("red hair")), atol=1e-3)
    generator = torch.Generator().manual_seed(config.seed)
    untouched = Mapper.initialised(run.mapper.config, generator).groups[1].shares(read("blue hair"))
    assert torch.allclose(colours.shares(read("blue hair")), untouched, atol=0.05), "one step hardly moved it"


def test_at_use_each_clause_moves_the_layers_of_its_kind_and_the_moves_add_up(domain):
    domain = dataclasses.replace(domain, level_split=(1, 3))
    config = configured(prompts=("blue hair", "bald"), shapes=("bald",), text="tokens", levels=("fine",))
    mapper, w = MapperTrainer(domain, config).mapper, domain.latents(2)
    layers = {"blue hair": slice(3, None), "bald": slice(3), "long hair": slice(3), "": slice(None)}
    moves = {text: torch.zeros_like(w) for text in layers}
    for text, some in layers.items():
        whole = mapper.edit(w, mapper.read(domain.clip, text or "something else"))
        assert (whole != w).any(2).all()
        moves[text][:, some] = (whole - w)[:, some]
    for prompt, clauses in {
        "blue hair": ["blue hair"],
        "bald": ["bald"],
        "long blue hair": ["long hair", "blue hair"],
        "something else": [""],
        "bald and blue hair": ["bald", "blue hair"],
        "Blue hair, bald": ["bald", "blue hair"],
    }.items():
        edited = domain.edited(w, prompt, mapper)
        assert torch.allclose(edited, w + sum(moves[clause] for clause in clauses), atol=1e-5), prompt
    assert torch.equal(domain.edit(w, prompt, mapper), domain.generator.synthesis(edited))
    plain = Mapper.initialised(MapperConfig(*w.shape[1:], domain.clip.embed_dim), generator_for(0, 0))
    assert (domain.edited(w, "blue hair", plain) != w).any(2).all(), "as published, a mapper moves all layers"


def test_a_sentence_is_taken_apart_only_where_its_clauses_say_the_same(domain):
    def clauses(prompt):
        return [tuple(clause) for clause in domain.truth.clauses(prompt)]

    assert clauses("a man with a red moustache and long hair") == [
        ("a man", False, False), ("a red moustache", True, False), ("long hair", False, True)
    ]  # fmt: skip
    assert clauses("green lips, bald") == [("green lips", True, False), ("bald", False, True)]
    both = "without glasses and a beard"
    assert clauses(both) == [(both, False, True)]
    assert clauses("a long blond bob") == [("blonde hair", True, False), ("bob", False, True)]
    assert clauses("sandwiches") == [("sandwiches", False, False)]


@pytest.mark.parametrize("prompt", ["", " ", 3, "blue hair, " * 40])
def test_a_sentence_that_cannot_be_read_is_refused_as_a_whole(prompt, domain):
    mapper = MapperTrainer(domain, configured(text="tokens")).mapper
    with pytest.raises(ValueError, match="prompt"):
        domain.edited(domain.latents(1), prompt, mapper)
    w = domain.latents(1)
    assert torch.equal(domain.edited(w, "and, with", mapper), w)
    with pytest.raises(ValueError, match="has no mapper of its own"):
        dataclasses.replace(domain, mapper=None).edited(w, "blue hair")


def test_a_prompt_is_trained_on_faces_where_it_asks_for_something(domain, some_have):
    prompts = ("blue glasses", "no beard", "smiling", "blue hair")
    run = MapperTrainer(domain, configured(prompts=prompts, applicable_only=True, train_latents=24))
    for prompt, first in {"blue glasses": 1, "no beard": 2, "blue hair": 1}.items():
        assert run.applicable[prompts.index(prompt)].tolist() == list(range(first, 24, 3))
    assert run.applicable[2].tolist() == list(range(24)), "nobody measures smiles"
    for i in range(20):
        batch = run.draw(generator_for(0, i))
        assert all(k in run.applicable[p] for k, p in zip(batch.index, batch.prompts, strict=True))
    with pytest.raises(ValueError, match="applicable_only needs a ground truth, and domain"):
        MapperTrainer(dataclasses.replace(domain, truth=None), run.config)


def test_a_shape_must_be_a_prompt():
    with pytest.raises(ValueError, match="shapes must be some of the prompts"):
        configured(shapes=("smiling",))


def test_the_prompts_of_steps_cover_the_list(domain):
    run = MapperTrainer(domain, configured(prompts_at_once=2))
    steps = [run.choose_prompts(generator_for(0, i)) for i in range(300)]
    assert all(len(set(step)) == 2 for step in steps)
    counts = Counter(k for step in steps for k in step)
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 150


def test_only_the_prompts_of_the_list_are_encoded(domain, monkeypatch):
    """A prompt that is not in the configuration cannot be chosen: its text is never read."""
    read, encode = set(), domain.clip.encode_text

    def reading(texts):
        read.update([texts] if isinstance(texts, str) else texts)
        return encode(texts)

    monkeypatch.setattr(domain.clip, "encode_text", reading)
    train_mapper(domain, configured(steps=2), progress=False)
    for prompt in ("purple skin", "purple eyebrows"):
        assert not any(prompt in text for text in read)
    assert all(any(prompt in text for text in read) for prompt in PROMPTS)


def test_shapes_have_their_share_of_every_step(domain):
    prompts = (*PROMPTS, "smiling", "glasses")
    shared = {"prompts": prompts, "shapes": prompts[3:], "prompts_at_once": 3, "batch": 3}
    run = MapperTrainer(domain, configured(**shared, shape_share=1 / 3, text="tokens"))
    steps = [run.choose_prompts(generator_for(0, i)) for i in range(200)]
    assert {sum(prompt >= 3 for prompt in step) for step in steps} == {1}
    assert all(len(set(step)) == 3 for step in steps) and {p for step in steps for p in step} == set(range(5))


def test_the_learning_rate_falls_at_the_end(domain):
    run = MapperTrainer(domain, configured(steps=4, ramp_down=0.5, lr=2.0))
    rates = []
    for i in range(4):
        run.step(i, generator_for(0, i))
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2, 2, 2, 1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompts": ()}, "prompts"),
        ({"prompts": "blue hair"}, "prompts .*'blue hair'"),
        ({"prompts": ("x", "x")}, "different"),
        ({"prompts_at_once": 0}, "prompts_at_once"),
        ({"prompts_at_once": 4, "batch": 4}, "prompts_at_once.*the 3 prompts, not 4"),
        ({"prompts_at_once": 2, "batch": 3}, "prompts_at_once.*batch of 3"),
        ({"shape_share": 0.5, "batch": 2, "prompts_at_once": 2}, "1 of 0 shapes and 1 of 3 other"),
        ({"shapes": PROMPTS[:1], "shape_share": 1.0, "batch": 2, "prompts_at_once": 2}, "2 of 1 shapes"),
        ({"ramp_down": 2.0}, "ramp_down"),
        ({"text_mapper": False}, "text_mapper"),
        ({"steps": 0}, "steps"),
    ],
)
def test_wrong_settings_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        configured(**wrong)
    with pytest.raises(TypeError, match="promts"):
        MultiPromptConfig(promts=PROMPTS)


def test_an_empty_prompt_in_the_list_is_refused(domain):
    with pytest.raises(ValueError, match="empty"):
        MapperTrainer(domain, configured(prompts=("blue hair", "")))
