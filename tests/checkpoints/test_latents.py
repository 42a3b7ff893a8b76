"""Codes in every container that people have: read as what they are, or refused in words that help."""

import pickle
import warnings
from zipfile import ZIP_DEFLATED, ZIP_LZMA, ZipFile

import numpy as np
import official
import pytest
import torch
from safetensors.torch import save_file

from cfclip.checkpoints.latents import MADE_FOR, fit_latents, load_latents
from cfclip.checkpoints.weights import WeightsError
from cfclip.models.mapper import Mapper

L, D = 4, 8  # of the generator below


@pytest.fixture(scope="module")
def g():
    generator = official.random_generator(8, (6, 4))
    assert (generator.num_ws, generator.w_dim) == (L, D)
    return generator


def write(path, codes):
    """``codes`` in the format that the suffix of ``path`` names."""
    arrays = {name: code.numpy() for name, code in codes.items()} if isinstance(codes, dict) else None
    match path.suffix:
        case ".npy":
            np.save(path, codes.numpy())
        case ".npz":
            np.savez(path, **arrays) if arrays else np.savez(path, codes.numpy())
        case ".pkl":
            path.write_bytes(pickle.dumps(codes.numpy() if arrays is None else arrays))
        case ".safetensors":
            save_file(codes, path)
        case ".pt":
            torch.save(codes, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz", ".pkl"])
def test_one_pictures_code_is_one_picture(suffix, g, tmp_path):
    code = torch.randn(L, D)
    path = write(tmp_path / f"one{suffix}", code)
    with pytest.warns(UserWarning, match=rf"one{suffix}: \[4, 8\] is read as one W\+ code.*\[4, 1, 8\]"):
        assert torch.equal(load_latents(path, g), code[None])
    for same in (code[None], code[:, None]):  # in neither of these is there a doubt
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_latents(write(path, same), g)
        assert torch.equal(loaded, same.expand(-1, L, -1))


@pytest.mark.parametrize("codes", [torch.zeros(2, L, D), [torch.zeros(L, D)] * 2])
def test_a_picture_with_several_codes_is_refused(codes, g, tmp_path):
    torch.save({"a.png": codes, "b.png": torch.zeros(L, D)}, tmp_path / "codes.pt")
    with pytest.raises(WeightsError, match=r"its a\.png has 2 codes, but one a picture is needed"):
        load_latents(tmp_path / "codes.pt", g)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 21])
def test_codes_of_w_of_any_other_number_stay_codes_of_w(n, g, tmp_path):
    w = torch.randn(n, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_latents(write(tmp_path / "w.npy", w), g), w[:, None].expand(n, L, D))
        assert torch.equal(load_latents(write(tmp_path / "w.npy", w)), w)


@pytest.mark.parametrize("layers", [layers for layers in MADE_FOR if 10 <= layers <= 18])
def test_the_shape_of_another_generators_code_is_said(layers, g):
    message = rf"\[{layers}, 8\] is read as {layers} codes of W.*{MADE_FOR[layers]} px generator"
    with pytest.warns(UserWarning, match=message):
        assert fit_latents(torch.randn(layers, D), g).shape == (layers, L, D)


@pytest.mark.parametrize("name", ["w", "latents", "dlatents", "ws", "projected_w"])
def test_codes_are_found_under_the_names_that_tools_give_them(name, g, tmp_path):
    w = torch.randn(3, L, D)
    beside = {"seeds": torch.arange(3), "z": torch.randn(3, 5)}
    for suffix in (".npz", ".pt", ".pkl", ".safetensors"):
        for codes in ({name: w}, beside | {name: w}):
            assert torch.equal(load_latents(write(tmp_path / f"c{suffix}", codes), g), w)
    np.savez(tmp_path / "words.npz", **{name: w.numpy(), "photos": np.array(["a.jpg", "b.jpg", "c.jpg"])})
    np.savez_compressed(tmp_path / "small.npz", **{name: w.numpy()})
    for path in (tmp_path / "words.npz", tmp_path / "small.npz"):
        assert torch.equal(load_latents(path), w)


@pytest.mark.parametrize("shape", [(L, D), (1, L, D), (D,), (1, D)], ids=str)
def test_a_code_a_picture_is_read_in_the_files_order(shape, g, tmp_path):
    codes = {"b.jpg": torch.randn(shape), "a.jpg": torch.randn(shape)}
    codes |= {f"{i}.jpg": torch.randn(shape) for i in range(L - 2)}  # as many pictures as layers
    right = torch.cat([code.reshape(1, -1, D).expand(1, L, D) for code in codes.values()])
    for suffix in (".npz", ".pt", ".pkl"):
        assert torch.equal(load_latents(write(tmp_path / f"c{suffix}", codes), g), right)
    projector = {
        name: {"img": torch.zeros(3, 8, 8), "latent": code, "noise": [torch.zeros(1, 1, 4, 4)]}
        for name, code in codes.items()
    }
    lists = {name: [code] for name, code in codes.items()}
    for tree in (projector, lists, {"latents": codes}):
        assert torch.equal(load_latents(write_torch(tmp_path, tree), g), right)
    if len(shape) > 1:  # a list of [D] is the tensor [N, D]
        assert torch.equal(load_latents(write_torch(tmp_path, list(codes.values())), g), right)
    (tmp_path / "tensors.pkl").write_bytes(pickle.dumps(codes))
    assert torch.equal(load_latents(tmp_path / "tensors.pkl", g), right)
    for tree in ({"b.jpg": codes["b.jpg"]}, {"b.jpg": projector["b.jpg"]}):
        assert torch.equal(load_latents(write_torch(tmp_path, tree), g), right[:1])


