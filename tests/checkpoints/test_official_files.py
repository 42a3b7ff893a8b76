"""Official files load, whatever their size; what cannot load says why; nothing in a file ever runs."""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from golden_files import rel
from safetensors.torch import save_file

from cfclip.checkpoints import weights
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.latents import load_latents
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.networks import load_e4e, load_identity, load_vgg
from cfclip.checkpoints.weights import WeightsError
from cfclip.models.arcface import IRSE
from cfclip.models.e4e import Encoder4Editing
from cfclip.models.mapper import Mapper, MapperConfig


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- every format, at other sizes and configurations --------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [(8, (6, 4)), (32, (5, 6, 7, 3))], ids=["8px", "32px"])
def test_round_trips(size, protocol, tmp_path):
    g = official.random_generator(*size, conv_clamp=256 if protocol == 3 else None, mapping_layers=protocol)
    same(load_generator(official.nvidia(g, tmp_path / "a.pkl", protocol)), g)
    same(
        load_generator(
            official.tensorflow(
                g, tmp_path / "b.pkl", protocol, **{"conv_clamp": 256} if protocol == 3 else {}
            )
        ),
        g,
    )
    torch.save({"g_ema": official.rosinality(g), "latent_avg": g.w_avg}, tmp_path / "c.pt")
    same(load_generator(tmp_path / "c.pt"), g)
    torch.save(
        {"g_ema": official.rosinality(g), "latent_avg": g.w_avg},
        tmp_path / "d.pt",
        _use_new_zipfile_serialization=False,
    )
    same(load_generator(tmp_path / "d.pt"), g)
    again = load_generator(weights.save(g, tmp_path / "e.safetensors", "generator", g.config))
    same(again, g)
    assert {x.conv_clamp for x in (again, *(load_generator(tmp_path / f"{name}.pkl") for name in "ab"))} == {
        g.conv_clamp
    }


