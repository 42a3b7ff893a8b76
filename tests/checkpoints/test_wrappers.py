"""Networks under any key and prefix; every tensor of a file is used, or the file is refused by its name."""

from collections import OrderedDict

import official
import pytest
import torch
from official import assert_same, save
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from cfclip.checkpoints import weights
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.networks import load_e4e, load_identity, load_vgg
from cfclip.checkpoints.weights import WeightsError
from cfclip.cli import app
from cfclip.models.arcface import IRSE
from cfclip.models.e4e import Encoder4Editing
from cfclip.models.mapper import Mapper
from cfclip.models.stylegan2 import Generator
from cfclip.models.vgg import VGG19

PREFIXES = ["module.", "generator.", "G.", "model.G_ema.", "module.net.module."]
KEYS = [
    (),
    ("g_ema",),
    ("G_ema",),
    ("params_ema",),
    ("ema",),
    ("generator",),
    ("state_dict",),
    ("any", "depth"),
]
WRAPPERS = [(keys, "") for keys in KEYS] + [((), prefix) for prefix in PREFIXES]
WRAPPERS += [(("state_dict",), "G_ema."), (("params",), "module."), (("a", "b"), "net.")]


def wrap(state, keys=(), prefix=""):
    tree = OrderedDict((prefix + name, tensor) for name, tensor in state.items())
    for key in reversed(keys):
        tree = {key: tree, "iteration": 3, "optimizer": {"lr": 0.1, "state": {0: torch.zeros(2)}}}
    return tree


def small_generator() -> Generator:
    return official.random_generator(16, (6, 5, 4), conv_clamp=256)


def nvidia_state(g: Generator) -> dict:
    """``G_ema.state_dict()`` of NVIDIA's PyTorch network, written out."""
    out = {"synthesis.b4.const": g.const, "mapping.w_avg": g.w_avg}
    if g.c_dim:
        out |= {"mapping.embed.weight": g.embed.weight, "mapping.embed.bias": g.embed.bias}
    for i, layer in enumerate(g.style):
        out |= {f"mapping.fc{i}.weight": layer.weight, f"mapping.fc{i}.bias": layer.bias}
    for level, rgb in enumerate(g.rgbs):
        block = f"synthesis.b{4 << level}"
        convs = {"conv1": g.convs[2 * level]} | ({"conv0": g.convs[2 * level - 1]} if level else {})
        out[f"{block}.resample_filter"] = g.fir
        for name, layer in convs.items():
            out[f"{block}.{name}.resample_filter"] = g.fir
            out |= {
                f"{block}.{name}.{part}": getattr(layer, part) for part in ("noise_const", "noise_strength")
            }
        for name, layer in (convs | {"torgb": rgb}).items():
            out |= {f"{block}.{name}.{part}": getattr(layer, part) for part in ("weight", "bias")}
            out |= {
                f"{block}.{name}.affine.{part}": getattr(layer.affine, part) for part in ("weight", "bias")
            }
    return {name: tensor.detach().clone() for name, tensor in out.items()}


LAYOUTS = {"rosinality": official.rosinality, "nvidia": nvidia_state}


# ---- any key, any prefix --------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "prefix"), WRAPPERS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generator_is_found_under_any_key_and_prefix(layout, keys, prefix, tmp_path):
    g = small_generator()
    tree = wrap(LAYOUTS[layout](g), keys, prefix) | {"latent_avg": g.w_avg.clone()}
    if layout == "nvidia":
        del tree["latent_avg"]
    loaded = load_generator(save(tree, tmp_path / "g.pt"))
    assert_same(loaded, g)
    assert loaded.conv_clamp == (256 if layout == "nvidia" else None)


@pytest.mark.parametrize(("keys", "prefix"), WRAPPERS, ids=str)
@pytest.mark.parametrize("text_dim", [6, None])
def test_a_mapper_is_found_under_any_key_and_prefix(text_dim, keys, prefix, tmp_path):
    config = official.SMALL_MAPPER if text_dim else type(official.SMALL_MAPPER)(10, 8, None)
    m = Mapper(config).eval()
    tree = wrap(official.mapper_state(m), keys, prefix) | {"opts": {"stylegan_size": 64}}
    path = save(tree, tmp_path / "m.pt")
    assert_same(load_mapper(path), m)
    out = tmp_path / "m.safetensors"
    assert "a mapper" in CliRunner().invoke(app, ["convert", str(path), str(out)]).output
    assert_same(load_mapper(out), m)


