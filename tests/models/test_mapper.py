import pytest
import torch

from cfclip.checkpoints.mappers import load_mapper, save_mapper
from cfclip.models.mapper import Mapper, MapperConfig


def mapper(**changes) -> Mapper:
    torch.manual_seed(0)
    return Mapper(MapperConfig(num_ws=10, w_dim=16, text_dim=24, **changes)).requires_grad_(False)


def test_strength_scales_a_tenth_of_the_residual():
    m, w, t = mapper(), torch.randn(2, 10, 16), torch.randn(1, 24)
    assert torch.equal(m.edit(w, t, 0.0), w)
    torch.testing.assert_close(m.edit(w, t, 2.0) - w, 0.2 * m.residual(w, t))


def test_only_signs_pass_the_layer_norm():
    w, t = torch.randn(2, 10, 16), torch.randn(1, 24)
    layer, channel = mapper(), mapper(norm_axis="channel")
    torch.testing.assert_close(layer.residual(w, t), layer.residual(w, t.sign()))
    assert not torch.allclose(channel.residual(w, t), channel.residual(w, t.sign()))


def test_a_level_that_is_off_moves_nothing():
    m = mapper(levels=("coarse", "fine"))
    delta = m.residual(torch.randn(2, 10, 16), torch.randn(2, 24))
    assert (delta[:, 4:8] == 0).all() and (delta[:, :4] != 0).any() and (delta[:, 8:] != 0).any()


def test_an_initialised_mapper_depends_on_its_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (
        Mapper.initialised(mapper().config, torch.Generator().manual_seed(seed)).state_dict()
        for seed in (1, 1, 2)
    )
    torch.set_rng_state(state)
    made = mapper().state_dict()
    assert all(torch.equal(first[name], same[name]) for name in made)
    for name, tensor in made.items():
        if name.endswith("bias"):
            assert torch.equal(first[name], tensor)
        else:
            assert not torch.equal(first[name], other[name])
            torch.testing.assert_close(first[name].std(), tensor.std(), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("w", "t", "words"),
    [
        ((2, 18, 16), (1, 24), r"\[N, 10, 16\], not \[2, 18, 16\]"),
        ((2, 10, 16), (1, 12), r"\[N, 24\], not \[1, 12\]"),
        ((2, 10, 16), None, "text_feature"),
    ],
)
def test_wrong_shapes_are_named(w, t, words):
    with pytest.raises(ValueError, match=words):
        mapper().edit(torch.randn(w), None if t is None else torch.randn(t))


@pytest.mark.parametrize(
    "wrong", [{"norm_axis": "depth"}, {"levels": ("huge",)}, {"levels": ()}, {"num_ws": 0}, {"text_dim": "x"}]
)
def test_settings_that_cannot_work_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        MapperConfig(**wrong)


def test_a_stored_mapper_comes_back_in_half_floats(tmp_path):
    m = mapper(levels=("coarse", "medium"))
    stored = load_mapper(save_mapper(m, tmp_path / "a" / "mapper.safetensors"))
    w, t = torch.randn(2, 10, 16), torch.randn(1, 24)
    assert stored.config == m.config and torch.equal(stored.edit(w, t), m.half().float().edit(w, t))
