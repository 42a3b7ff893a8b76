import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from cfclip.toonfaces.captions import FACTS, caption, claim_of, fact_vector, facts_of, matches, training_face
from cfclip.toonfaces.clip import MODELS, build
from cfclip.toonfaces.factors import HELD_OUT, PARTS, sample_face


def test_a_caption_claims_only_what_is_true_and_names_the_colours_it_claims():
    for k in range(300):
        face = sample_face(k, "both")
        text, claims = caption(face, np.random.default_rng(k))
        assert claims <= facts_of(face) <= set(FACTS) and text.strip()
        assert all(colour in text for part, colour in claims if part in PARTS)


def test_training_never_shows_a_held_out_pair():
    for k in range(300):
        face = training_face((0, k))
        assert not HELD_OUT & {(part, getattr(face, part).name) for part in PARTS if face.has(part)}


def test_a_caption_matches_the_faces_of_which_all_its_claims_are_true():
    faces = [{("hair", "blue"), ("glasses", "yes")}, {("hair", "red")}]
    claims = [{("hair", "blue")}, set(), {("hair", "red"), ("glasses", "yes")}]
    faces, claims = (torch.tensor(np.stack([fact_vector(one) for one in group])) for group in (faces, claims))
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
def test_a_prompt_asks_for_the_one_part_and_colour_that_it_names(prompt, claim):
    assert claim_of(prompt) == claim


@pytest.mark.parametrize("name", MODELS)
def test_every_word_of_a_caption_has_its_own_row_and_all_other_words_share_the_last_one(name):
    words, tokenizer = build(name).token_embedding, SimpleTokenizer(context_length=32)
    texts = [caption(training_face((3, k)), np.random.default_rng(k))[0] for k in range(300)]
    assert (words.rows(tokenizer(texts)) < len(words.tokens)).all()
    strange, known = words.rows(tokenizer(["a green zebra", "a green face"]))
    assert (strange == len(words.tokens)).sum() == 1 and (known < len(words.tokens)).all()
    assert words.weight.shape[0] == len(words.tokens) + 1 < 200
