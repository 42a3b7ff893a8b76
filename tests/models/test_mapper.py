import pytest
import torch

from cfclip.baselines.library import find_mappers
from cfclip.checkpoints import weights
from cfclip.models.mapper import Mapper, MapperConfig


def mapper(**changes):
    torch.manual_seed(0)
    return Mapper(MapperConfig(num_ws=10, w_dim=16, text_dim=24, **changes)).requires_grad_(False)


def test_strength_scales_the_tenth_of_the_residual():
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


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="'depth'"):
        MapperConfig(norm_axis="depth")
    with pytest.raises(ValueError, match="huge"):
        MapperConfig(levels=("huge",))


def test_a_stored_mapper_comes_back(tmp_path):
    m = mapper(levels=("coarse", "medium"))
    weights.save(m, tmp_path / "a" / "mapper.safetensors", "mapper", m.metadata, prompt="green lipstick")
    found = find_mappers(tmp_path)["green lipstick"]
    w, t = torch.randn(2, 10, 16), torch.randn(1, 24)
    assert torch.equal(found.edit(w, t), m.edit(w, t))
    with pytest.raises(ValueError, match=r"no mapper for \['blue dog'\]"):
        find_mappers(tmp_path, ["blue dog"])
    with pytest.raises(ValueError, match="train one"):
        find_mappers(tmp_path / "nothing")
