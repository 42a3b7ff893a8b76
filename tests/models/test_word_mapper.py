"""The mapper that reads word by word."""

import copy
from dataclasses import replace

import pytest
import torch

from cfclip.checkpoints.mappers import load_mapper, save_mapper
from cfclip.models.mapper import Mapper, MapperConfig, WordMapper

CONFIG = MapperConfig(
    num_ws=10, w_dim=16, text_dim=24, levels=("fine",), split=(2, 4), text="tokens", slots=5
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mapper():
    return Mapper.initialised(CONFIG, torch.Generator().manual_seed(0)).requires_grad_(False)


def test_its_residual_is_the_equation_of_its_docstring(mapper):
    w, words = numbers(2, 10, 16), numbers(2, 3, 24, seed=1)
    (slots,) = mapper.groups
    s, b, c, u = (
        slots.RATES[name] * getattr(slots, name).double() for name in ("share", "target", "place", "move")
    )
    expected = torch.zeros(2, 10, 16).double()
    for n in range(2):
        for x in words[n].double():
            e, said = x.chunk(2)
            a = torch.softmax(e @ s, 0)
            for k in range(5):
                here = torch.einsum("d,dr->r", w[n, 4:].double().flatten(), c[:, k])
                way = torch.cat([said @ b - here, torch.ones(1)])
                expected[n, 4:] += a[k] * (way @ u[k]).view(6, 16)
    assert isinstance(mapper, WordMapper) and expected.abs().max() > 0.1
    assert torch.allclose(mapper.residual(w, words).double(), expected, atol=1e-5)


def test_one_text_serves_all_codes_and_zeros_are_no_word(mapper):
    w, words = numbers(3, 10, 16), numbers(1, 2, 24, seed=1)
    padded = torch.cat([words, torch.zeros(1, 4, 24)], 1)
    alone = mapper.residual(w, words)
    assert torch.allclose(alone, mapper.residual(w, words.expand(3, -1, -1)), atol=1e-6)
    assert torch.allclose(alone, mapper.residual(w, padded), atol=1e-6)
    assert not mapper.residual(w, torch.zeros(1, 2, 24)).any()


def test_only_its_levels_move(mapper):
    moved = mapper.edit(numbers(2, 10, 16), numbers(1, 2, 24)) - numbers(2, 10, 16)
    assert not moved[:, :4].any() and moved[:, 4:].abs().amin(-1).max() > 0


def test_the_busiest_slots_are_those_of_what_is_said(mapper):
    whole = replace(CONFIG, levels=("coarse", "medium", "fine"))
    both = Mapper.initialised(whole, torch.Generator().manual_seed(0)).requires_grad_(False)
    w, words = numbers(2, 10, 16), numbers(1, 2, 24, seed=1)
    for quiet, levels in ((0, ("fine",)), (1, ("coarse", "medium"))):
        loud = copy.deepcopy(both)
        loud.groups[quiet].move *= 0.1
        part, whole = loud.busiest(w, words), loud.residual(w, words)
        assert part.config == replace(CONFIG, levels=levels)
        kept = part.groups[0].layers
        assert torch.equal(part.residual(w, words)[:, kept], whole[:, kept])
        assert part.state_dict().keys() == Mapper.of(part.config).state_dict().keys()


def test_it_survives_a_file(mapper, tmp_path):
    opened = load_mapper(save_mapper(mapper, tmp_path / "m.safetensors", store_as=None))
    w, words = numbers(2, 10, 16), numbers(1, 2, 24)
    assert opened.config == CONFIG
    assert torch.equal(opened.edit(w, words), mapper.edit(w, words))


@pytest.mark.parametrize("wrong", [numbers(1, 24), numbers(1, 2, 23), None])
def test_a_text_that_it_cannot_read(mapper, wrong):
    with pytest.raises(ValueError, match=r"read\(clip, prompt\)"):
        mapper.residual(numbers(1, 10, 16), wrong)


def test_it_reads_the_words_of_a_prompt(domain):
    clip = domain.clip
    words = clip.encode_words(["green lipstick", "a woman with green hair"])
    assert words.shape == (2, 5, clip.word_dim) and not words[0, 2:].any()
    assert torch.allclose(clip.encode_words("green lipstick"), words[:1, :2], atol=1e-5)
    sizes = MapperConfig(domain.generator.num_ws, domain.generator.w_dim, clip.word_dim, text="tokens")
    assert torch.equal(Mapper.of(sizes).read(clip, "green lipstick"), words[:1, :2])
    assert sizes.fits(domain.generator, clip)


def test_an_unknown_word_says_nothing(domain, monkeypatch):
    plain, half = domain.clip.encode_words("blue hair")[0], domain.clip.word_dim // 2
    known, embedding = set(domain.clip.tokenizer.encode("blue hair")), domain.clip.model.token_embedding
    monkeypatch.setattr(embedding, "knows", lambda tokens: set(tokens) <= known, raising=False)
    monkeypatch.setattr(embedding, "words", ["blue", "hair"], raising=False)
    with pytest.warns(UserWarning, match="does not know 'frobnicated'"):
        put = domain.clip.encode_words("blue frobnicated hair")[0]
    assert not put[1:-1, :half].any() and torch.equal(put[-1, :half], plain[-1, :half])
    assert torch.allclose(put[-1, half:] * 2 ** (len(put) - 2), plain[-1, half:])
    slots = Mapper.initialised(
        MapperConfig(10, 8, domain.clip.word_dim, text="tokens"), torch.Generator().manual_seed(0)
    )
    shares = slots.groups[0].shares(put[None])[0]
    assert (shares[1:-1] == 0).all() and (shares[[0, -1]] > 0).all()


def test_a_word_is_its_embedding_and_what_was_said_before_it(domain):
    m, tokens = domain.clip.model, domain.clip.tokenize("long blue hair")[0, 1:4]
    long, blue, hair = m.token_embedding(tokens).double() / m.token_embedding.weight.double().std()
    words = domain.clip.encode_words("long blue hair")[0].double()
    assert torch.allclose(words[2], torch.cat([hair, blue + long / 2]), atol=1e-5)
    assert torch.allclose(words[0], torch.cat([long, 0 * long]), atol=1e-5)
