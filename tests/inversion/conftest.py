import dataclasses

import pytest
import torch


@pytest.fixture
def still(domain):
    """The tiny domain without noise and identity network; its pictures stay in [-1, 1]."""
    g = domain.generator
    for conv in g.convs:
        conv.noise_strength.fill_(0.0)
    largest = g.synthesis(torch.cat([domain.latents(500, "test"), domain.latents(8, "test", 3)])).abs().max()
    for rgb in g.rgbs:  # the picture is linear in these weights
        rgb.weight.div_(largest)
    z = torch.randn(4096, g.z_dim, generator=torch.Generator().manual_seed(5))
    g.w_avg.copy_(g.map_one(z).mean(0))
    return dataclasses.replace(domain, identity=None)


@pytest.fixture
def sample(still):
    """A function of n and a seed: codes of test faces, and their pictures."""

    def draw(n=2, seed=0):
        w = still.latents(n, "test", seed)
        with torch.no_grad():
            images = still.generator.synthesis(w)
        assert images.abs().max() <= 1
        return w, images

    return draw
