import numpy as np
import pytest
import torch

from cfclip.toonfaces.captions import FACTS, caption, claim_of, fact_vector, facts_of, matches, training_face
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
        assert not HELD_OUT & {(part, getattr(face, part).name) for part in ("skin", "hair", "eyebrows", "eyes", "lipstick", "beard") if face.has(part)}


def test_matches_by_hand():
    a, b = {("hair", "blue"), ("glasses", "yes")}, {("hair", "red")}
    faces = torch.tensor(np.stack([fact_vector(a), fact_vector(b)]))
    claims = torch.tensor(np.stack([fact_vector({("hair", "blue")}), fact_vector(set()), fact_vector({("hair", "red"), ("glasses", "yes")})]))
    assert matches(faces, claims).tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize(("prompt", "claim"), [
    ("green lipstick", ("lipstick", "green")), ("a man with a  Blue BEARD", ("beard", "blue")), ("purple brows", ("eyebrows", "purple")),
    ("happy", None), ("green lips and red hair", None), ("evergreen lipsticks", None)])
def test_what_a_prompt_asks_for(prompt, claim):
    assert claim_of(prompt) == claim
