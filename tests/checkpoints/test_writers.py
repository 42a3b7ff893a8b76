"""Generators written for the code of others: named and shaped as theirs, and the same pictures when read."""

import signal
import subprocess
import sys
import time
import warnings

import official
import pytest
import torch
from golden_files import SETS, SHARED, golden, golden_path, rel
from test_wrappers import nvidia_state
from typer.testing import CliRunner

from cfclip.checkpoints import safe_pickle, values, weights
from cfclip.checkpoints.convert import convert
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.weights import WeightsError
from cfclip.cli import app
from cfclip.models.mapper import Mapper

PLACES = {"rosinality": "g_ema", "nvidia": "G_ema"}


def read(path):
    return torch.load(path, weights_only=True)


def quiet_convert(*args, **kwargs):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        convert(*args, **kwargs)
    return [str(note.message) for note in notes]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape and torch.equal(ours[name], tensor), name


def golden_network(path) -> tuple[dict, dict]:
    """Tensors of the golden pickle's ``G_ema`` under their dotted names, and what it was constructed with."""
    with path.open("rb") as file:
        network = safe_pickle.load(file)["G_ema"]
    tensors = {}

    def collect(module, prefix):
        for kind in ("_parameters", "_buffers"):
            found = module.state[kind].items()
            tensors.update({prefix + k: values.to_tensor(v) for k, v in found if v is not None})
        for name, child in module.state["_modules"].items():
            collect(child, f"{prefix}{name}.")

    collect(network, "")
    return tensors, network.state["_init_kwargs"]


# ---- as the goldens -------------------------------------------------------------------------------


def test_rosinalitys_layout_is_that_of_the_golden(tmp_path):
    theirs = golden("gen64.pt")
    assert convert(SHARED / "gen64.pt", tmp_path / "g.safetensors") == "generator"
    assert not quiet_convert(tmp_path / "g.safetensors", tmp_path / "g.pt", layout="rosinality")
    ours = read(tmp_path / "g.pt")
    assert ours.keys() == theirs.keys() and torch.equal(ours["latent_avg"], theirs["latent_avg"])
    assert_equal(ours["g_ema"], theirs["g_ema"])


@pytest.mark.parametrize("folder", SETS.values(), ids=SETS)
def test_nvidias_layout_is_that_of_the_golden(folder, tmp_path):
    path = golden_path(folder, "nvidia64.pkl", tmp_path)
    theirs, built = golden_network(path)
    assert convert(path, tmp_path / "g.safetensors") == "generator"
    assert not quiet_convert(tmp_path / "g.safetensors", tmp_path / "g.pt", layout="nvidia")
    ours = read(tmp_path / "g.pt")
    assert_equal(ours["G_ema"], theirs)
    init = ours["init_kwargs"]
    assert init["mapping_kwargs"] == {"num_layers": built["mapping_kwargs"].get("num_layers")}
    flat = {name: value for name, value in init.items() if not name.endswith("kwargs")}
    flat |= {name: value for name, value in init["synthesis_kwargs"].items() if name != "num_fp16_res"}
    assert flat == {name: built[name] for name in flat} and len(flat) == 8


@pytest.mark.parametrize("folder", SETS.values(), ids=SETS)
@pytest.mark.parametrize("layout", PLACES)
@torch.no_grad()
def test_the_goldens_pictures_survive_every_layout(layout, folder, tmp_path):
    for name in ("nvidia64.pkl", "nvidia64_tf_legacy.pkl"):
        path = golden_path(folder, name, tmp_path)
        wanted = golden(name.replace(".pkl", "_outputs.pt"), folder)
        quiet_convert(path, tmp_path / "g.pt", layout=layout)
        g = load_generator(tmp_path / "g.pt")
        if "z" in wanted:  # the committed ones are cut
            assert rel(g(wanted["z"]), wanted["img"]) < 5e-6
            assert rel(g(wanted["z"], 0.7), wanted["img_trunc07"]) < 5e-6
        if "wplus" in wanted:
            assert rel(g.synthesis(wanted["wplus"]), wanted["img_wplus"]) < 5e-6
        assert torch.equal(g.w_avg, wanted["w_avg"])


# ---- as their constructors, for all arguments ----


