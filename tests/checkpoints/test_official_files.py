"""Official files of any size load; a file that cannot load says why."""

import argparse
import time
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from golden_files import rel
from official import assert_same, save
from safetensors.torch import save_file

from cfclip.checkpoints import weights
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.latents import load_latents
from cfclip.checkpoints.mappers import load_mapper, save_mapper
from cfclip.checkpoints.networks import load_e4e, load_identity, load_lpips, load_vgg
from cfclip.checkpoints.weights import WeightsError
from cfclip.models.arcface import IRSE
from cfclip.models.e4e import Encoder4Editing
from cfclip.models.mapper import Mapper, MapperConfig

# ---- every format, at other sizes and configurations ----------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [(8, (6, 4)), (32, (5, 6, 7, 3))], ids=["8px", "32px"])
def test_a_generator_is_the_same_from_every_format(size, protocol, tmp_path):
    clamp = {"conv_clamp": 256} if protocol == 3 else {}
    g = official.random_generator(*size, mapping_layers=protocol, **clamp)
    tree = {"g_ema": official.rosinality(g), "latent_avg": g.w_avg}
    clamped = [
        official.nvidia(g, tmp_path / "a.pkl", protocol),
        official.tensorflow(g, tmp_path / "b.pkl", protocol, **clamp),
        weights.save(g, tmp_path / "e.safetensors", "generator", g.config),
    ]
    for path in (*clamped, save(tree, tmp_path / "c.pt"), save(tree, tmp_path / "d.pt", zipped=False)):
        loaded = load_generator(path)
        assert_same(loaded, g)
        assert loaded.conv_clamp == (g.conv_clamp if path in clamped else None)


