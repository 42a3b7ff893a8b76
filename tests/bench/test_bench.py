"""The bench: its published step is the published loss, its tables are quotients of what was measured, and it says what it skipped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cfclip.bench import PARTS, bench, machine, report, run, worker
from cfclip.bench.measure import work_of
from cfclip.bench.networks import random_domain
from cfclip.bench.published import NAMES, PlainGenerator, Published, Wastes
from cfclip.experiments import sweep
from cfclip.files import read_rows
from cfclip.method.config import CFCLIPConfig
from cfclip.method.trainer import MapperTrainer
from cfclip.models.clip import TEMPLATES
from cfclip.models.vgg import VGG19

CONFIG = CFCLIPConfig("green lipstick", train_latents=4)
VARIANTS = [
    (Wastes(), False),
    (Wastes(), True),
    (Wastes.none(), False),
    (Wastes.none(), True),
    (Wastes.none(sources=True), False),
    *((replace(Wastes(), text_passes=1, **{name: False}), name == "gram") for name in NAMES),
]


def one_step(training, step) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The losses and the mapper's gradients of one step from the same start; the mapper is as before."""
    before = {name: value.clone() for name, value in training.mapper.state_dict().items()}
    seed_step(0, 0)
    logs = step(0)
    training.mapper.load_state_dict(before)
    return logs, [p.grad.clone() for p in training.mapper.parameters()]


@pytest.mark.parametrize(("wastes", "perceptual"), VARIANTS)
def test_the_wasteful_step_has_our_losses_and_gradients(wastes, perceptual, domain):
    config = CONFIG
    if perceptual:
        domain, config = (
            replace(domain, perceptual=VGG19().requires_grad_(False)),
            replace(CONFIG, lambda_perc=0.02),
        )
    training = MapperTrainer(domain, config)
    ours, gradients = one_step(training, training.step)
    theirs, found = one_step(training, Published(training, wastes).step)
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6) and theirs.keys() == ours.keys()
    largest = max(g.abs().max() for g in gradients)
    assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(gradients, found, strict=True))
    assert not any(p.requires_grad for p in domain.generator.parameters())


def counted(domain, wastes, monkeypatch) -> dict[str, int]:
    """Texts and pictures that one step sends through CLIP, pictures it draws in plain operators, frozen weights that got a gradient."""
    counts = {"texts": 0, "pictures": 0, "drawn": 0}
    training = MapperTrainer(domain, CONFIG)
    published = Published(training, wastes)
    model, encode_text, encode_image, draw = (
        domain.clip.model,
        domain.clip.model.encode_text,
        domain.clip.model.encode_image,
        PlainGenerator.__call__,
    )
    monkeypatch.setattr(
        model, "encode_text", lambda x: counts.update(texts=counts["texts"] + len(x)) or encode_text(x)
    )
    monkeypatch.setattr(
        model,
        "encode_image",
        lambda x: counts.update(pictures=counts["pictures"] + len(x)) or encode_image(x),
    )
    monkeypatch.setattr(
        PlainGenerator,
        "__call__",
        lambda self, w: counts.update(drawn=counts["drawn"] + len(w)) or draw(self, w),
    )
    published.step(0)
    return counts | {
        "gradients": sum(p.grad is not None for network in published.networks for p in network.parameters())
    }


def test_every_waste_wastes(domain, monkeypatch):
    everything = counted(domain, Wastes(), monkeypatch)
    assert everything["gradients"] > 50
    assert everything == {
        "texts": 4 * len(TEMPLATES),
        "pictures": 2 * 8 * 2,
        "drawn": 4,
        "gradients": everything["gradients"],
    }
    for change, expected in (
        ({"texts": False}, {"texts": 0}),
        ({"source_views": False}, {"pictures": 8 * 2 + 2}),
        ({"sources": False}, {"pictures": 8 * 2, "drawn": 2}),
        ({"weight_gradients": False}, {"gradients": 0}),
        ({"plane_filters": False, "sample_weights": False}, {"drawn": 0}),
        ({"text_passes": 1}, {"texts": 2 * len(TEMPLATES)}),
    ):
        monkeypatch.undo()
        assert counted(domain, replace(Wastes(), **change), monkeypatch).items() >= expected.items(), change
    assert Published(MapperTrainer(domain, CONFIG), Wastes()).second_clip is not domain.clip


