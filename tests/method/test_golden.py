"""The published code's outputs on the same weights and inputs (``tests/golden/README.md``)."""

import json

import pytest
import torch
from golden_files import COMMITTED, SETS, SHARED, golden, golden_path, recipe, rel

from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.reading import build
from cfclip.method.losses import clip_nce, identity_loss, latent_l2
from cfclip.method.views import perspective_views
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import TEMPLATES
from cfclip.models.mapper import MapperConfig

CHECKSUMS = json.loads((COMMITTED / "checksums.json").read_text())
normalize = torch.nn.functional.normalize


@pytest.fixture(params=SETS)
def folder(request):
    return SETS[request.param]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """The goldens' trap source would leave ``module_source_ran`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "module_source_ran").exists()


def need(outputs, key):
    return outputs[key] if key in outputs else pytest.skip(f"{key} is not in the committed golden")


def images(name, count=None):
    stored = golden("images_u8.pt")
    return (
        recipe.u8_to_image(stored[name][:count])
        if name in stored
        else pytest.skip(f"{name} is in the whole set of goldens only")
    )


@pytest.fixture(scope="module")
def facenet():
    """IR-SE50 with the recipe's weights, checked against their checksums."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in IRSE().state_dict().items()}
    assert len(shapes) == CHECKSUMS["irse50_nkeys"]
    tensors = recipe.fill_state_dict(shapes, **recipe.IRSE50)
    assert all(recipe.sha(tensors[name]) == known["sha256"] for name, known in CHECKSUMS["irse50"].items())
    return FaceIdentity(build(IRSE, tensors, "IR-SE50"))


def make_clip(weights):
    """The published CLIP with "hash" (recipe) or "seed" (torch's generator) weights, behind our guide."""
    open_clip = pytest.importorskip("open_clip")
    from cfclip.models.clip import ClipGuide

    torch.manual_seed(2022)
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).float().eval()
    if weights == "hash":
        recipe.apply(model, **recipe.CLIP)
    state = model.state_dict()
    if any(
        recipe.sha(state[name]) != known["sha256"] for name, known in CHECKSUMS[f"clip_{weights}"].items()
    ):
        pytest.skip(f"the {weights} weights differ on this torch")
    return ClipGuide(model, antialias=False)


@pytest.fixture(scope="module")
def clip():
    return make_clip("hash")


@torch.no_grad()
def test_golden_rosinality(folder, tmp_path):
    path, o = golden_path(folder, "gen64.pt", tmp_path), golden("gen64_outputs.pt", folder)
    g = load_generator(path)
    assert (g.resolution, g.num_ws, g.z_dim, g.w_dim, g.mapping_layers) == (64, 10, 512, 512, 8)
    assert rel(g.map_one(o["z"]), o["w"]) < 2e-6
    assert rel(g.mapping(o["z"], 0.7), o["latent_z_trunc07"]) < 2e-6
    assert rel(g(o["z"], 0.7), o["img_z_trunc07"]) < 5e-6
    assert rel(g(o["z"]), o["img_z_trunc1"]) < 5e-6
    assert rel(g.synthesis(o["wplus"]), o["img_wplus"]) < 5e-6
    assert rel(g.synthesis(o["wplus"], noise="none"), o["img_zero_noise"]) < 5e-6
    assert (
        rel(g.synthesis(o["wplus"], noise=[o[f"noise_{i}"] for i in range(9)]), o["img_wplus_noise"]) < 5e-6
    )
    styles = g.style_space(o["wplus"])
    assert all(rel(style, o[f"style_wplus_{i:02d}"][:, 0, :, 0, 0]) < 2e-6 for i, style in enumerate(styles))
    assert rel(g.synthesis_from_styles(styles), o["img_from_stylespace"]) < 5e-6
    w = g.map_one(o["z"])
    mixed = torch.cat([w[:1, None].repeat(1, 4, 1), w[1:2, None].repeat(1, 6, 1)], 1)
    assert rel(g.synthesis(mixed), o["img_mix_inject4"]) < 5e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["nvidia64", "nvidia64_tf_legacy"])