@pytest.mark.parametrize(("keys", "prefix"), [((), "module."), (("state_dict",), "net."), (("model",), "")])
def test_frozen_networks_are_found_under_any_key_and_prefix(keys, prefix, tmp_path):
    for make, load in ((IRSE, load_identity), (VGG19, load_vgg), (lambda: Encoder4Editing(8), load_e4e)):
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
        average = shapes.pop("latent_avg", None)
        state = official.shared_views(shapes)
        inner = f"{prefix}encoder." if average else prefix
        tree = wrap(state, keys, inner) | ({"latent_avg": torch.full((512,), 2.0)} if average else {})
        loaded = load(save(tree, tmp_path / "n.pt"))
        loaded = getattr(loaded, "backbone", loaded).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
        assert average is None or (loaded["latent_avg"] == 2).all()


@pytest.mark.parametrize("names", [("g", "g_ema"), ("params", "params_ema"), ("G", "ema"), ("a", "netG_ema")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_moving_average_is_preferred(layout, names, tmp_path):
    plain, average = (LAYOUTS[layout](official.random_generator(seed=seed)) for seed in (0, 1))
    for tree in (
        {names[0]: plain, names[1]: average},
        {names[1]: average, names[0]: plain},
        {"state_dict": wrap(plain, prefix=f"{names[0]}.") | wrap(average, prefix=f"{names[1]}.")},
    ):
        loaded = load_generator(save(tree, tmp_path / "g.pt"))
        assert torch.equal(loaded.const, official.random_generator(seed=1).const)


def test_of_two_networks_none_is_chosen_silently(tmp_path):
    states = [official.rosinality(official.random_generator(seed=seed)) for seed in (0, 1)]
    for tree in (
        {"old": states[0], "new": states[1]},
        {"state_dict": wrap(states[0], prefix="old.") | wrap(states[1], prefix="new.")},
        {"old_ema": states[0], "new_ema": states[1]},
    ):
        with pytest.raises(WeightsError, match=r"2 networks where one is needed, at .*old.*new"):
            load_generator(save(tree, tmp_path / "g.pt"))
    both = states[0] | {f"module.{name}": tensor for name, tensor in states[1].items()}
    with pytest.raises(WeightsError, match=r"twice, with and without 'module\.'"):
        load_generator(save(both, tmp_path / "g.pt"))


def test_the_nearest_mean_latent_is_taken(tmp_path):
    g, near, far = small_generator(), torch.randn(8), torch.randn(8)
    state = official.rosinality(g)
    for tree, right in (
        ({"a": {"g_ema": state, "latent_avg": near}, "latent_avg": far}, near),
        ({"g_ema": state | {"mean_latent": near}, "latent_avg": far}, near),
        ({"g_ema": state, "mean_latent": near, "psp": {"latent_avg": far}}, near),
        ({"g_ema": state, "mean_latent": far, "latent_avg": near}, near),
        (wrap(state, prefix="G.") | {"G.latent_avg": near, "D.latent_avg": far}, near),
    ):
        assert torch.equal(load_generator(save(tree, tmp_path / "g.pt")).w_avg, right)
    tree = {"g_ema": state, "latent_avg": torch.randn(6, 8)}
    with pytest.raises(WeightsError, match="mean latent differs between layers"):
        load_generator(save(tree, tmp_path / "g.pt"))


LOADERS = {"generator": load_generator, "mapper": load_mapper, "identity": load_identity}
LOADERS |= {"vgg": load_vgg, "e4e": load_e4e}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_message_says_that_what_is_needed_is_there(loader, tmp_path):
    """Each network without its first tensor, which readers look for, and under wrappers."""
    for make in (IRSE, VGG19, lambda: Encoder4Editing(8)):
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
        check_message(LOADERS[loader], official.shared_views(shapes), tmp_path / "n.pt")
    for state in (nvidia_state(small_generator()), official.rosinality(small_generator())):
        check_message(LOADERS[loader], state, tmp_path / "n.pt")
    check_message(LOADERS[loader], official.mapper_state(Mapper(official.SMALL_MAPPER)), tmp_path / "n.pt")


def check_message(load, state, path):
    wanted = {
        "input.input",
        "synthesis.b4.const",
        "conv1_1.weight",
        "latlayer1.weight",
        "input_layer.0.weight",
    }
    state = {name: t for name, t in state.items() if name not in wanted and "mapping.1.weight" not in name}
    for tree in (state, wrap(state, ("params_ema",), "module.")):
        with pytest.raises(WeightsError) as caught:
            load(save(tree, path))
        held, _, needed = str(caught.value).partition("it holds ")[2].partition(", but ")
        assert not held or held not in needed, caught.value


@pytest.mark.parametrize("key", ["G_ema", "G", "ema", "generator"])
def test_a_pickled_network_is_found_under_any_key(key, tmp_path):
    g = small_generator()
    assert_same(load_generator(official.nvidia(g, tmp_path / "g.pkl", key=key)), g)


# ---- every tensor is used -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_filter_that_differs_is_named(layout, tmp_path):
    g = small_generator()
    state = LAYOUTS[layout](g)
    other = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1]))
    used = [name for name in state if name.endswith(("kernel", "resample_filter"))]
    if layout == "nvidia":  # 4 x 4 and conv1 do not resample
        used = [name for name in used if ".b4." not in name and ".conv1." not in name]
    assert len(used) == 4
    for name in used:
        gain = float(state[name].sum())
        for changed in (other / 16 * gain, state[name].flip(0) + torch.eye(4) * 0.1, state[name] * 2):
            with pytest.raises(WeightsError, match=rf"{name}.*(differ|sum)|filters .*{name} differ"):
                load_generator(save(state | {name: changed}, tmp_path / "g.pt"))
    new = {name: other / 16 * float(state[name].sum()) for name in used}
    loaded = load_generator(save(state | new, tmp_path / "g.pt"))
    assert torch.equal(loaded.fir, other / 16)
    with pytest.raises(WeightsError, match=r"has the sum 8, but needs 4|has the sum 2, but needs 1"):
        load_generator(save(state | {name: state[name] * 2 for name in used}, tmp_path / "g.pt"))