def nvidia_shapes(
    z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs, synthesis_kwargs
) -> dict:
    """name -> shape in ``Generator(…).state_dict()`` of NVIDIA's code."""
    out = {"mapping.w_avg": (w_dim,), "synthesis.b4.const": None}

    def linear(name, in_dim, out_dim):
        out[f"{name}.weight"], out[f"{name}.bias"] = (out_dim, in_dim), (out_dim,)

    if c_dim:
        linear("mapping.embed", c_dim, w_dim)
    for i in range(mapping_kwargs["num_layers"]):
        linear(f"mapping.fc{i}", w_dim if i else z_dim + (w_dim if c_dim else 0), w_dim)
    size, before = 4, None
    taps = len(synthesis_kwargs.get("resample_filter", [1, 3, 3, 1]))
    while size <= img_resolution:
        width = min(synthesis_kwargs["channel_base"] // size, synthesis_kwargs["channel_max"])
        out[f"synthesis.b{size}.resample_filter"] = taps, taps
        layers = {"conv0": (before, width, 3)} if before else {}
        layers |= {"conv1": (width, width, 3), "torgb": (width, img_channels, 1)}
        for name, (inner, outer, kernel) in layers.items():
            layer = f"synthesis.b{size}.{name}"
            out[f"{layer}.weight"], out[f"{layer}.bias"] = (outer, inner, kernel, kernel), (outer,)
            linear(f"{layer}.affine", w_dim, inner)
            if name != "torgb":
                out[f"{layer}.noise_const"], out[f"{layer}.noise_strength"] = (size, size), ()
                out[f"{layer}.resample_filter"] = (taps, taps) if name == "conv0" else (4, 4)
        if before is None:
            out["synthesis.b4.const"] = width, 4, 4
        size, before = 2 * size, width
    return out


def shapes(state) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_nvidias_constructor_makes_the_tensors_that_are_written(tmp_path):
    """The test's own table of names is held to the golden first."""
    theirs, built = golden_network(golden_path(SETS["committed"], "nvidia64.pkl", tmp_path))
    names = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
    synthesis = {name: built[name] for name in ("channel_base", "channel_max")}
    mapping = {"num_layers": built["mapping_kwargs"].get("num_layers")}
    args = {name: built[name] for name in names} | {"mapping_kwargs": mapping, "synthesis_kwargs": synthesis}
    assert nvidia_shapes(**args) == shapes(theirs)
    for change in GENERATORS.values():
        g = official.random_generator(32, (16, 16, 12, 6), mapping_layers=2, **change)
        weights.save(g, tmp_path / "g.safetensors", "generator", g.config)
        assert not quiet_convert(tmp_path / "g.safetensors", tmp_path / "g.pt", layout="nvidia")
        saved = read(tmp_path / "g.pt")
        assert nvidia_shapes(**saved["init_kwargs"]) == shapes(saved["G_ema"])
        taps = torch.tensor(saved["init_kwargs"]["synthesis_kwargs"].get("resample_filter", g.fir.tolist()))
        assert torch.equal(taps, g.fir)


# ---- any generator --------------------------------------------------------------------------------

GENERATORS = {
    "plain": {},
    "clamped": {"conv_clamp": 256},
    "another clamp": {"conv_clamp": 1.5},
    "another filter": {"fir": [1.0, 2.0, 5.0, 4.0, 2.0, 1.0]},
    "narrow z": {"z_dim": 6},
    "classes": {"c_dim": 5, "z_dim": 6},
}


@pytest.mark.parametrize("change", GENERATORS.values(), ids=GENERATORS)
@pytest.mark.parametrize("layout", PLACES)
@torch.no_grad()
def test_any_generator_draws_the_same_pictures_after_a_round_trip(layout, change, tmp_path):
    g = official.random_generator(16, (6, 5, 4), **change)
    weights.save(g, tmp_path / "g.safetensors", "generator", g.config)
    label = {"label": 3} if g.c_dim and layout == "rosinality" else {}
    quiet_convert(tmp_path / "g.safetensors", tmp_path / "g.pt", layout=layout, **label)
    state = read(tmp_path / "g.pt")[PLACES[layout]]
    if not label:  # as the tests' own writers lay it out
        theirs = official.rosinality(g) if layout == "rosinality" else nvidia_state(g)
        unused = [name for name in theirs if name.endswith("conv1.resample_filter")]
        assert all(state[name].shape == (4, 4) for name in unused)
        assert_equal(state | {name: theirs[name] for name in unused}, theirs)
    loaded, z = load_generator(tmp_path / "g.pt"), torch.randn(3, g.z_dim)
    assert loaded.conv_clamp == (g.conv_clamp if layout == "nvidia" else None)
    loaded.conv_clamp = g.conv_clamp
    c = 3 if g.c_dim else None
    for psi in (1.0, 0.6):
        torch.testing.assert_close(
            loaded(z, psi, c=None if label else c), g(z, psi, c=c), rtol=1e-5, atol=2e-5
        )


@torch.no_grad()
def test_one_class_becomes_a_generator_without_classes(tmp_path):
    g = official.random_generator(16, (6, 5, 4), c_dim=5, z_dim=6)
    official.nvidia(g, tmp_path / "g.pkl")
    for label in (0, 4):
        for layout, name in (("cfclip", "g.safetensors"), ("nvidia", "g.pt")):
            quiet_convert(tmp_path / "g.pkl", tmp_path / name, layout=layout, label=label)
            alone, z = load_generator(tmp_path / name), torch.randn(3, 6)
            assert alone.c_dim == 0
            torch.testing.assert_close(alone.mapping(z), g.mapping(z, c=label), rtol=1e-5, atol=1e-5)
    assert weights.read_header(tmp_path / "g.safetensors").card["label"] == 4


def test_what_a_layout_has_no_place_for_is_said(tmp_path):
    g = official.random_generator(16, (6, 5, 4), conv_clamp=256, fir=[1.0, 2.0, 1.0], z_dim=6)
    weights.save(g, tmp_path / "g.safetensors", "generator", g.config)
    clamp, widths, taps = quiet_convert(tmp_path / "g.safetensors", tmp_path / "r.pt", layout="rosinality")
    assert "r.pt: it has no place for the limit of 256" in clamp
    assert "change its table to z of 6, w of 8 and channels [6, 5, 4]" in widths
    assert "blur_kernel of 3 numbers" in taps
    (widths,) = quiet_convert(tmp_path / "g.safetensors", tmp_path / "n.pt", layout="nvidia")
    assert "no channel_base of NVIDIA's Generator gives the widths [6, 5, 4]" in widths
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "g.safetensors"), str(tmp_path / "n.pt"), "--layout", "nvidia"]
    )
    assert result.exit_code == 0 and f"note: {widths}" in result.output and "a generator" in result.output


