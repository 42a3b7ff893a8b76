import re

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from cfclip.toonfaces.captions import (
    FACTS,
    GROUPS,
    caption,
    claim_of,
    claims_of,
    fact_vector,
    facts_of,
    matches,
    phrase,
    shape_facts,
)
from cfclip.toonfaces.clip import MODELS, build
from cfclip.toonfaces.factors import PARTS, colours, sample_face


def test_a_caption_claims_only_what_is_true_and_says_what_it_claims():
    counts = []
    for k in range(300):
        face = sample_face(k, "both")
        text, claims = caption(facts_of(face), np.random.default_rng(k))
        assert claims <= facts_of(face) <= set(FACTS) and text.strip()
        assert claims_of(text) == claims, text
        counts.append(len(claims))
    assert 0.35 < np.mean(np.array(counts) == 1) < 0.65 and max(counts) >= 4


def test_captions_use_every_word_of_every_part_and_deny_what_is_not_there():
    rng = np.random.default_rng(0)
    texts = " ; ".join(caption(facts_of(sample_face(k, "both")), rng)[0] for k in range(3000))
    wanted = (
        "lips lipstick mouth brows irises moustache mustache spectacles sweater t-shirt gray blond violet "
    )
    wanted += "turquoise clean-shaven bearded curls bald smiling"
    assert not [word for word in wanted.split() if not re.search(rf"\b{word}\b", texts)]
    for words in ("no glasses", "without glasses", "no beard", "without a beard", "not smiling", "no hair"):
        assert words in texts
    assert re.search(r"(long|short|curly) (blue|green|red) hair", texts) and "a smile" in texts


def test_facts_are_one_of_a_group_and_hidden_parts_have_no_colour():
    for k in range(300):
        face = sample_face(k, "both")
        facts = facts_of(face)
        assert len(dict(facts)) == len(facts)
        assert {part for part in PARTS if face.has(part)} == {key for key, _ in facts if key in PARTS}
        true, known = shape_facts(face)
        assert true <= known and {key for key, _ in true} == {key for key, _ in known}
    assert [fact for key, values in GROUPS.items() for fact in ((key, v) for v in values)] == list(FACTS)


def test_a_caption_is_true_false_or_unknown_of_a_face():
    true = [{("hair", "blue"), ("glasses?", "yes")}, {("hair", "red")}]
    known = [true[0] | {("hair", "red"), ("smile", "yes")}, {("hair", "red"), ("hair", "blue")}]
    claims = [{("hair", "blue")}, set(), {("hair", "red"), ("glasses?", "yes")}, {("beard?", "no")}]
    claims.append({("hair", "blue"), ("beard?", "no")})
    vectors = (torch.tensor(np.stack([fact_vector(one) for one in group])) for group in (true, known, claims))
    holds, fails = matches(*vectors)
    assert holds.tolist() == [[True, True, False, False, False], [False, True, False, False, False]]
    assert fails.tolist() == [[False, False, True, False, False], [True, False, False, False, True]]


@pytest.mark.parametrize(
    ("prompt", "claim", "others"),
    [
        ("green lipstick", ("lipstick", "green"), set()),
        ("blue hair", ("hair", "blue"), set()),
        ("blue lipstick", ("lipstick", "blue"), set()),
        ("purple eyebrows", ("eyebrows", "purple"), set()),
        ("orange beard", ("beard", "orange"), set()),
        ("white eyebrows", ("eyebrows", "white"), set()),
        ("red hair", ("hair", "red"), set()),
        ("pink hair", ("hair", "pink"), set()),
        ("yellow eyes", ("eyes", "yellow"), set()),
        ("smiling", None, {("smile", "yes")}),
        ("glasses", None, {("glasses?", "yes")}),
        ("bald", None, {("style", "bald")}),
        ("blue skin", ("skin", "blue"), set()),
        ("green lips and blue hair", None, {("lipstick", "green"), ("hair", "blue")}),
        ("a woman with long purple hair", ("hair", "purple"), {("person", "woman"), ("style", "long")}),
        ("no beard", None, {("beard?", "no")}),
        ("black lipstick", ("lipstick", "black"), set()),
        ("green eyes", ("eyes", "green"), set()),
        ("cyan skin", ("skin", "cyan"), set()),
        ("a man with a red moustache", ("beard", "red"), {("person", "man")}),
        ("pale skin", ("skin", "pale"), set()),
        ("grey hair", ("hair", "grey"), set()),
        ("blond eyebrows", ("eyebrows", "blonde"), set()),
        ("orange lips", ("lipstick", "orange"), set()),
        ("purple glasses", ("glasses", "purple"), set()),
        # the 25 sentences that users type end here
        ("a man with a  Blue BEARD", ("beard", "blue"), {("person", "man")}),
        ("violet brows, turquoise irises", None, {("eyebrows", "purple"), ("eyes", "cyan")}),
        ("a blonde woman without glasses", ("hair", "blonde"), {("person", "woman"), ("glasses?", "no")}),
        ("without glasses and a beard", None, {("glasses?", "no"), ("beard?", "no")}),
        ("clean shaven, not smiling", None, {("beard?", "no"), ("smile", "no")}),
        ("a person wearing black spectacles", ("glasses", "black"), set()),
        ("not wearing glasses", None, {("glasses?", "no")}),
        ("no hair", None, {("style", "bald")}),
        ("a short red beard", ("beard", "red"), set()),
        ("no red lips", None, set()),
        ("a green woman", None, {("person", "woman")}),
        ("tan lipstick", None, set()),
        ("happy", None, set()),
        ("evergreen lipsticks", None, set()),
    ],
)
def test_a_prompt_names_the_facts_that_it_says(prompt, claim, others):
    assert claim_of(prompt) == claim
    assert claims_of(prompt) == others | ({claim} if claim else set())


def test_the_plainest_phrase_of_every_colour_is_understood():
    for part in PARTS:
        for colour in colours(part):
            assert claims_of(phrase(part, colour)) == {(part, colour)}


@pytest.mark.parametrize("name", MODELS)
def test_every_word_of_a_caption_has_its_own_row_and_all_other_words_share_the_last_one(name):
    words, tokenizer = build(name).token_embedding, SimpleTokenizer(context_length=32)
    texts = [caption(facts_of(sample_face((3, k), "both")), np.random.default_rng(k))[0] for k in range(300)]
    assert (words.rows(tokenizer(texts)) < len(words.tokens)).all()
    strange, known = words.rows(tokenizer(["a green zebra", "a green face"]))
    assert (strange == len(words.tokens)).sum() == 1 and (known < len(words.tokens)).all()
    assert words.weight.shape[0] == len(words.tokens) + 1 < 300
