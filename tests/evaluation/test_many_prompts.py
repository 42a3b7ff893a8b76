"""The mapper of many prompts compared with others, on faces where a prompt asks for something."""

import torch

from cfclip.evaluation.many_prompts import compare, faces_for
from cfclip.models.mapper import Mapper, MapperConfig


def test_prompts_are_compared_face_by_face(domain, monkeypatch):
    monkeypatch.setattr("cfclip.evaluation.metrics.natural_spread", lambda truth: (1.0, 1.0))
    torch.manual_seed(0)
    g = domain.generator
    mapper = Mapper(MapperConfig(g.num_ws, g.w_dim, domain.clip.embed_dim, norm_axis="channel"))
    w = domain.latents(3)
    table = compare(domain, mapper, {"blue hair": w, "purple skin": w})
    assert len(table) == 2 * 3 and table.columns[:3].tolist() == ["prompt", "strength", "index"]
    assert {"success_after", "leakage", "identity"} <= set(table)
    assert table["prompt"].unique().tolist() == ["blue hair", "purple skin"]
    assert not table["identity"].eq(1).any()


def test_prompts_are_tried_on_faces_where_they_ask_for_something(domain, some_have):
    prompts = ("blue hair", "red hair", "pink beard", "no beard", "smiling")
    faces, every = faces_for(domain, prompts, 3, "train", 5), domain.latents(24, "train", 5)
    for prompt, first in {"blue hair": 1, "pink beard": 2, "no beard": 2}.items():
        assert torch.equal(faces[prompt], every[first:24:3][:3])
    assert faces["red hair"] is faces["blue hair"], "so that the sources are drawn once"
    assert torch.equal(faces["smiling"], every[:3])