ROSINALITY_EXTRA = ["convs.4.conv.weight", "convs.9.activate.bias", "to_rgb1.scale", "attention.weight"]
ROSINALITY_EXTRA += ["style.4.bias", "noises.noise_7"]
NVIDIA_EXTRA = [
    "synthesis.b32.conv0.weight",
    "synthesis.b8.skip2.weight",
    "mapping.fc3.bias",
    "decoder.weight",
]


@pytest.mark.parametrize(
    ("layout", "name"),
    [("rosinality", name) for name in ROSINALITY_EXTRA] + [("nvidia", name) for name in NVIDIA_EXTRA],
)
def test_a_tensor_that_would_be_dropped_is_named(layout, name, tmp_path):
    state = LAYOUTS[layout](small_generator()) | {name: torch.zeros(3)}
    with pytest.raises(WeightsError, match=rf"does not use \({name}\)"):
        load_generator(save({"g_ema": state}, tmp_path / "g.pt"))


def test_a_level_without_its_first_layer_is_not_dropped(tmp_path):
    state = official.mapper_state(Mapper(official.SMALL_MAPPER))
    for theirs in ("course", "medium", "fine"):
        name = f"mapper.{theirs}_mapping.mapping.1.weight"
        with pytest.raises(WeightsError, match=f"it has no {name}"):
            load_mapper(save({key: t for key, t in state.items() if key != name}, tmp_path / "m.pt"))