@torch.no_grad()
@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_plain_operators_draw_the_same_picture(filters, weights, generator):
    w = generator.mapping(torch.randn(3, 12)) + 0.1 * torch.randn(3, generator.num_ws, 16)
    assert torch.allclose(PlainGenerator(generator, filters, weights)(w), generator.synthesis(w), atol=1e-5)


def test_the_published_step_is_float32(domain):
    training = MapperTrainer(domain, replace(CONFIG, dtype="bfloat16"))
    with pytest.raises(ValueError, match="float32, not bfloat16"):
        Published(training)
    one_step(training, Published(training, Wastes.none(sources=True)).step)


def test_arithmetic_and_traffic_by_hand():
    x, k, m = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3), torch.randn(7, 11, dtype=torch.bfloat16)
    assert work_of(lambda: F.conv2d(x, k, padding=1).relu()) == {
        "float32": [2 * 2 * 5 * 64 * 27, 4 * (2 * 3 * 64 + 5 * 27 + 2 * 5 * 64)]
    }
    assert work_of(lambda: m @ m.t()) == {"bfloat16": [2 * 7 * 7 * 11, 2 * (2 * 77 + 49)]}


def test_a_floor_by_hand():
    best = {"float32": 1e12, "bfloat16": 4e12, "copy": 1e11}
    assert report.floor(best, {"float32": [1e12, 1e9], "bfloat16": [2e12, 1e9]}) == (1.5, "arithmetic")
    assert report.floor(best, {"float32": [1e9, 5e10]}) == (0.5, "bandwidth")


def test_random_weights_are_the_same_ones():
    a, b = (random_domain(16, tiny=True) for _ in range(2))
    assert (
        all(
            torch.equal(p, q) for p, q in zip(a.generator.parameters(), b.generator.parameters(), strict=True)
        )
        and a.clip is b.clip
    )


# ---- the command ----


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("bench")
    bench(small=True, out=out, devices=("cpu", "cuda"))
    return out, read_rows(out / "bench.jsonl")


def test_quick_measures_every_part(quick):
    out, rows = quick
    text = (out / "bench.md").read_text()
    assert not [row for row in rows if row.get("status") == "failed"]
    assert {row["part"] for row in rows if "median" in row} == {*PARTS, "floors"}
    assert (
        "nan" not in text
        and "Nothing was measured" not in text
        and "All float32 losses are the published ones" in text
    )
    for name in ("wastes-cpu", "scaling-cpu"):
        assert (out / f"{name}.png").stat().st_size > 10_000 and f"({name}.png)" in text
    assert ("skipped: cuda (no CUDA device)" in text) is not torch.cuda.is_available()
    assert {row["name"] for row in rows if row["part"] == "explorer" and "median" in row} == {
        "slider",
        "slider, dragged",
        "prompt",
    }
    assert all(
        row["low"] <= row["median"] <= row["high"] and len(row["seconds"]) == row["n"]
        for row in rows
        if "median" in row
    )


def test_tables_are_quotients_of_what_was_measured(quick):
    out, rows = quick
    medians = {
        (row["name"], row["dtype"]): row["median"]
        for row in report.of(rows, "step", device="cpu")
        if "peak_gb" in row
    }
    table = report.step_table(rows, "cpu")
    assert len(table) == len(medians) == 5
    for row in table.to_dict("records"):
        assert row["times faster"] == medians["published", "float32"] / medians[row["step"], row["dtype"]]
        assert f"| {report.number(row['times faster'])} " in (out / "bench.md").read_text()
    ladder = report.ladder_table(rows, "cpu")
    last = report.of(rows, "step", device="cpu", off="sources")[0]["median"]
    assert ladder["it cost, s"].sum() == pytest.approx(medians["published", "float32"] - last)
    generator = report.generator_table(rows)
    measured = report.of(rows, "generator", name="plain", resolution=16, **{"pass": "forward"})[0]
    ours = report.of(rows, "generator", name="ours", dtype="float32", resolution=16, **{"pass": "forward"})[0]
    found = generator.query(
        "generator == 'ours' and dtype == 'float32' and resolution == 16 and `pass` == 'forward'"
    ).iloc[0]
    assert found["× plain"] == measured["median"] / ours["median"] and found["images/s"] == 2 / ours["median"]