def test_golden_nvidia(name, folder, tmp_path):
    path, o = golden_path(folder, f"{name}.pkl", tmp_path), golden(f"{name}_outputs.pt", folder)
    g = load_generator(path)
    assert (g.resolution, g.num_ws, g.conv_clamp, g.mapping_layers) == (64, 10, 256, 2 if "tf" in name else 8)
    assert torch.equal(g.w_avg, o["w_avg"])
    if "wplus" in o:
        assert rel(g.synthesis(o["wplus"]), o["img_wplus"]) < 5e-6
    if "img_wplus_conv_clamp1" in o:
        g.conv_clamp = 1.0
        assert rel(g.synthesis(o["wplus"]), o["img_wplus_conv_clamp1"]) < 5e-6
        g.conv_clamp = 256
    z = need(o, "z")
    assert rel(g.mapping(z), o["ws"]) < 5e-6
    assert rel(g.mapping(z, 0.7, 8), o["ws_trunc07_cut8"]) < 5e-6
    assert rel(g(z), o["img"]) < 5e-6
    assert rel(g(z, 0.7), o["img_trunc07"]) < 5e-6
    assert rel(g(z, noise="none"), o["img_no_noise"]) < 5e-6


@torch.no_grad()
def test_golden_mapper_and_the_generator_beside_it(folder, tmp_path):
    path, o = golden_path(folder, "mapper64.pt", tmp_path), golden("mapper64_outputs.pt", folder)
    m, g = load_mapper(path), load_generator(path)
    assert m.config == MapperConfig(num_ws=10)
    assert rel(m.embed_text(o["t_feat"]).expand(2, -1, -1), o["t_w"]) < 5e-6
    assert rel(0.1 * m.residual(o["w"], o["t_feat"]), o["delta"]) < 5e-6
    edited = m.edit(o["w"], o["t_feat"])
    assert torch.equal(m.edit(o["w"], o["t_feat"], strength=0), o["w"])
    assert rel(g.synthesis(o["w"]), o["x"]) < 5e-6
    assert rel(g.synthesis(edited), o["x_hat"]) < 1e-5
    tree = torch.load(path, weights_only=True)
    for level in ("coarse", "medium", "fine"):  # as the published switches --no_coarse_mapper … leave it out
        theirs = "course" if level == "coarse" else level
        state = {
            k: v
            for k, v in tree["state_dict"].items()
            if f".{theirs}_mapping." not in k and not k.startswith("decoder.")
        }
        torch.save({"state_dict": state, "opts": tree["opts"]}, tmp_path / "part.pt")
        part = load_mapper(tmp_path / "part.pt")
        assert len(part.config.levels) == 2
        assert rel(part.residual(o["w"], o["t_feat"]), o[f"mapper_out_no_{level}_mapper"]) < 5e-6


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_clip_nce_on_features(case):
    o = golden("nce_features.pt")
    if f"{case}_src" not in o:
        pytest.skip(f"case {case} is in the whole set of goldens only")
    for dtype, loss_tolerance, grad_tolerance in ((torch.float32, 1e-6, 5e-6), (torch.float64, 1e-12, 1e-12)):
        name = "f64" if dtype == torch.float64 else "f32"
        source, source_text, target_text = (
            normalize(o[f"{case}_{k}"].to(dtype), dim=-1) for k in ("src", "src_text", "tgt_text")
        )
        edited = o[f"{case}_tgt"].to(dtype, copy=True).requires_grad_()
        loss = clip_nce(normalize(edited, dim=-1), source, target_text, source_text)
        loss.backward()
        assert rel(loss.detach(), o[f"{case}_loss_{name}"]) < loss_tolerance
        assert rel(edited.grad, o[f"{case}_grad_tgt_{name}"]) < grad_tolerance


def test_prompts_are_the_published_ones(clip):
    o = golden("nce_clip.pt")
    assert len(TEMPLATES) == CHECKSUMS["n_templates"]
    for prompt, key in (("face", "src"), ("green lipstick", "tgt")):
        ours = {tuple(clip.tokenize(template(prompt))[0].tolist()) for template in TEMPLATES}
        assert ours == set(map(tuple, o[f"tokens_{key}"].tolist()))
    assert torch.equal(clip.tokenize("green lipstick"), o["tokens_raw"])


