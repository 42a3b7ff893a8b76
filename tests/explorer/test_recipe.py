"""A recipe is the picture: the same one in another process, to the bit."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import cfclip
from cfclip.checkpoints import weights
from cfclip.explorer.recipe import (
    Recipe,
    blend,
    codes,
    draw_faces,
    level_layers,
    levels_on,
    region_mask,
    render,
)
from cfclip.models.mapper import Mapper, MapperConfig

# FIXME training.atomic_save


@pytest.fixture(scope="module")
def toonfaces():
    return cfclip.load_domain("toonfaces")


@pytest.fixture
def mapper_file(domain, tmp_path):
    torch.manual_seed(2)
    mapper = (
        Mapper(MapperConfig(domain.generator.num_ws, domain.generator.w_dim, domain.clip.embed_dim))
        .eval()
        .requires_grad_(False)
    )
    return str(
        weights.save(
            mapper,
            tmp_path / "green-cfclip" / "mapper.safetensors",
            "mapper",
            mapper.metadata,
            domain="tiny",
            prompt="green lipstick",
        )
    )


@pytest.fixture
def recipe(mapper_file):
    return Recipe("tiny", faces=(0, 1), mapper=mapper_file)


def test_the_formula(domain, recipe):
    w, mapper = codes(domain, (0, 1)), cfclip.load_mapper(recipe.mapper)
    assert torch.equal(w[1:], domain.latents(1, "test", 1)), "a face is its seed, whoever stands beside it"
    text = domain.clip.encode_text("green lipstick")
    expected = domain.generator.synthesis(w + 1.5 * 0.1 * mapper.residual(w, text))
    assert torch.allclose(render(domain, replace(recipe, strength=1.5)), expected, atol=1e-5)
    assert torch.equal(render(domain, replace(recipe, strength=0.0)), draw_faces(domain, (0, 1)).images)
    assert torch.equal(render(domain, replace(recipe, prompt=" ")), draw_faces(domain, (0, 1)).images)


def test_layers_scale_their_part_alone(domain, recipe):
    mapper, text = cfclip.load_mapper(recipe.mapper), domain.clip.encode_text("green lipstick")
    w = codes(domain, (0, 1))
    step = 0.1 * mapper.residual(w, text)
    step[:, :4] *= 0
    step[:, 4:] *= 0.5
    layers = (0.0,) * 4 + (0.5,) * (domain.generator.num_ws - 4)
    assert torch.allclose(
        render(domain, replace(recipe, layers=layers)), domain.generator.synthesis(w + step), atol=1e-5
    )
    with pytest.raises(ValueError, match="strengths for 2 layers, but this generator has 6"):
        render(domain, replace(recipe, layers=(1.0, 1.0)))


def test_levels():
    assert level_layers(10, ["coarse", "medium", "fine"]) == ()
    layers = level_layers(10, ["fine"])
    assert layers == (0.0,) * 8 + (1.0,) * 2
    assert levels_on(layers, 10) == {"coarse": False, "medium": False, "fine": True}
    assert level_layers(10, []) == (0.0,) * 10


def test_prompts_combine_one_after_the_other(domain, recipe):
    assert replace(recipe, prompt=" a  b +c++ ").prompts == ["a b", "c"]
    mapper, w = cfclip.load_mapper(recipe.mapper), codes(domain, (0, 1))
    for prompt in ("green lipstick", "blue hair"):
        w = mapper.edit(w, domain.clip.encode_text(prompt))
    assert torch.equal(
        render(domain, replace(recipe, prompt="green lipstick + blue hair")), domain.generator.synthesis(w)
    )


def test_a_box_keeps_the_rest_to_the_bit(domain, recipe):
    source, edited = draw_faces(domain, (0, 1)).images, render(domain, recipe)
    blended = render(domain, replace(recipe, region=(0.0, 0.0, 0.5, 1.0)))
    assert torch.equal(blended[..., :6], edited[..., :6]) and torch.equal(blended[..., 10:], source[..., 10:])
    assert not torch.equal(blended, edited)


def test_a_part_is_where_the_readout_sees_it(toonfaces):
    recipe = Recipe(faces=(0, 1, 2))
    faces = draw_faces(toonfaces, recipe.faces)
    edited = render(toonfaces, recipe, faces)
    mask = region_mask(toonfaces, faces.images, edited, "lipstick")
    assert 0.01 < mask.mean() < 0.15 and 0 <= mask.min() < 0.01 and 0.9 < mask.max() <= 1
    changed = (blend(toonfaces, faces.images, edited, "lipstick") - faces.images).abs().mean(1)
    assert changed[:, :24].max() < 0.03, "above the mouth nothing moves"
    with pytest.raises(ValueError, match="not 'nose'"):
        blend(toonfaces, faces.images, edited, "nose")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"strength": 3.0}, r"from -1.5 to 2"),
        ({"strength": float("nan")}, "strength"),
        ({"faces": ()}, "faces"),
        ({"faces": (-1,)}, "faces"),
        ({"faces": tuple(range(17))}, "16"),
        ({"layers": (float("inf"),)}, "layers"),
        ({"region": (0.5, 0.0, 0.2, 1.0)}, "a box is"),
    ],
)
def test_what_cannot_be_is_an_error(fields, match):
    with pytest.raises(ValueError, match=match):
        Recipe(**fields)


def test_json_round_trip(recipe):
    recipe = replace(
        recipe, layers=(0.1, 1 / 3), region=(0.0, 0.25, 1 / 3, 1.0), faces=(3, "a.pt"), prompt="grün"
    )
    assert Recipe.from_json(recipe.to_json()) == recipe
    for text in (
        "",
        "[1]",
        '{"colour": 1}',
        "3",
        '{"strength": "much"}',
        '{"faces": 3}',
        '{"region": [1, 2]}',
    ):
        with pytest.raises(ValueError):
            Recipe.from_json(text)


def test_no_mapper_says_what_there_is(toonfaces, domain):
    with pytest.raises(ValueError, match="only for 'green lipstick' and 'purple eyebrows'"):
        own_mapper(replace(toonfaces, mapper=None), "plaid hat")
    with pytest.raises(ValueError, match="domain tiny has no mapper for 'x'"):
        own_mapper(domain, "x")


def test_a_mapper_for_just_this_prompt_goes_first(toonfaces):
    assert own_mapper(toonfaces, "plaid hat") is toonfaces.mapper is not None
    assert own_mapper(toonfaces, "green lipstick") is not toonfaces.mapper


def test_a_file_that_is_gone(domain, recipe):
    with pytest.raises(ValueError, match="not there"):
        render(domain, replace(recipe, mapper="/no/where.safetensors"))


def test_the_cells_reproduce_their_pictures_to_the_bit(toonfaces, tmp_path):
    photo = str(atomic_save(toonfaces.latents(1, "test", 77), tmp_path / "photo.pt"))
    file = str(cfclip.domains.DATA / "toonfaces" / "mappers" / "green-lipstick.safetensors")
    recipes = [
        Recipe(),
        Recipe(strength=-0.7, faces=(5, 2, 11), region="lipstick"),
        Recipe(mapper=file, faces=(1, photo)),
        Recipe(
            layers=(0.0,) * 8 + (0.3, 1.7),
            region=(0.1, 0.5, 0.9, 1.0),
            prompt="green lipstick + purple eyebrows",
        ),
    ]
    cells = [
        recipe.code() + f"torch.save(images, {str(tmp_path / f'{i}.pt')!r})\n"
        for i, recipe in enumerate(recipes)
    ]
    subprocess.run(
        [sys.executable, "-c", "\n".join(cells)], check=True, timeout=600
    )  # in a new process: nothing here helps it
    for i, recipe in enumerate(recipes):
        assert torch.equal(torch.load(tmp_path / f"{i}.pt"), render(toonfaces, recipe)), recipe