@torch.no_grad()
def test_other_filters_and_multipliers(tmp_path):
    taps = [1.0, 2.0, 5.0, 4.0, 2.0, 1.0]
    g = official.random_generator(16, (6, 5, 4), fir=taps)
    z = torch.randn(2, 8)
    one_dim = torch.tensor(taps) / sum(taps)  # NVIDIA keeps long filters separable
    for path in (
        official.nvidia(g, tmp_path / "a.pkl", lr_mul=0.1),
        official.nvidia(g, tmp_path / "b.pkl", filter_1d=one_dim),
        official.tensorflow(
            g, tmp_path / "c.pkl", resample_kernel=[1, 2, 5, 4, 2, 1], mapping_lrmul=1.0, lr_mul=1.0
        ),
    ):
        torch.testing.assert_close(load_generator(path)(z), g(z), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rosinality_variants(tmp_path):
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
        torch.save(tree, tmp_path / f"{name}.pt")
        loaded = load_generator(tmp_path / f"{name}.pt")
        assert loaded.convs[0].weight.dtype == torch.float32 and not any(
            p.requires_grad for p in loaded.parameters()
        )
        torch.testing.assert_close(loaded.convs[1].weight, g.convs[1].weight, rtol=1e-3, atol=1e-3)
        assert torch.isfinite(loaded(torch.randn(1, 8))).all()
    # no latent_avg: the mean w of seeded z, the same each time, close to the mean of others
    bare, again = load_generator(tmp_path / "bare.pt"), load_generator(tmp_path / "bare.pt")
    assert torch.equal(bare.w_avg, again.w_avg)
    w = g.map_one(torch.randn(8192, 8))
    assert ((bare.w_avg - w.mean(0)).abs() < 6 * w.std(0) / 4096**0.5).all()
    torch.save({"g_ema": state, "latent_avg": g.w_avg.repeat(4, 1)}, tmp_path / "repeated.pt")
    assert torch.equal(load_generator(tmp_path / "repeated.pt").w_avg, g.w_avg)


def test_loading_draws_no_random_numbers(tmp_path):
    torch.save({"g_ema": official.rosinality(official.random_generator())}, tmp_path / "g.pt")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_generator(tmp_path / "g.pt")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("levels", [("coarse", "medium", "fine"), ("coarse",), ("medium", "fine")])
@pytest.mark.parametrize("text_dim", [6, None])
def test_mappers(levels, text_dim, tmp_path):
    m = Mapper(MapperConfig(num_ws=10, w_dim=8, text_dim=text_dim, levels=levels)).eval()
    noises = {f"decoder.noises.noise_{i}": torch.zeros(1) for i in range(9)}
    for opts in ({"stylegan_size": 64}, argparse.Namespace(stylegan_size=64)):
        torch.save(
            {"state_dict": official.mapper_state(m) | ({} if text_dim else noises), "opts": opts},
            tmp_path / "m.pt",
        )
        loaded = load_mapper(tmp_path / "m.pt")
        assert loaded.config == m.config
        same(loaded, m)
    torch.save(
        {"state_dict": official.mapper_state(m), "opts": {"stylegan_size": 64}}, tmp_path / "no_decoder.pt"
    )
    assert load_mapper(tmp_path / "no_decoder.pt").config.num_ws == 10
    torch.save({"state_dict": official.mapper_state(m)}, tmp_path / "no_opts.pt")
    assert load_mapper(tmp_path / "no_opts.pt").config.num_ws == (10 if text_dim else 18)
    ours = load_mapper(weights.save(m, tmp_path / "m.safetensors", "mapper", m.metadata))
    assert ours.config == m.config
    same(ours, m)


def test_latents(tmp_path):
    g, w, w_plus = official.random_generator(), torch.randn(5, 8), torch.randn(5, 4, 8)
    torch.save(w, tmp_path / "w.pt")
    torch.save(torch.nn.Parameter(w_plus), tmp_path / "p.pt")
    torch.save({"latents": w_plus.half()}, tmp_path / "half.pt")
    torch.save(w[:, None].expand(5, 18, 8), tmp_path / "expanded.pt")
    np.save(tmp_path / "p.npy", w_plus.double().numpy())
    save_file({"w": w_plus}, tmp_path / "p.safetensors")
    assert torch.equal(load_latents(tmp_path / "w.pt"), w)
    assert torch.equal(load_latents(tmp_path / "w.pt", g), w[:, None].repeat(1, 4, 1))
    torch.save(w[:, None], tmp_path / "w1.pt")
    assert torch.equal(load_latents(tmp_path / "w1.pt", g), w[:, None].repeat(1, 4, 1))
    for name in ("p.pt", "p.npy", "p.safetensors"):
        assert torch.equal(load_latents(tmp_path / name, g), w_plus) and torch.equal(
            load_latents(tmp_path / name), w_plus
        )
    assert load_latents(tmp_path / "half.pt").dtype == torch.float32
    assert load_latents(tmp_path / "expanded.pt").shape == (5, 18, 8)
    advice = r"expanded.pt.* 18 layers \(they are of a 1024 px generator\), but this 8 px generator takes 4.*w\[:, :4\]"
    with pytest.raises(WeightsError, match=advice):
        load_latents(tmp_path / "expanded.pt", g)
    torch.save(torch.randn(5, 4, 12), tmp_path / "wide.pt")
    with pytest.raises(WeightsError, match="12 wide, but this generator's are 8"):
        load_latents(tmp_path / "wide.pt", g)
    for name, bad in {
        "ints": torch.zeros(3, 8, dtype=torch.int64),
        "flat": torch.zeros(8),
        "two": {"a": w, "b": w},
        "nan": w * np.nan,
        "none": torch.zeros(0, 8),
        "list": [1, 2],
    }.items():
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(
            WeightsError, match="not all finite" if name == "nan" else "where latents are needed"
        ):
            load_latents(tmp_path / "bad.pt")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(WeightsError, match="object"):
        load_latents(tmp_path / "object.npy")


@torch.no_grad()
def test_identity_vgg(tmp_path):
    shapes = {k: tuple(v.shape) for k, v in torch.nn.Module.state_dict(IRSE()).items()}
    torch.save(official.shared_views(shapes), tmp_path / "model_ir_se50.pth")
    f = load_identity(tmp_path / "model_ir_se50.pth")
    assert f.crop and not f.training and f.backbone.input_size == 112
    small = IRSE(32, ((16, 16, 1), (16, 32, 1)), 8)
    own = load_identity(weights.save(small, tmp_path / "small.safetensors", "identity", small.metadata))
    assert not own.crop and own(torch.zeros(1, 3, 64, 64)).shape == (1, 8)
    for load, error in (
        (load_identity, "where model_ir_se50.pth is needed"),
        (load_vgg, "where vgg19_conv.pth is needed"),
    ):
        torch.save(official.rosinality(official.random_generator()), tmp_path / "g.pt")
        with pytest.raises(WeightsError, match=f"holds a StyleGAN2 generator, {error}"):
            load(tmp_path / "g.pt")


@torch.no_grad()
def test_e4e(tmp_path):
    """The official layout; and what the heads compute, from the parts of the network."""
    with torch.device("meta"):
        shapes = {
            f"encoder.{k}": tuple(v.shape)
            for k, v in Encoder4Editing(8).state_dict().items()
            if k != "latent_avg"
        }
    assert "encoder.styles.7.convs.10.bias" in shapes and "encoder.body.23.res_layer.5.fc2.weight" in shapes
    average = torch.randn(512)
    tree = {
        "state_dict": official.shared_views(shapes),
        "latent_avg": average.repeat(8, 1),
        "opts": argparse.Namespace(encoder_type="Encoder4Editing", start_from_latent_avg=True),
    }
    torch.save(tree, tmp_path / "e4e.pt")
    e = load_e4e(tmp_path / "e4e.pt")
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
    tree["opts"].encoder_type = "GradualStyleEncoder"
    torch.save(tree, tmp_path / "psp.pt")
    with pytest.raises(WeightsError, match=r"GradualStyleEncoder.*where an e4e encoder is needed"):
        load_e4e(tmp_path / "psp.pt")


# ---- what cannot load says why ------------------------------------------------------------------------------------------


def test_wrong_generators(tmp_path):
    g = official.random_generator()

    def refused(message, path):
        with pytest.raises(WeightsError, match=message) as caught:
            load_generator(path)
        assert str(path) in str(caught.value)

    refused("conditional generator.*10 classes", official.nvidia(g, tmp_path / "a.pkl", c_dim=10))
    refused("conditional generator.*5 classes", official.tensorflow(g, tmp_path / "a.pkl", label_size=5))
    refused(
        "StyleGAN3",
        official.nvidia(
            g, tmp_path / "a.pkl", extra_modules={"input": official.Persistent("SynthesisInput", "")}
        ),
    )
    refused("another architecture", official.nvidia(g, tmp_path / "a.pkl", architecture="resnet"))
    refused("another architecture", official.tensorflow(g, tmp_path / "a.pkl", architecture="resnet"))
    refused(
        "another architecture",
        official.tensorflow(g, tmp_path / "a.pkl", extra=[("ToRGB_lod0/weight", np.zeros(3, np.float32))]),
    )
    refused(
        "from before StyleGAN2",
        official.tensorflow(g, tmp_path / "a.pkl", version=2, drop=["4x4/Conv/mod_weight"]),
    )
    refused("activation is no leaky ReLU", official.tensorflow(g, tmp_path / "a.pkl", nonlinearity="relu"))
    refused("'G_ema' or .G, D, Gs. is needed", official.nvidia(g, tmp_path / "a.pkl", top={"G": 1, "D": 2}))
    refused(
        "no 4x4/ToRGB/weight|no synthesis/4x4/ToRGB/weight",
        official.tensorflow(g, tmp_path / "a.pkl", drop=["4x4/ToRGB/weight"]),
    )
    refused(
        "without a gap",
        official.tensorflow(
            official.random_generator(16, (3, 4, 5)), tmp_path / "a.pkl", drop=["8x8/Conv1/weight"]
        ),
    )
    grey = official.random_generator()
    for rgb in grey.rgbs:
        rgb.weight.data, rgb.bias.data = rgb.weight.data[:1], rgb.bias.data[:1]
    refused("1 channels.*only RGB", official.nvidia(grey, tmp_path / "a.pkl"))

    def refused_state(message, change):
        state = official.rosinality(g)
        change(state)
        torch.save({"g_ema": state}, tmp_path / "a.pt")
        refused(message, tmp_path / "a.pt")

    refused_state("no convs.1.conv.weight: the file is incomplete", lambda s: s.pop("convs.1.conv.weight"))
    refused_state(
        r"convs.2.weight of shape \[9, 4, 3, 3\], where \[4, 4, 3, 3\]",
        lambda s: s.update({"convs.1.conv.weight": torch.zeros(1, 9, 4, 3, 3)}),
    )
    refused_state("no mapping network", lambda s: [s.pop(k) for k in list(s) if k.startswith("style.")])
    torch.save({"state_dict": official.mapper_state(Mapper(official.SMALL_MAPPER))}, tmp_path / "m.pt")
    refused("a CF-CLIP mapper, where a StyleGAN2 generator is needed", tmp_path / "m.pt")
    torch.save(torch.zeros(3, 18, 512), tmp_path / "w.pt")
    refused(r"a tensor of shape \[3, 18, 512\]", tmp_path / "w.pt")
    m = Mapper(official.SMALL_MAPPER)
    refused(
        "holds a mapper, where a generator is needed",
        weights.save(m, tmp_path / "m.safetensors", "mapper", m.metadata),
    )
    for config in (
        g.config | {"mapping_layers": 10**9},
        g.config | {"resolution": 2**40},
        g.config | {"channels": [10**9, 4]},
    ):
        refused("declares a size", weights.save(g, tmp_path / "absurd.safetensors", "generator", config))
    refused(
        "channel counts",
        weights.save(g, tmp_path / "short.safetensors", "generator", g.config | {"channels": [4]}),
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused("not one of cfclip's", tmp_path / "other.safetensors")


def test_wrong_mappers(tmp_path):
    state = official.mapper_state(Mapper(official.SMALL_MAPPER))

    def refused(message, tree):
        torch.save(tree, tmp_path / "m.pt")
        with pytest.raises(WeightsError, match=message):
            load_mapper(tmp_path / "m.pt")

    refused(
        "holds a StyleGAN2 generator, where a mapper is needed",
        {"g_ema": official.rosinality(official.random_generator())},
    )
    refused("another type", {"state_dict": {"mapper.mapping.1.weight": torch.zeros(2, 2)}})
    refused("only one of", {"state_dict": {k: v for k, v in state.items() if "fc" not in k}})
    missing = "text_mapper.mapper_3.mapping.2.bias"
    refused(f"no {missing}", {"state_dict": {k: v for k, v in state.items() if k != missing}})
    refused("deeper", {"state_dict": state | {"mapper.fine_mapping.mapping.5.weight": torch.zeros(1)}})
    refused(
        "more than tensors and options", {"state_dict": state, "opts": {"x": np.float64(3)}, "more": Path}
    )


# ---- full size ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_config_f_at_1024(tmp_path):
    """FFHQ size: 1024², 30 million parameters, from each format, run once on the CPU."""
    channels = (512, 512, 512, 512, 512, 256, 128, 64, 32)
    g = official.random_generator(1024, channels, z_dim=512, w_dim=512, mapping_layers=8)
    torch.save({"g_ema": official.rosinality(g), "latent_avg": g.w_avg}, tmp_path / "g.pt")
    official.nvidia(g, tmp_path / "g.pkl")
    official.tensorflow(g, tmp_path / "tf.pkl")
    weights.save(g, tmp_path / "g.safetensors", "generator", g.config)
    z = torch.randn(1, 512)
    reference = g(z)
    for name in ("g.pt", "g.pkl", "tf.pkl", "g.safetensors"):
        start = time.perf_counter()
        loaded = load_generator(tmp_path / name)
        opened = time.perf_counter()
        assert loaded.num_ws == 18
        image = loaded(z)
        assert rel(image, reference) < 5e-6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{name}: {(tmp_path / name).stat().st_size / 2**20:.0f} MiB, opened in {opened - start:.2f} s, "
            f"one image in {time.perf_counter() - opened:.2f} s, peak memory {peak:.2f} GiB"
        )