@torch.no_grad()
def test_clip_text(clip):
    o = golden("nce_clip.pt")
    assert rel(clip.encode_text("green lipstick"), o["hash_text_raw"]) < 5e-6
    for prompt, key in (("face", "src"), ("green lipstick", "tgt")):
        texts = {
            tuple(clip.tokenize(text)[0].tolist()): text
            for text in (template(prompt) for template in TEMPLATES)
        }
        some = slice(0, None, 6)  # each text is encoded by itself
        ours = normalize(
            clip.encode_text([texts[tuple(row)] for row in o[f"tokens_{key}"][some].tolist()]), dim=-1
        )
        assert rel(ours, o[f"hash_text_{key}"][some]) < 5e-6


@pytest.mark.parametrize("era", ["old", "new"])
@pytest.mark.parametrize("size", [64, 256])
def test_clip_nce_on_images(era, size, clip):
    """ "old": the paper's torchvision resized without antialias; "new": with it."""
    o = golden("nce_clip.pt")
    source, edited = images(f"src{size}"), images(f"tgt{size}").requires_grad_()
    clip.antialias = era == "new"
    key = f"hash_{era}_{size}"
    with torch.no_grad():
        assert rel(clip.preprocess(source)[:1, :, ::8, ::8], o[f"{key}_pre_src0_8x"]) < 5e-6
        source_features = clip.encode_image(source)
    edited_features = clip.encode_image(edited)
    assert rel(source_features, o[f"{key}_feat_src_raw"]) < 5e-6
    assert rel(edited_features.detach(), o[f"{key}_feat_tgt_raw"]) < 5e-6
    loss = clip_nce(
        normalize(edited_features, dim=-1),
        normalize(source_features, dim=-1),
        o["hash_text_tgt"],
        o["hash_text_src"],
    )
    loss.backward()
    assert rel(loss.detach(), o[f"{key}_loss"]) < 2e-6
    assert rel(edited.grad.flatten(1).norm(dim=1), o[f"{key}_grad_tgt_norm"]) < 1e-5
    assert rel(torch.nn.functional.adaptive_avg_pool2d(edited.grad, 16), o[f"{key}_grad_tgt_pool"]) < 1e-5


@pytest.mark.parametrize("size", [64, 256])
def test_identity(size, facenet):
    o, source = golden("id_loss.pt"), images(f"src{size}", 2)
    edited = images(f"tgt{size}", 2).requires_grad_()
    with torch.no_grad():
        assert rel(facenet(source), o[f"{size}_feat_y"]) < 1e-5
        assert rel(facenet(edited), o[f"{size}_feat_yhat"]) < 1e-5
    loss = identity_loss(facenet(edited), facenet(source))
    loss.backward()
    assert abs(loss.item() - o[f"{size}_loss"].item()) < 1e-6
    assert rel(edited.grad.flatten(1).norm(dim=1), o[f"{size}_grad_yhat_norm"]) < 1e-4
    pooled, known = torch.nn.functional.adaptive_avg_pool2d(edited.grad, 16), o[f"{size}_grad_yhat_pool"]
    apart = (pooled - known).abs() / known.abs().max()
    # a PReLU whose input is zero up to rounding has either slope: the golden's own gradient at 64² differs
    # from the float64 one by 2.4e-3, in 3 % of its places
    assert (apart < 1e-4).float().mean() > 0.8 and apart.max() < 5e-3


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("name, tolerance", [("f32", 2e-6), ("f64", 1e-12)])
def test_ranger(name, tolerance, decay):
    from pytorch_optimizer import Ranger

    o = golden("ranger.pt")
    key = f"{name}_wd001_traj" if decay else f"{name}_traj"
    params = {p: torch.nn.Parameter(o[f"{key}_{p}"][0].clone()) for p in "abcd"}
    optimizer = Ranger(
        params.values(), lr=0.5, betas=(0.95, 0.999), eps=1e-5, weight_decay=decay, degenerated_to_sgd=True
    )
    for step in range(30):
        optimizer.zero_grad()
        sum(
            0.5 * (o[f"curv_{p}"].to(v.dtype) * (v - o[f"target_{p}"].to(v.dtype)).square()).sum()
            for p, v in params.items()
        ).backward()
        optimizer.step()
        for p, value in params.items():
            assert rel(value.detach(), o[f"{key}_{p}"][step + 1]) < tolerance, (p, step)