def write_torch(folder, tree):
    torch.save(tree, folder / "tree.pt")
    return folder / "tree.pt"


def test_what_is_not_one_code_a_picture_is_named(g, tmp_path):
    code = torch.randn(L, D)
    for message, tree in (
        (r"a has 2 codes, but one a picture", {"a": [code, code]}),
        (r"differ in shape .a \[4, 8\], b \[5, 8\].*latents are needed", {"a": code, "b": torch.randn(5, D)}),
        (r"b is a dict of path.*latents are needed", {"a": code, "b": {"path": "x"}}),
        (r"b holds numbers of type torch.int64", {"a": code, "b": code.long()}),
        (r"b is not all finite", {"a": code, "b": code * float("nan")}),
        (r"entry 1 is not all finite", [code, code / 0]),
        (r"tensor holds numbers of type torch.complex64", code.to(torch.complex64)),
        (r"holds no numbers", code.to("meta")),
        (r"under w and latents: save those to use alone", {"w": code, "latents": code}),
        (r"a dict of nothing, but latents", {}),
        (r"a list, but latents", []),
        (r"64 times larger than the file", [torch.zeros(18, 64)] * 500),
        (r"64 times larger than the file", [torch.zeros(1, 1, 1152).expand(1, 64, 1152)] * 9),
    ):
        with pytest.raises(WeightsError, match=message):
            load_latents(write_torch(tmp_path, tree), g)


@pytest.mark.parametrize("dtype", ["i4", "u1", "b1", "c8", "S4", "S0", "U3", "M8[s]", "f4,i4"])
def test_arrays_of_other_things_are_refused(dtype, tmp_path):
    for name in ("a.npy", "a.npz"):
        with open(tmp_path / name, "wb") as file:
            (np.save if name == "a.npy" else np.savez)(file, np.zeros((3, 8), dtype))
        with pytest.raises(WeightsError, match=r"numbers of type .*, but latents are needed"):
            load_latents(tmp_path / name)


def test_a_network_is_no_code(g, tmp_path):
    for state, words in (
        (official.rosinality(g), "a StyleGAN2 generator"),
        (official.mapper_state(Mapper(official.SMALL_MAPPER)), "a CF-CLIP mapper"),
    ):
        for tree in (state, {"g_ema": state}):
            with pytest.raises(WeightsError, match=rf"(holds|is) {words}.*latents are needed"):
                load_latents(write_torch(tmp_path, tree))


def test_an_object_array_is_refused_in_words_that_help(tmp_path):
    trees = [{"a.jpg": [np.zeros((L, D))]}, np.array([np.zeros(3), None], dtype=object)]
    for tree in trees:
        np.save(tmp_path / "a.npy", tree, allow_pickle=True)
        np.savez(tmp_path / "a.npz", w=np.array(tree, dtype=object))
        for name in ("a.npy", "a.npz"):
            with pytest.raises(WeightsError, match=r"Python objects.*for safety.*numpy\.savez\(path"):
                load_latents(tmp_path / name)


def test_a_small_archive_cannot_become_large(tmp_path):
    zeros, path = np.zeros((1, 1000, 1000), np.float32), tmp_path / "w.npz"
    np.savez_compressed(path, w=zeros)
    with pytest.raises(WeightsError, match="more than 64 times larger than the file"):
        load_latents(path)
    np.savez(path, w=zeros)
    assert load_latents(path).shape == zeros.shape
    array = write(tmp_path / "w.npy", torch.zeros(2, D)).read_bytes()
    for method, content, message in (
        (ZIP_LZMA, array, "unusual way"),
        (ZIP_DEFLATED, array.replace(b"(2, 8)", b"(9, 8)"), "truncated"),
        (ZIP_DEFLATED, array.replace(b"(2, 8), }  ", b"(-2, 8), } "), "a size that is none"),
    ):
        with ZipFile(path, "w", method) as archive:
            archive.writestr("w.npy", content)
        with pytest.raises(WeightsError, match=message):
            load_latents(path)


def test_a_code_each_of_3000_pictures_is_not_too_much(tmp_path):
    codes = {f"photos/{i:05}.jpg": torch.randn(1, 128) for i in range(3000)}
    right = torch.stack(list(codes.values()))
    arrays = {name: code.numpy() for name, code in codes.items()}
    torch.save(codes, tmp_path / "zip.pt")
    torch.save(codes, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "codes.npz", **arrays)
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays))
    (tmp_path / "tensors.pkl").write_bytes(pickle.dumps(codes))
    save_file(codes, tmp_path / "codes.safetensors")
    for path in tmp_path.iterdir():
        assert load_latents(path).reshape(right.shape).equal(right), path.name


def test_w_repeated_over_many_layers_is_not_too_large(tmp_path):
    w = torch.randn(5, 1, 512).expand(5, 18, 512)
    assert torch.equal(load_latents(write_torch(tmp_path, w)), w)
    np.savez_compressed(tmp_path / "w.npz", w=w.numpy())
    assert torch.equal(load_latents(tmp_path / "w.npz"), w)