@torch.no_grad()
def test_other_filters_and_multipliers_are_read(tmp_path):
    taps = [1.0, 2.0, 5.0, 4.0, 2.0, 1.0]
    g = official.random_generator(16, (6, 5, 4), fir=taps)
    z = torch.randn(2, 8)
    one_dim = torch.tensor(taps) / sum(taps)  # NVIDIA keeps long filters separable
    changed = {"resample_kernel": [1, 2, 5, 4, 2, 1], "mapping_lrmul": 1.0, "lr_mul": 1.0}
    for path in (
        official.nvidia(g, tmp_path / "a.pkl", lr_mul=0.1),
        official.nvidia(g, tmp_path / "b.pkl", filter_1d=one_dim),
        official.tensorflow(g, tmp_path / "c.pkl", **changed),
    ):
        torch.testing.assert_close(load_generator(path)(z), g(z), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_variant_of_rosinalitys_files_loads(tmp_path):
    g = official.random_generator()
    state = official.rosinality(g)
    for name, tree in {
        "g": {"g": state, "d": {"x": torch.zeros(1)}, "args": argparse.Namespace(size=8)},
        "bare": state,
        "parallel": {"g_ema": {f"module.{k}": v for k, v in state.items()}},
        "half": {"g_ema": {k: v.half() for k, v in state.items()}},
        "no noise": {"g_ema": {k: v for k, v in state.items() if not k.startswith("noises")}},
        "no kernels": {"g_ema": official.rosinality(g, kernels=False)},
    }.items():
        loaded = load_generator(save(tree, tmp_path / f"{name}.pt"))
        assert loaded.convs[0].weight.dtype == torch.float32
        assert not any(p.requires_grad for p in loaded.parameters())
        torch.testing.assert_close(loaded.convs[1].weight, g.convs[1].weight, rtol=1e-3, atol=1e-3)
        assert torch.isfinite(loaded(torch.randn(1, 8))).all()
    # no latent_avg: the mean w of seeded z, the same each time, close to the mean of others
    bare, again = load_generator(tmp_path / "bare.pt"), load_generator(tmp_path / "bare.pt")
    assert torch.equal(bare.w_avg, again.w_avg)
    w = g.map_one(torch.randn(8192, 8))
    assert ((bare.w_avg - w.mean(0)).abs() < 6 * w.std(0) / 4096**0.5).all()
    repeated = save({"g_ema": state, "latent_avg": g.w_avg.repeat(4, 1)}, tmp_path / "repeated.pt")
    assert torch.equal(load_generator(repeated).w_avg, g.w_avg)


@torch.no_grad()
def test_a_network_trained_without_noise_loads(tmp_path):
    g = official.random_generator()
    for conv in g.convs:
        conv.noise_strength.zero_()
        conv.noise_const.zero_()
    names = [f"{layer}/noise_strength" for layer in ("4x4/Conv", "8x8/Conv0_up", "8x8/Conv1")]
    names += [f"noise{i}" for i in range(len(g.convs))]
    assert_same(load_generator(official.tensorflow(g, tmp_path / "g.pkl", drop=names)), g)


def test_loading_draws_no_random_numbers(tmp_path):
    path = save({"g_ema": official.rosinality(official.random_generator())}, tmp_path / "g.pt")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_generator(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("levels", [("coarse", "medium", "fine"), ("coarse",), ("medium", "fine")])
@pytest.mark.parametrize("text_dim", [6, None])
def test_mappers_of_all_kinds_load(levels, text_dim, tmp_path):
    m = Mapper(MapperConfig(num_ws=10, w_dim=8, text_dim=text_dim, levels=levels)).eval()
    state, path = official.mapper_state(m), tmp_path / "m.pt"
    decoder = {} if text_dim else {f"decoder.noises.noise_{i}": torch.zeros(1) for i in range(9)}
    for opts in ({"stylegan_size": 64}, argparse.Namespace(stylegan_size=64)):
        for extra in (decoder, {}):
            loaded = load_mapper(save({"state_dict": state | extra, "opts": opts}, path))
            assert loaded.config == m.config
            assert_same(loaded, m)
    assert load_mapper(save({"state_dict": state}, path)).config.num_ws == (10 if text_dim else 18)
    ours = load_mapper(weights.save(m, tmp_path / "m.safetensors", "mapper", m.metadata))
    assert ours.config == m.config
    assert_same(ours, m)


def test_a_saved_mapper_has_half_floats_and_its_card(tmp_path):
    m = Mapper(official.SMALL_MAPPER).eval()
    card = {"method": "cfclip", "domain": "tiny", "training": {"prompt": "green lipstick", "steps": 2}}
    path = save_mapper(m, tmp_path / "m.safetensors", **card)
    lists = {"levels": list(m.config.levels), "split": list(m.config.split)}  # as JSON has them
    assert weights.read_header(path) == ("mapper", m.metadata | lists, card)
    assert path.stat().st_size < 2.5 * sum(p.numel() for p in m.parameters()) + 8192
    assert_same(load_mapper(path), m.half().float())


def test_latents_load_from_every_format(tmp_path):
    g, w, w_plus = official.random_generator(), torch.randn(5, 8), torch.randn(5, 4, 8)
    one, repeated = save(w, tmp_path / "w.pt"), w[:, None].repeat(1, 4, 1)
    assert torch.equal(load_latents(one), w) and torch.equal(load_latents(one, g), repeated)
    assert torch.equal(load_latents(save(w[:, None], tmp_path / "w1.pt"), g), repeated)
    np.save(tmp_path / "p.npy", w_plus.double().numpy())
    save_file({"w": w_plus}, tmp_path / "p.safetensors")
    save(torch.nn.Parameter(w_plus), tmp_path / "p.pt")
    for name in ("p.pt", "p.npy", "p.safetensors"):
        for generator in (g, None):
            assert torch.equal(load_latents(tmp_path / name, generator), w_plus)
    assert load_latents(save({"latents": w_plus.half()}, tmp_path / "half.pt")).dtype == torch.float32
    assert load_latents(save(w[:, None].expand(5, 18, 8), tmp_path / "wide.pt")).shape == (5, 18, 8)


def test_latents_that_do_not_fit_say_why(tmp_path):
    g, w, path = official.random_generator(), torch.randn(5, 8), tmp_path / "bad.pt"
    advice = (
        r"bad.pt.* 18 layers \(those of a 1024 px generator\), but this 8 px generator takes 4.*w\[:, :4\]"
    )
    for codes, message in (
        (w[:, None].expand(5, 18, 8), advice),
        (torch.randn(5, 4, 12), "12 wide, but this generator's are 8"),
        (torch.zeros(3, 8, dtype=torch.int64), "latents are needed"),
        (torch.zeros(8), "latents are needed"),
        ({"a": w, "b": w}, "5 layers, but this 8 px generator takes 4"),
        (torch.zeros(0, 8), "latents are needed"),
        ([1, 2], "latents are needed"),
        (w * np.nan, "not all finite"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_latents(save(codes, path), g)
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(WeightsError, match="object"):
        load_latents(tmp_path / "object.npy")


@torch.no_grad()
def test_identity_networks_load_and_other_files_are_refused(tmp_path):
    shapes = {k: tuple(v.shape) for k, v in torch.nn.Module.state_dict(IRSE()).items()}
    f = load_identity(save(official.shared_views(shapes), tmp_path / "model_ir_se50.pth"))
    assert f.crop and not f.training and f.backbone.input_size == 112
    small = IRSE(32, ((16, 16, 1), (16, 32, 1)), 8)
    ours = load_identity(weights.save(small, tmp_path / "small.safetensors", "identity", small.metadata))
    assert not ours.crop and ours(torch.zeros(1, 3, 64, 64)).shape == (1, 8)
    path = save(official.rosinality(official.random_generator()), tmp_path / "g.pt")
    for load, wanted in ((load_identity, "model_ir_se50.pth"), (load_vgg, "vgg19_conv.pth")):
        with pytest.raises(WeightsError, match=f"holds a StyleGAN2 generator, but {wanted} is needed"):
            load(path)


@torch.no_grad()
def test_e4e_computes_what_its_parts_compute(tmp_path):
    with torch.device("meta"):
        parts = Encoder4Editing(8).state_dict()
    shapes = {f"encoder.{k}": tuple(v.shape) for k, v in parts.items() if k != "latent_avg"}
    assert "encoder.styles.7.convs.10.bias" in shapes and "encoder.body.23.res_layer.5.fc2.weight" in shapes
    average = torch.randn(512)
    opts = argparse.Namespace(encoder_type="Encoder4Editing", start_from_latent_avg=True)
    tree = {"state_dict": official.shared_views(shapes), "latent_avg": average.repeat(8, 1), "opts": opts}
    e = load_e4e(save(tree, tmp_path / "e4e.pt"))
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    w = e(image)
    stages = [e.input_layer(image)]
    for unit in e.body:
        stages.append(unit(stages[-1]))
    c1, c2, c3 = stages[7], stages[21], stages[24]  # the published encoder reads units 6, 20 and 23
    assert (c1.shape[1:], c2.shape[1:], c3.shape[1:]) == ((128, 64, 64), (256, 32, 32), (512, 16, 16))
    up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    p1 = up(c3) + e.latlayer1(c2)
    p2 = up(p1) + e.latlayer2(c1)
    base = e.styles[0](c3)
    torch.testing.assert_close(w[:, 0], base + average)
    for i, level in ((2, c3), (3, p1), (6, p1), (7, p2)):
        torch.testing.assert_close(w[:, i], base + e.styles[i](level) + average)
    with pytest.raises(ValueError, match="256"):
        e(torch.zeros(1, 3, 128, 128))
    opts.encoder_type = "GradualStyleEncoder"
    with pytest.raises(WeightsError, match=r"GradualStyleEncoder.*an e4e encoder .* is needed"):
        load_e4e(save(tree, tmp_path / "psp.pt"))


ALEXNET = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
ALEXNET |= {10: (256, 256, 3, 3)}
"""Index in torchvision's ``features`` -> shape of the convolution's weight."""


def test_lpips_gets_exactly_alexnets_tensors_without_torchs_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    hub = Path(torch.hub.get_dir())
    assert hub.is_relative_to(tmp_path)
    state = {f"features.{i}.weight": torch.randn(shape) for i, shape in ALEXNET.items()}
    state |= {f"features.{i}.bias": torch.randn(shape[0]) for i, shape in ALEXNET.items()}
    path = save(state | {"classifier.1.weight": torch.zeros(3)}, tmp_path / "alexnet.pth")
    before = torch.get_rng_state()
    network = load_lpips(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not hub.exists() and not (tmp_path / "home").exists()
    loaded = {name.partition(".")[2]: tensor for name, tensor in network.net.state_dict().items()}
    assert len(loaded) == len(state)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[f"features.{name}"]), name
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert network(x, x).abs().max() == 0 and (network(x, -x) > 0).all()
    for change, words in (
        ({"features.3.bias": torch.zeros(1)}, "size mismatch for bias"),
        ({"features.0.weight": None}, "but alexnet-owt-7be5be79.pth is needed"),
    ):
        bad = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(WeightsError, match=words):
            load_lpips(save(bad, tmp_path / "bad.pth"))


# ---- a file that cannot load says why -------------------------------------------------------------


def test_generators_that_cannot_be_used_say_why(tmp_path):
    g, path = official.random_generator(), tmp_path / "a.pkl"

    def refused(message, file):
        with pytest.raises(WeightsError, match=message) as caught:
            load_generator(file)
        assert str(file) in str(caught.value)

    grey = official.random_generator()
    for rgb in grey.rgbs:
        rgb.weight.data, rgb.bias.data = rgb.weight.data[:1], rgb.bias.data[:1]
    alias_free = {"input": official.Persistent("SynthesisInput", "")}
    for message, network, changes in (
        (r"conditional generator \(10 classes\) without mapping.embed.weight", g, {"c_dim": 10}),
        ("StyleGAN3", g, {"extra_modules": alias_free}),
        ("another architecture", g, {"architecture": "resnet"}),
        ("'G_ema' or .G, D, Gs. is needed", g, {"top": {"G": 1, "D": 2}}),
        ("1 channels.*only RGB", grey, {}),
    ):
        refused(message, official.nvidia(network, path, **changes))
    config_a = [("ToRGB_lod0/weight", np.zeros(3, np.float32))]
    larger = official.random_generator(16, (3, 4, 5))
    for message, network, changes in (
        (r"conditional generator \(5 classes\) without .*LabelEmbed", g, {"label_size": 5}),
        ("another architecture", g, {"architecture": "resnet"}),
        ("another architecture", g, {"extra": config_a}),
        ("from before StyleGAN2", g, {"version": 2, "drop": ["4x4/Conv/mod_weight"]}),
        ("activation is not a leaky ReLU", g, {"nonlinearity": "relu"}),
        ("no synthesis/4x4/ToRGB/weight", g, {"drop": ["4x4/ToRGB/weight"]}),
        ("without a gap", larger, {"drop": ["8x8/Conv1/weight"]}),
    ):
        refused(message, official.tensorflow(network, path, **changes))

    state = official.rosinality(g)
    wide = {"convs.1.conv.weight": torch.zeros(1, 9, 4, 3, 3)}
    for message, changed in (
        ("no convs.1.conv.weight: the file is incomplete", without(state, "convs.1.conv.weight")),
        ("no to_rgbs.0.bias: the file is incomplete", without(state, "to_rgbs.0.bias")),
        (r"convs.2.weight of shape \[9, 4, 3, 3\], but needs \[4, 4, 3, 3\]", state | wide),
        ("no mapping network", without(state, "style.")),
        ("without a gap", state | {f"to_rgbs.{10**9}.bias": torch.zeros(1)}),
    ):
        refused(message, save({"g_ema": changed}, tmp_path / "a.pt"))

    m = Mapper(official.SMALL_MAPPER)
    tree = {"state_dict": official.mapper_state(m)}
    refused("a CF-CLIP mapper, but a StyleGAN2 generator is needed", save(tree, tmp_path / "m.pt"))
    refused(r"a tensor of shape \[3, 18, 512\]", save(torch.zeros(3, 18, 512), tmp_path / "w.pt"))
    ours = tmp_path / "a.safetensors"
    refused("holds a mapper, but a generator is needed", weights.save(m, ours, "mapper", m.metadata))
    for message, change in (
        ("declares a size", {"mapping_layers": 10**9}),
        ("declares a size", {"resolution": 2**40}),
        ("declares a size", {"channels": [10**9, 4]}),
        ("needs 2 numbers of channels", {"channels": [4]}),
    ):
        refused(message, weights.save(g, ours, "generator", g.config | change))
    save_file({"a": torch.zeros(1)}, ours)
    refused("without cfclip's header", ours)


def without(state: dict, start: str) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith(start)}


def test_mappers_that_cannot_be_used_say_why(tmp_path):
    state = official.mapper_state(Mapper(official.SMALL_MAPPER))
    generator = {"g_ema": official.rosinality(official.random_generator())}
    missing = "text_mapper.mapper_3.mapping.2.bias"
    deep = {"mapper.fine_mapping.mapping.5.weight": torch.zeros(1)}
    for message, tree in (
        ("holds a StyleGAN2 generator, but a mapper is needed", generator),
        ("another type", {"state_dict": {"mapper.mapping.1.weight": torch.zeros(2, 2)}}),
        ("only one of", {"state_dict": without(state, "mapper.fc")}),
        (f"no {missing}", {"state_dict": without(state, missing)}),
        ("deeper", {"state_dict": state | deep}),
        (r"a saved torch\.nn\..*Linear: save plain tensors.*state_dict\(\)", torch.nn.Linear(2, 2)),
    ):
        with pytest.raises(WeightsError, match=message):
            load_mapper(save(tree, tmp_path / "m.pt"))


def test_what_else_a_checkpoint_holds_is_not_needed(tmp_path):
    m = Mapper(official.SMALL_MAPPER).eval()
    others = {"opts": {"x": np.float64(3)}, "more": Path, "other": torch.nn.Linear(2, 2), 7: {(1, 2): None}}
    for zipped in (True, False):
        tree = {"state_dict": official.mapper_state(m)} | others
        assert_same(load_mapper(save(tree, tmp_path / "m.pt", zipped)), m)


# ---- full size ------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_config_f_at_1024_px_loads_and_runs_from_each_format(tmp_path):
    """FFHQ's size: 1024², 30 million parameters, run once on the CPU."""
    channels = (512, 512, 512, 512, 512, 256, 128, 64, 32)
    g = official.random_generator(1024, channels, z_dim=512, w_dim=512, mapping_layers=8)
    z = torch.randn(1, 512)
    reference = g(z)
    for path in (
        save({"g_ema": official.rosinality(g), "latent_avg": g.w_avg}, tmp_path / "g.pt"),
        official.nvidia(g, tmp_path / "g.pkl"),
        official.tensorflow(g, tmp_path / "tf.pkl"),
        weights.save(g, tmp_path / "g.safetensors", "generator", g.config),
    ):
        start = time.perf_counter()
        loaded = load_generator(path)
        opened = time.perf_counter()
        assert loaded.num_ws == 18
        assert rel(loaded(z), reference) < 5e-6
        took = f"opened in {opened - start:.2f} s, one image in {time.perf_counter() - opened:.2f} s"
        print(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB, {took}")