def test_other_networks_in_nvidias_layout_say_what_they_are(tmp_path):
    state = nvidia_state(small_generator())
    const = state["synthesis.b4.const"]
    for message, changed in (
        (
            "conditional generator .* without mapping.embed.bias",
            state | {"mapping.embed.weight": torch.zeros(8, 3)},
        ),
        ("StyleGAN3 .alias-free. generator", {"synthesis.input.weight": torch.zeros(3, 3)}),
        ("another architecture", state | {"synthesis.b8.skip.weight": torch.zeros(3)}),
        (
            "constant is 4 high and 8 wide.*only square",
            state | {"synthesis.b4.const": torch.cat([const, const], 2)},
        ),
        ("no mapping network", {name: t for name, t in state.items() if not name.startswith("mapping.fc")}),
        (
            "no synthesis.b8.torgb.bias",
            {name: t for name, t in state.items() if name != "synthesis.b8.torgb.bias"},
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            load_generator(save(changed, tmp_path / "g.pt"))


# ---- weights are finite floats --------------------------------------------------------------------

BAD = {
    "nan": lambda t: t.masked_fill(torch.arange(t.numel()).reshape(t.shape) == 1, float("nan")),
    "infinity": lambda t: t.masked_fill(
        torch.arange(t.numel()).reshape(t.shape) == t.numel() - 1, -float("inf")
    ),
    "beyond float32": lambda t: t.double() + 1e300,
    "integers": lambda t: t.long(),
    "bytes": lambda t: t.byte(),
    "truth": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
}
WORDS = r"not all finite|numbers of type torch\.(int64|uint8|bool|complex64)|holds no numbers"


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_weight_of_an_official_file_is_named(bad, tmp_path):
    m = official.mapper_state(Mapper(official.SMALL_MAPPER))
    rosinality, nvidia = official.rosinality(small_generator()), nvidia_state(small_generator())
    for load, state, names in (
        (load_generator, rosinality, ["input.input", "convs.1.conv.weight", "style.2.bias"]),
        (load_generator, rosinality, ["noises.noise_1", "to_rgbs.0.upsample.kernel"]),
        (load_generator, rosinality, ["to_rgb1.conv.modulation.bias"]),
        (load_generator, nvidia, ["mapping.w_avg", "synthesis.b8.conv0.affine.weight"]),
        (load_mapper, m, ["mapper.fc.bias", "text_mapper.mapper_3.mapping.2.weight"]),
    ):
        for name in names:
            tree = wrap(state | {name: BAD[bad](state[name])}, ("state_dict",), "module.")
            with pytest.raises(WeightsError, match=rf"its {name} .*({WORDS})"):
                load(save(tree, tmp_path / "x.pt"))
    tree = {"g_ema": rosinality, "latent_avg": BAD[bad](torch.ones(8))}
    with pytest.raises(WeightsError, match=rf"its mean latent .*({WORDS})"):
        load_generator(save(tree, tmp_path / "x.pt"))


@pytest.mark.parametrize("bad", [name for name in BAD if name not in ("meta", "beyond float32")])
def test_a_bad_weight_of_a_frozen_network_or_of_ours_is_named(bad, tmp_path):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in VGG19().state_dict().items()}
    state = official.shared_views(shapes)
    name = "conv2_1.bias"
    with pytest.raises(WeightsError, match=rf"its {name} .*({WORDS})"):
        load_vgg(save(state | {name: BAD[bad](state[name])}, tmp_path / "vgg.pth"))
    g, path = small_generator(), tmp_path / "g.safetensors"
    weights.save(g, path, "generator", g.config)
    with safe_open(path, "pt") as file:  # our own writer refuses such weights, so another program writes them
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"w_avg": BAD[bad](tensors["w_avg"])}, path, metadata=metadata)
    with pytest.raises(WeightsError, match=rf"its w_avg .*({WORDS})"):
        load_generator(path)


def test_half_and_double_precision_are_floats(tmp_path):
    g = small_generator()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for make in LAYOUTS.values():
            state = {name: tensor.to(dtype) for name, tensor in make(g).items()}
            loaded = load_generator(save({"ema": state}, tmp_path / "g.pt"))
            assert loaded.const.dtype == torch.float32
            torch.testing.assert_close(loaded.const, g.const, rtol=1e-2, atol=1e-2)