def published_name(name):
    """Our parameter name -> the published one."""
    kind, *rest = name.split(".")
    if kind == "fuse":
        return f"mapper.fc.{rest[0]}"
    stack = {
        "text": f"text_mapper.mapper_{rest[0]}",
        "levels": f"mapper.{'course' if rest[0] == 'coarse' else rest[0]}_mapping",
    }[kind]
    return f"{stack}.mapping.{int(rest[2]) + 1}.{rest[3]}"


def check_step(o, s, mapper, generator, facenet, clip, text, optimizer=None):
    """Step ``s`` of the published training loop on the stored start, augmentation draws included."""
    text_feature, w = o[f"s{s}_t_feat"], o[f"s{s}_w"]
    with torch.no_grad():
        x = generator.synthesis(w)
    w_hat = mapper.edit(w, text_feature)
    x_hat = generator.synthesis(w_hat)
    assert rel(x, o[f"s{s}_x"]) < 5e-6 and rel(x_hat.detach(), o[f"s{s}_x_hat"]) < 5e-6
    torch.manual_seed(6000 + s)
    views = perspective_views(x_hat, num_views=8)
    if f"s{s}_x_aug" in o:
        assert rel(views.detach(), o[f"s{s}_x_aug"]) < 5e-6
    with torch.no_grad():
        source = normalize(clip.encode_image(x), dim=-1)
    edited = normalize(clip.encode_image(views), dim=-1)
    losses = {
        "id": identity_loss(facenet(x_hat), facenet(x)),
        "l2_latent": latent_l2(w_hat, w),
        "nce": clip_nce(edited, source, text["tgt"], text["src"]),
    }
    total = 0.2 * losses["id"] + 0.8 * losses["l2_latent"] + 0.3 * losses["nce"]
    assert abs(losses["id"].item() - o[f"s{s}_loss_id"].item()) < 1e-6
    for value, key in ((losses["nce"], "loss_nce"), (losses["l2_latent"], "loss_l2_latent"), (total, "loss")):
        assert rel(value.detach(), o[f"s{s}_{key}"]) < 2e-6
    mapper.zero_grad()
    total.backward()
    norms = {published_name(name): p.grad.double().norm() for name, p in mapper.named_parameters()}
    assert len(norms) == 106 and all(f"s{s}_gradnorm/{name}" in o for name in norms)
    assert max(rel(norm, o[f"s{s}_gradnorm/{name}"]) for name, norm in norms.items()) < 2e-4
    if optimizer is not None:
        before = {name: p.detach().clone() for name, p in mapper.named_parameters()}
        optimizer.step()
        for name, p in mapper.named_parameters():
            assert (
                rel((p.detach() - before[name]).double().norm(), o[f"s{s}_updnorm/{published_name(name)}"])
                < 1e-3
            )


def test_one_training_step(facenet, clip, tmp_path):
    path = golden_path(COMMITTED, "mapper64.pt", tmp_path)
    o, texts = golden("step_ffhq_hash_old.pt"), golden("nce_clip.pt")
    clip.antialias = False
    check_step(
        o,
        0,
        load_mapper(path).requires_grad_(True),
        load_generator(path),
        facenet,
        clip,
        {"src": texts["hash_text_src"], "tgt": texts["hash_text_tgt"]},
    )


@pytest.mark.slow
def test_three_training_steps(facenet, tmp_path):
    """Steps that build on each other, with the published optimiser between them."""
    from pytorch_optimizer import Ranger

    path = golden_path(SHARED, "mapper64.pt", tmp_path)
    o, texts = golden("step_ffhq_seed_old.pt"), golden("nce_clip.pt", SHARED)
    mapper, generator, clip = load_mapper(path).requires_grad_(True), load_generator(path), make_clip("seed")
    optimizer = Ranger(mapper.parameters(), lr=0.5, betas=(0.95, 0.999), eps=1e-5, degenerated_to_sgd=True)
    for s in range(3):
        check_step(
            o,
            s,
            mapper,
            generator,
            facenet,
            clip,
            {"src": texts["seed_text_src"], "tgt": texts["seed_text_tgt"]},
            optimizer,
        )
