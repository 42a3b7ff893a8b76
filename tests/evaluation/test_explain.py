"""The pictures of the method's notebook show what the training computes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cfclip.evaluation import explain
from cfclip.method.config import CFCLIPConfig
from cfclip.method.losses import Directions
from cfclip.method.trainer import MapperTrainer, train_mapper
from cfclip.models.mapper import RESIDUAL_SCALE


@pytest.fixture
def run(domain) -> MapperTrainer:
    return MapperTrainer(domain, CFCLIPConfig("green lipstick", steps=3, batch=2, train_latents=4))


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1)


def test_the_cosines_are_those_of_each_query():
    directions = Directions(q=unit(6, 5), p1=unit(1, 5), p2=unit(6, 5), n_k=unit(3, 5))
    table = explain.cosines(directions)
    q, p1, p2, n_k = (kind.numpy() for kind in directions)
    assert table[table["with"] == "p1"].cosine.to_numpy() == pytest.approx(q @ p1[0], abs=1e-6)
    assert table[table["with"] == "p2"].cosine.to_numpy() == pytest.approx((q * p2).sum(1), abs=1e-6)
    assert table[table["with"] == "n_k"].cosine.to_numpy() == pytest.approx((q @ n_k.T).ravel(), abs=1e-6)


def test_an_arrow_in_the_plane_has_its_whole_length_however_many_negatives_there_are():
    """Two directions span the plane; 79 negatives that are all alike count as one."""
    across, up = torch.eye(4)[:1], torch.eye(4)[1:2]
    figure = explain.compass({"now": Directions(q=up, p1=up, p2=up, n_k=across.repeat(79, 1))})
    arrows = figure.axes[0].collections
    assert [np.hypot(one.U, one.V) for one in arrows] == [pytest.approx(1.0, abs=1e-5)] * 4


def test_a_pull_is_the_way_down_of_its_term(run, domain):
    w = domain.latents(2, "test")
    found = explain.pulls(run, run.mapper, w, num_views=2)
    assert found.loss.keys() == found.on_code.keys() == {"CLIP-NCE", "identity", "latent L2"}
    assert found.on_picture.keys() == {"CLIP-NCE", "identity"}, "the distance in W+ sees no picture"
    delta = run.mapper.residual(w, run.text_feature).detach()
    exact = -run.config.lambda_l2 * 2 * RESIDUAL_SCALE * delta / delta.numel()
    torch.testing.assert_close(found.on_code["latent L2"], exact, rtol=1e-3, atol=1e-9)
    assert found.loss["latent L2"] == pytest.approx(
        run.config.lambda_l2 * (RESIDUAL_SCALE * delta).square().mean().item(), rel=1e-4
    )


def test_a_step_along_a_pull_stays_in_its_layers_and_has_its_length():
    pull = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    step = explain.along(pull, slice(2, 4), 3.0)
    assert step.flatten(1).norm(dim=1).tolist() == pytest.approx([3.0, 3.0])
    assert step[:, :2].abs().sum() == 0 and step[:, 4:].abs().sum() == 0
    assert torch.cosine_similarity(step[0, 2:4].flatten(), pull[0, 2:4].flatten(), dim=0) == pytest.approx(1)


def test_a_film_is_of_the_training_that_train_mapper_does(run, domain):
    w = domain.latents(2, "test")
    with torch.no_grad():
        first = domain.generator.synthesis(run.mapper.edit(w, run.text_feature))
    pictures, rows = explain.film(run, w, [0, 2, 3])
    assert list(pictures) == [0, 2, 3] and torch.equal(pictures[0], first)
    trained, log = train_mapper(domain, run.config, progress=False)
    with torch.no_grad():
        last = domain.generator.synthesis(trained.edit(w, domain.clip.encode_text("green lipstick")))
    assert torch.equal(pictures[3], last)
    assert rows[-1]["loss"] == pytest.approx(log[-1]["loss"])


def test_what_does_not_pull_is_mid_grey():
    pull = torch.zeros(2, 3, 4, 4)
    pull[1, 0, 0, 0] = -5.0
    pictures = explain.as_pictures(pull)
    assert pictures[0].abs().max() == 0 and pictures[1].abs().max() <= 1 and pictures[1, 0, 0, 0] < 0
