"""A recipe defines its picture: another process draws the same one, to the bit."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from panels import write_mapper

import cfclip
from cfclip.baselines.library import mapper_for
from cfclip.explorer import recipe as recipes
from cfclip.explorer.recipe import Recipe, codes, draw_faces, render
from cfclip.files import DATA


@pytest.fixture(scope="module")
def toonfaces():
    return cfclip.load_domain("toonfaces")


@pytest.fixture
def mapper_file(domain, tmp_path):
    return str(write_mapper(domain, tmp_path / "green-cfclip" / "mapper.safetensors", "green lipstick", 2))


@pytest.fixture
def recipe(mapper_file):
    return Recipe("tiny", faces=(0, 1), mapper=mapper_file)


def test_an_edit_is_the_residual_times_the_strength(domain, recipe):
    w, mapper = codes(domain, (0, 1)), cfclip.load_mapper(recipe.mapper)
    assert torch.equal(w[1:], domain.latents(1, "test", 1)), "a face depends on its seed only"
    text = domain.clip.encode_text("green lipstick")
    expected = domain.generator.synthesis(w + 1.5 * 0.1 * mapper.residual(w, text))
    assert torch.allclose(render(domain, replace(recipe, strength=1.5)), expected, atol=1e-5)
    assert torch.equal(render(domain, replace(recipe, strength=0.0)), draw_faces(domain, (0, 1)).images)
    assert torch.equal(render(domain, replace(recipe, prompt=" ")), draw_faces(domain, (0, 1)).images)


def test_the_factor_of_a_layer_scales_that_layer_only(domain, recipe):
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


def test_levels_are_groups_of_layers():
    assert recipes.level_layers(10, ["coarse", "medium", "fine"], (2, 4)) == ()
    layers = recipes.level_layers(10, ["fine"], (2, 4))
    assert layers == (0.0,) * 4 + (1.0,) * 6
    assert recipes.levels_on(layers, 10, (2, 4)) == {"coarse": False, "medium": False, "fine": True}
    assert recipes.level_layers(10, [], (2, 4)) == (0.0,) * 10


def test_prompts_are_applied_one_after_the_other(domain, recipe):
    assert replace(recipe, prompt=" a  b +c++ ").prompts == ["a b", "c"]
    mapper, w = cfclip.load_mapper(recipe.mapper), codes(domain, (0, 1))
    for prompt in ("green lipstick", "blue hair"):
        w = mapper.edit(w, domain.clip.encode_text(prompt))
    both = render(domain, replace(recipe, prompt="green lipstick + blue hair"))
    assert torch.equal(both, domain.generator.synthesis(w))


def test_outside_a_box_the_picture_is_the_source_to_the_bit(domain, recipe):
    source, edited = draw_faces(domain, (0, 1)).images, render(domain, recipe)
    blended = render(domain, replace(recipe, region=(0.0, 0.0, 0.5, 1.0)))
    assert torch.equal(blended[..., :6], edited[..., :6]) and torch.equal(blended[..., 10:], source[..., 10:])
    assert not torch.equal(blended, edited)


def test_a_part_is_edited_where_the_readout_sees_it(toonfaces):
    recipe = Recipe(faces=(0, 1, 2))
    faces = draw_faces(toonfaces, recipe.faces)
    edited = render(toonfaces, recipe, faces)
    mask = recipes.region_mask(toonfaces, faces.images, edited, "lipstick")
    assert 0.01 < mask.mean() < 0.15 and 0 <= mask.min() < 0.01 and 0.9 < mask.max() <= 1
    changed = (recipes.blend(toonfaces, faces.images, edited, "lipstick") - faces.images).abs().mean(1)
    assert changed[:, :24].max() < 0.03, "above the mouth nothing moves"
    with pytest.raises(ValueError, match="not 'nose'"):
        recipes.blend(toonfaces, faces.images, edited, "nose")


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
        *(
            ({name: value}, f"{name} must be")
            for name in ("domain", "prompt", "source_text", "mapper", "region", "layers", "faces", "strength")
            for value in (None, -5.5, True, {}, {"a": 1}, b"x", [[1]], ["a", None], object(), 10**400)
        ),
        *(({name: "\ud800"}, f"{name} must be") for name in ("prompt", "source_text", "mapper", "region")),
        ({"prompt": "x" * 1001}, "at most 1000 characters"),
        ({"mapper": "a\0b"}, "mapper must be"),
        ({"faces": ("",)}, "faces must be"),
        ({"faces": (2**31,)}, "faces must be"),
        ({"faces": (True,)}, "faces must be"),
        ({"layers": (1.0,) * 101}, "layers must be"),
        ({"layers": (10**400,)}, "layers must be"),
        ({"region": (0, 0, 1)}, "region must be"),
        ({"region": (0, 0, 1, float("nan"))}, "region must be"),
    ],
)
def test_a_value_that_cannot_work_is_an_error(fields, match):
    with pytest.raises(ValueError, match=match):
        Recipe(**fields)


def test_a_recipe_survives_json(recipe):
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
        "null",
        '{"prompt": 5}',
        '{"prompt": null}',
        '{"prompt": "\\ud800"}',
        '{"mapper": {}}',
        '{"faces": [[0]]}',
        '{"layers": [NaN]}',
        '{"strength": 1e999}',
        '{"strength": true}',
        '{"strength": ' + "9" * 400 + "}",
        '{"strength": ' + "9" * 9999 + "}",
        "[" * 100_000,
        '{"region":' * 100_000,
        b"\xff\xfe\xfd",
        b"\x89PNG\r\n",
    ):
        with pytest.raises(ValueError, match=r"this is not a recipe of the explorer: .+"):
            Recipe.from_json(text)


def test_without_a_mapper_the_error_lists_the_known_prompts(toonfaces, domain):
    with pytest.raises(ValueError, match="only for 'green lipstick' and 'purple eyebrows'"):
        mapper_for(replace(toonfaces, mapper=None), "plaid hat")
    with pytest.raises(ValueError, match="domain tiny has no mapper for 'x'"):
        mapper_for(domain, "x")


def test_a_mapper_of_one_prompt_is_preferred_to_the_mapper_of_many(toonfaces):
    assert mapper_for(toonfaces, "plaid hat") is toonfaces.mapper is not None
    assert mapper_for(toonfaces, "green lipstick") is not toonfaces.mapper


def test_a_missing_file_is_an_error(domain, recipe):
    with pytest.raises(ValueError, match="does not exist"):
        render(domain, replace(recipe, mapper="/no/where.safetensors"))


def test_the_cells_reproduce_their_pictures_to_the_bit(toonfaces, tmp_path):
    photo = str(tmp_path / "photo.pt")
    torch.save(toonfaces.latents(1, "test", 77), photo)
    file = str(DATA / "toonfaces" / "mappers" / "green-lipstick.safetensors")
    both = "green lipstick + purple eyebrows"
    examples = [
        Recipe(),
        Recipe(strength=-0.7, faces=(5, 2, 11), region="lipstick"),
        Recipe(mapper=file, faces=(1, photo)),
        Recipe(prompt=both, layers=(0.0,) * 8 + (0.3, 1.7), region=(0.1, 0.5, 0.9, 1.0)),
    ]
    cells = [
        one.code() + f"torch.save(images, {str(tmp_path / f'{i}.pt')!r})\n" for i, one in enumerate(examples)
    ]
    command = [sys.executable, "-c", "\n".join(cells)]
    subprocess.run(command, check=True, timeout=600)  # a new process: nothing of this one helps it
    for i, one in enumerate(examples):
        assert torch.equal(torch.load(tmp_path / f"{i}.pt"), render(toonfaces, one)), one
