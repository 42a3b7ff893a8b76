import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from cfclip.toonfaces.captions import FACTS, caption, claim_of, fact_vector, facts_of, matches, training_face
from cfclip.toonfaces.clip import build
from cfclip.toonfaces.factors import HELD_OUT, sample_face


def test_a_caption_claims_only_what_is_true():
    for k in range(300):
        face = sample_face(k, "both")
        text, claims = caption(face, np.random.default_rng(k))
        assert claims <= facts_of(face) and text.strip()
        for key, value in claims:
            if (key, value) in FACTS and key in ("lipstick", "hair", "eyebrows", "eyes", "skin", "beard"):
                assert value in text


def test_training_never_shows_a_held_out_pair():
    for k in range(300):
        face = training_face((0, k))
        assert not HELD_OUT & {
            (part, getattr(face, part).name)
            for part in ("skin", "hair", "eyebrows", "eyes", "lipstick", "beard")
            if face.has(part)
        }


def test_matches_by_hand():
    a, b = {("hair", "blue"), ("glasses", "yes")}, {("hair", "red")}
    faces = torch.tensor(np.stack([fact_vector(a), fact_vector(b)]))
    claims = torch.tensor(
        np.stack([
            fact_vector({("hair", "blue")}),
            fact_vector(set()),
            fact_vector({("hair", "red"), ("glasses", "yes")}),
        ])
    )
    assert matches(faces, claims).tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize(
    ("prompt", "claim"),
    [
        ("green lipstick", ("lipstick", "green")),
        ("a man with a  Blue BEARD", ("beard", "blue")),
        ("purple brows", ("eyebrows", "purple")),
        ("happy", None),
        ("green lips and red hair", None),
        ("evergreen lipsticks", None),
    ],
)
def test_what_a_prompt_asks_for(prompt, claim):
    assert claim_of(prompt) == claim


def test_every_word_of_every_caption_has_a_row_of_its_own_and_a_strange_word_has_the_last():
    words, tokenizer = build().token_embedding, SimpleTokenizer(context_length=32)
    texts = [caption(training_face((3, k)), np.random.default_rng(k))[0] for k in range(300)]
    assert (words.rows(tokenizer(texts)) < len(words.tokens)).all()
    strange, known = words.rows(tokenizer(["a green zebra", "a green face"]))
    assert (strange == len(words.tokens)).sum() == 1 and (known < len(words.tokens)).all()
    assert words.weight.shape[0] == len(words.tokens) + 1 < 200