def test_what_the_fast_ways_change(quick):
    rows = [
        {
            "part": "fidelity",
            "device": "cpu",
            "name": name,
            "dtype": "float32",
            "prompt": "a",
            "seed": seed,
            "steps": 3,
            "faces": 4,
            "median": 2.0,
            "success_after": value,
            "identity": 0.9,
        }
        for name, values in (
            ("reference", (0.5, 0.75, 1.0)),
            ("ours", (0.25, 1.0, 1.0)),
            ("worse", (0.25, 0.5, 0.75)),
        )
        for seed, value in enumerate(values)
    ]
    table = report.success_table(rows).set_index("operators")
    assert table.loc["worse", "apart"] == "-25 ± 0" and table.loc["reference", "apart"] == "–", (
        "it is compared seed by seed"
    )
    assert table.loc["ours", "each"] == "25, 100, 100" and table.loc["reference", "success"].startswith(
        "75 ±"
    )
    drawn = report.pictures_table(quick[1]).set_index(["dtype", "filters"])
    assert (
        len(drawn) == 6
        and drawn.loc[("float32", "unfolded"), "most"] < 0.01 < drawn.loc[("bfloat16", "folded"), "mean"]
    )


def test_a_folder_a_machine():
    where = {"cpu": "AMD EPYC, 2 cores", "flags": ["avx2", "avx512_bf16"], "gpu": "NVIDIA H100"}
    assert machine.name(where) == "amd-epyc-2-cores-avx512-bf16-nvidia-h100"
    assert machine.name({"cpu": "Apple M4, 8 cores", "flags": [], "gpu": None}) == "apple-m4-8-cores"


def test_what_is_measured_is_kept(quick, monkeypatch):
    out, rows = quick
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("measured again"))
    bench(small=True, out=out)
    assert [row for row in read_rows(out / "bench.jsonl") if "median" in row] == [
        row for row in rows if "median" in row
    ]
    started = []
    monkeypatch.setattr(run, "_measure", lambda group, *_: started.extend(job.part for job in group) or [])
    monkeypatch.setattr(run, "code", lambda: "another")
    bench(["profile"], small=True, out=out)
    assert started == ["floors", "profile"], (
        "other code, and only the part that was asked for with the floors it needs"
    )


def test_stopped_it_reports_what_it_has(tmp_path, monkeypatch):
    done = []

    def measure(group, *_):
        if done:
            raise KeyboardInterrupt
        done.append(group)
        return [
            {
                "job": group[0].id,
                "part": "floors",
                "device": "cpu",
                "name": "copy",
                "gb_per_second": 12.5,
                "n": 1,
            }
        ]

    monkeypatch.setattr(run, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench(out=tmp_path, devices=("cpu",))
    assert "| copy " in (tmp_path / "bench.md").read_text() and len(read_rows(tmp_path / "bench.jsonl")) > 1


def test_another_loss_is_told(quick):
    rows = quick[1]
    assert report.unequal(rows) == ""
    changed = [
        row | {"losses": row["losses"] | {"nce": row["losses"]["nce"] * (1 + 1e-4)}}
        if row.get("name") == "ours" and "losses" in row
        else row
        for row in rows
    ]
    assert "ours at 16²: nce" in report.unequal(changed)


def test_without_the_memory_it_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_gb", lambda device: 0.5)
    monkeypatch.setattr(run.subprocess, "Popen", lambda *_, **__: pytest.fail("started all the same"))
    path = bench(["step"], small=True, out=tmp_path, devices=("cpu",))
    assert "it needs 2 GB, and 0 GB are free" in path.read_text()


def test_a_part_that_fails_stops_no_other(tmp_path):
    jobs = [
        {
            "id": str(size),
            "part": "generator",
            "what": "generator",
            "arguments": {"device": "cpu", "sizes": [[size, 1]], "repeats": 1, "tiny": True},
        }
        for size in (7, 8)
    ]
    worker.work(jobs, tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["job"], row["status"]) for row in rows if "status" in row] == [
        ("7", "failed"),
        ("8", "done"),
    ]
    assert "power of two" in rows[0]["why"]


def test_an_unknown_part(tmp_path):
    with pytest.raises(ValueError, match="unknown part 'stepz'; there are: generator, step"):
        bench(["stepz"], out=tmp_path)


def test_no_run_of_a_sweep_depends_on_the_bench(monkeypatch):
    seen, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: seen.append(self) or read(self))
    sweep.code_hash()
    assert any(path.name == "method.py" for path in seen) and not any(
        path.parent.name == "bench" for path in seen
    )