@pytest.mark.parametrize(
    ("channels", "base", "widest"),
    [((8, 8, 4), 64, 8), ((8, 8, 8), 128, 8), ((512, 512, 512, 300), 9600, 512), ((7, 3, 1), 28, 7)],
)
def test_nvidias_channel_base_gives_the_widths(channels, base, widest, tmp_path):
    g = official.random_generator(4 * 2 ** (len(channels) - 1), channels)
    weights.save(g, tmp_path / "g.safetensors", "generator", g.config)
    assert not quiet_convert(tmp_path / "g.safetensors", tmp_path / "n.pt", layout="nvidia")
    init = read(tmp_path / "n.pt")["init_kwargs"]["synthesis_kwargs"]
    assert (init["channel_base"], init["channel_max"]) == (base, widest)
    table = [min(base // (4 << level), widest) for level in range(len(channels))]  # NVIDIA's rule
    assert table == list(channels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("g.pkl o.pt", "must end in .safetensors, .* layouts rosinality and nvidia .--layout. are .pt"),
        ("g.pkl o.pkl --layout nvidia", r"o\.pkl must end in \.pt"),
        ("g.pkl o.safetensors --layout rosinality", r"o\.safetensors must end in \.pt"),
        ("g.pkl o.pt --layout tensorflow", "layout must be one of cfclip, rosinality, nvidia"),
        ("g.pkl o.pt --layout rosinality", r"g\.pkl cannot be converted: .* 5 classes: .*--label"),
        ("g.pkl o.pt --layout nvidia --label 5", r"g\.pkl cannot be converted: .* one of 0 to 4, not 5"),
        ("plain.pkl o.safetensors --label 0", r"plain\.pkl cannot be converted: .* has no classes"),
        ("m.safetensors o.pt --layout nvidia", r"m\.safetensors holds a mapper, .*--kind generator"),
        ("m.safetensors o.safetensors --label 1", r"m\.safetensors holds a mapper, but a label is for"),
        ("in.pt in.pt --layout nvidia", "is the input itself"),
    ],
)
def test_what_cannot_be_written_is_named_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, mapper = official.random_generator(), Mapper(official.SMALL_MAPPER)
    official.nvidia(official.random_generator(c_dim=5), "g.pkl")
    official.nvidia(plain, "plain.pkl")
    weights.save(mapper, "m.safetensors", "mapper", mapper.metadata)
    torch.save(nvidia_state(plain), "in.pt")
    before = (tmp_path / "in.pt").read_bytes()
    result = CliRunner().invoke(app, ["convert", *words.split()])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(str(result.exception))
    assert "\n" not in str(result.exception) and not list(tmp_path.glob("o.*"))
    assert (tmp_path / "in.pt").read_bytes() == before


@pytest.mark.parametrize("clamp", ["256", float("nan"), -1.0, True, 0, [1.0]])
def test_a_clamp_beside_nvidias_tensors_is_checked(clamp, tmp_path):
    tree = {"G_ema": nvidia_state(official.random_generator())}
    torch.save(tree | {"init_kwargs": {"synthesis_kwargs": {"conv_clamp": clamp}}}, tmp_path / "g.pt")
    with pytest.raises(WeightsError, match=r"g\.pt cannot be used: its conv_clamp must be a finite number"):
        load_generator(tmp_path / "g.pt")


# ---- kill -9 --------------------------------------------------------------------------------------

AGAIN_AND_AGAIN = """
import sys
from cfclip.checkpoints.convert import convert
while True:
    convert(sys.argv[1], sys.argv[2], layout=sys.argv[3])
    print("written", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("layout", ["cfclip", *PLACES])
def test_a_killed_conversion_leaves_a_whole_file(layout, tmp_path):
    """Killed while it rewrites the file again and again: what is there opens, and is the generator."""
    g = official.random_generator(32, (64, 64, 64, 64), z_dim=64, w_dim=64)
    source = weights.save(g, tmp_path / "g.safetensors", "generator", g.config)
    out = tmp_path / "out" / ("o.safetensors" if layout == "cfclip" else "o.pt")
    for moment in range(3):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", AGAIN_AND_AGAIN, source, out, layout],
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout.readline() == b"written\n"
            time.sleep(0.013 * moment)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert torch.equal(load_generator(out).const, g.const)
    quiet_convert(source, out, layout=layout)
    assert torch.equal(load_generator(out).const, g.const)
