"""The bench: its published step has the published loss, its tables are quotients, and no row is lost."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cfclip.bench import machine, parts, report, run, tables, worker
from cfclip.bench.measure import work_of
from cfclip.bench.networks import random_domain
from cfclip.bench.published import NAMES, PlainGenerator, Published, Wastes
from cfclip.bench.run import PARTS, bench
from cfclip.experiments import runs
from cfclip.files import append_row, read_rows, write_rows
from cfclip.method.config import CFCLIPConfig
from cfclip.method.loop import generator_for
from cfclip.method.trainer import MapperTrainer
from cfclip.models.clip import TEMPLATES

CONFIG = CFCLIPConfig("green lipstick", train_latents=4)
VARIANTS = [
    Wastes(),
    Wastes.none(),
    Wastes.none(sources=True),
    *(replace(Wastes(), **{name: False}) for name in NAMES),
]


def one_step(training, step) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The losses and the mapper's gradients of one step; the mapper is restored."""
    before = {name: value.clone() for name, value in training.mapper.state_dict().items()}
    logs = step(0, generator_for(0, 0))
    training.mapper.load_state_dict(before)
    return logs, [p.grad.clone() for p in training.mapper.parameters()]


@pytest.mark.parametrize("wastes", VARIANTS)
def test_the_wasteful_step_has_our_losses_and_gradients(wastes, domain):
    training = MapperTrainer(domain, CONFIG)
    ours, our_gradients = one_step(training, training.step)
    published, gradients = one_step(training, Published(training, wastes).step)
    assert published.keys() == ours.keys() and published == pytest.approx(ours, rel=1e-5, abs=1e-6)
    largest = max(g.abs().max() for g in our_gradients)
    assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(our_gradients, gradients, strict=True))
    assert not any(p.requires_grad for p in domain.generator.parameters())


def counted(domain, wastes, monkeypatch) -> dict[str, int]:
    """What one step does.

    Texts and pictures that CLIP encodes, pictures drawn in plain operators, frozen weights with a gradient.
    """
    counts = dict.fromkeys(("texts", "pictures", "drawn"), 0)
    published = Published(MapperTrainer(domain, CONFIG), wastes)

    def count(owner, method, name):
        original = getattr(owner, method)

        def counting(*args):
            counts[name] += len(args[-1])
            return original(*args)

        monkeypatch.setattr(owner, method, counting)

    count(domain.clip.model, "encode_text", "texts")
    count(domain.clip.model, "encode_image", "pictures")
    count(PlainGenerator, "__call__", "drawn")
    published.step(0, generator_for(0, 0))
    weights = [p for network in published.networks for p in network.parameters()]
    return counts | {"gradients": sum(p.grad is not None for p in weights)}


def test_every_waste_wastes(domain, monkeypatch):
    everything = counted(domain, Wastes(), monkeypatch)
    assert everything.pop("gradients") > 50
    assert everything == {"texts": 4 * len(TEMPLATES), "pictures": 2 * 8 * 2, "drawn": 4}
    for change, expected in (
        ({"texts": False}, {"texts": 0}),
        ({"source_views": False}, {"pictures": 8 * 2 + 2}),
        ({"sources": False}, {"pictures": 8 * 2, "drawn": 2}),
        ({"weight_gradients": False}, {"gradients": 0}),
        ({"plane_filters": False, "sample_weights": False}, {"drawn": 0}),
    ):
        monkeypatch.undo()
        assert counted(domain, replace(Wastes(), **change), monkeypatch).items() >= expected.items(), change
    assert Published(MapperTrainer(domain, CONFIG), Wastes()).text_clip is not domain.clip


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
    flop, numbers = 2 * 2 * 5 * 64 * 27, 2 * 3 * 64 + 5 * 27 + 2 * 5 * 64
    assert work_of(lambda: F.conv2d(x, k, padding=1).relu()) == {"float32": [flop, 4 * numbers]}
    assert work_of(lambda: m @ m.t()) == {"bfloat16": [2 * 7 * 7 * 11, 2 * (2 * 77 + 49)]}


def test_a_floor_by_hand():
    best = {"float32": 1e12, "bfloat16": 4e12, "copy": 1e11}
    assert tables.floor(best, {"float32": [1e12, 1e9], "bfloat16": [2e12, 1e9]}) == (1.5, "arithmetic")
    assert tables.floor(best, {"float32": [1e9, 5e10]}) == (0.5, "bandwidth")


def test_random_weights_are_always_the_same():
    a, b = (random_domain(16, tiny=True) for _ in range(2))
    pairs = zip(a.generator.parameters(), b.generator.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs) and a.clip is b.clip


# ---- the command ----


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("bench")
    bench(small=True, out=out, devices=("cpu", "cuda"))
    return out, read_rows(out / "bench.jsonl")


def page(out: Path) -> str:
    return (out / "bench.md").read_text(encoding="utf-8")


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "median" in row]


@pytest.mark.long
def test_quick_measures_every_part(quick):
    out, rows = quick
    text = page(out)
    assert not [row for row in rows if row.get("status") == "failed"]
    assert {row["part"] for row in measured(rows)} == {*PARTS, "floors"}
    assert "nan" not in text and "Nothing was measured" not in text
    assert "All float32 losses equal the published ones" in text
    for name in ("wastes-cpu", "scaling-cpu"):
        assert (out / f"{name}.png").stat().st_size > 10_000 and f"({name}.png)" in text
    assert ("skipped: cuda (no CUDA device)" in text) is not torch.cuda.is_available()
    moves = {row["name"] for row in measured(rows) if row["part"] == "explorer"}
    drag, preview = "slider, dragged: from picture to picture", "refine: first preview"
    assert moves == {"slider", drag, "prompt", preview}
    for row in measured(rows):
        assert row["low"] <= row["median"] <= row["high"] and len(row["seconds"]) == row["n"]


@pytest.mark.long
def test_tables_are_quotients_of_what_was_measured(quick):
    out, rows = quick
    steps = [row for row in tables.select(rows, "step", device="cpu") if "peak_gb" in row]
    medians = {(row["name"], row["dtype"]): row["median"] for row in steps}
    table = tables.step_table(rows, "cpu")
    assert len(table) == len(medians) == 5
    for row in table.to_dict("records"):
        assert row["times faster"] == medians["published", "float32"] / medians[row["step"], row["dtype"]]
        assert f"| {tables.number(row['times faster'])} " in page(out)
    last = tables.select(rows, "step", device="cpu", off="sources")[0]["median"]
    costs = tables.ladder_table(rows, "cpu")["cost, s"]
    assert costs.sum() == pytest.approx(medians["published", "float32"] - last)
    forward = tables.select(rows, "generator", dtype="float32", resolution=16, **{"pass": "forward"})
    plain, ours = (
        next(row["median"] for row in forward if row["name"] == name) for name in ("plain", "ours")
    )
    table = tables.generator_table(rows).set_index(["generator", "dtype", "resolution", "pass"])
    row = table.loc[("ours", "float32", 16, "forward")]
    assert row["× plain"] == plain / ours and row["images/s"] == 2 / ours


def test_the_fast_ways_are_compared_seed_by_seed():
    trainings = {"reference": (0.5, 0.75, 1.0), "ours": (0.25, 1.0, 1.0), "worse": (0.25, 0.5, 0.75)}
    known = {"part": "fidelity", "device": "cpu", "dtype": "float32", "prompt": "a", "steps": 3, "faces": 4}
    rows = [
        known | {"name": name, "seed": seed, "success_after": value, "identity": 0.9}
        for name, values in trainings.items()
        for seed, value in enumerate(values)
    ]
    table = tables.success_table(rows).set_index("operators")
    assert table.loc["worse", "difference"] == "-25 ± 0" and table.loc["reference", "difference"] == "–"
    assert table.loc["ours", "by seed"] == "25, 100, 100"
    assert table.loc["reference", "success"].startswith("75 ±")
    stopped = tables.success_table(rows[:4]).set_index("operators")  # ours has one seed
    assert stopped.loc["ours", "difference"] == "-25" and stopped.loc["ours", "seeds"] == 1


def test_trainings_an_hour_by_hand():
    """300 steps of 0.5 s are 24 trainings an hour; four together in 1 s a step are 48, twice as many."""
    known = {"part": "scaling", "name": "pack", "device": "cpu", "dtype": "float32", "steps": 300, "n": 1}
    rows = [known | {"value": 1, "median": 0.5}, known | {"value": 4, "median": 1.0}]
    rows.append(known | {"value": 4, "median": 1.0, "dtype": "bfloat16"})
    table = tables.pack_table(rows)
    assert list(table["trainings an hour"]) == [24, 48, 48]
    assert list(table["× one"])[:2] == [1, 2] and table["× one"].isna()[2], "of its own dtype"


def test_a_pack_is_measured():
    one, two = parts.growing_pack("cpu", [1, 2], "float32", repeats=2, tiny=True)
    assert (one["value"], two["value"]) == (1, 2) and one["n"] == two["n"] == 2
    full = [
        job.arguments for device in ("cpu", "cuda") for job in run.full(device) if job.what == "growing_pack"
    ]
    assert {max(job["values"]) for job in full if job["device"] == "cuda"} == {64}
    assert all(job["values"][0] == 1 for job in full), "else there is nothing to compare with"


@pytest.mark.long
def test_the_fast_ways_draw_almost_the_same_pictures(quick):
    table = tables.pictures_table(quick[1]).set_index(["dtype", "filters"])
    assert len(table) == 6
    assert table.loc[("float32", "unfolded"), "maximum"] < 0.01 < table.loc[("bfloat16", "folded"), "mean"]


def test_each_machine_has_a_folder():
    where = {"cpu": "AMD EPYC, 2 cores", "flags": ["avx2", "avx512_bf16"], "gpu": "NVIDIA H100"}
    assert machine.name(where) == "amd-epyc-2-cores-avx512-bf16-nvidia-h100"
    assert machine.name({"cpu": "Apple M4, 8 cores", "flags": [], "gpu": None}) == "apple-m4-8-cores"


@pytest.mark.long
def test_what_is_measured_is_kept(quick, monkeypatch):
    out, rows = quick
    monkeypatch.setattr(run, "run_jobs", lambda *_: pytest.fail("measured again"))
    bench(small=True, out=out)
    assert measured(read_rows(out / "bench.jsonl")) == measured(rows)


@pytest.mark.long
def test_other_code_is_measured_again_with_the_floors(quick, tmp_path, monkeypatch):
    (tmp_path / "bench.jsonl").write_bytes((quick[0] / "bench.jsonl").read_bytes())
    started = []
    monkeypatch.setattr(run, "run_jobs", lambda jobs, *_: started.extend(job.part for job in jobs))
    monkeypatch.setattr(run, "code_hash", lambda: "another")
    bench(["profile"], small=True, out=tmp_path, devices=("cpu",))
    assert started == ["floors", "profile"]
    assert not measured(read_rows(tmp_path / "bench.jsonl"))


def test_a_stopped_bench_reports_its_rows_and_resumes_after_the_last_finished_job(tmp_path, monkeypatch):
    started = []

    def stopped_in_the_second(jobs, threads, file, columns, bar):
        started.append(jobs[0].id)
        row = {**columns, "job": jobs[0].id, "part": "floors", "device": "cpu"}
        append_row(file, row | {"name": "copy", "gb_per_second": 12.5, "median": 1, "n": 1})
        if len(started) % 2 == 0:
            raise KeyboardInterrupt
        append_row(file, row | {"status": "done"})

    monkeypatch.setattr(run, "run_jobs", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench(["explorer"], out=tmp_path, devices=("cpu",))
    assert "| copy " in page(tmp_path)
    assert [row["job"] for row in measured(read_rows(tmp_path / "bench.jsonl"))] == started
    bench(["explorer"], out=tmp_path, devices=("cpu",))
    assert started[2:] == started[1:2]
    assert {row["job"] for row in measured(read_rows(tmp_path / "bench.jsonl"))} == set(started)


def test_a_row_is_in_the_file_before_the_next_one_is_measured(tmp_path, monkeypatch):
    def stopped_after_a_row(device):
        yield {"name": "green lipstick"}
        raise KeyboardInterrupt

    monkeypatch.setitem(worker.FUNCTIONS, "success", stopped_after_a_row)
    job = {"id": "1", "part": "fidelity", "what": "success", "arguments": {"device": "cpu"}}
    with pytest.raises(KeyboardInterrupt):
        worker.work([job], tmp_path / "rows", {"key": "k"})
    (row,) = read_rows(tmp_path / "rows")
    assert row == {"key": "k", "job": "1", "part": "fidelity", "device": "cpu", "name": "green lipstick"}


def test_each_training_of_the_success_part_is_a_job():
    trainings = [job for job in run.full("cpu") if job.what == "success"]
    assert len({job.id for job in trainings}) == len(trainings) >= 2 * 3 * 2


@pytest.mark.long
def test_another_loss_is_an_error(quick):
    rows = quick[1]
    assert tables.unequal(rows) == ""
    ours = next(row for row in rows if row.get("name") == "ours" and "losses" in row)
    losses = ours["losses"] | {"nce": ours["losses"]["nce"] * (1 + 1e-4)}
    changed = [row | {"losses": losses} if row is ours else row for row in rows]
    assert "ours at 16²: nce" in tables.unequal(changed)


def test_a_job_without_the_memory_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_gb", lambda device: 0.5)
    started = SimpleNamespace(Popen=lambda *_, **__: pytest.fail("started all the same"))
    monkeypatch.setattr(run, "subprocess", started)
    bench(["step"], small=True, out=tmp_path, devices=("cpu",))
    assert "it needs 2 GB, and 0 GB are free" in page(tmp_path)


def test_a_part_that_fails_stops_no_other(tmp_path):
    jobs = []
    for size in (7, 8):
        arguments = {"device": "cpu", "sizes": [[size, 1]], "repeats": 1, "tiny": True}
        jobs.append({"id": str(size), "part": "generator", "what": "generator", "arguments": arguments})
    worker.work(jobs, tmp_path / "rows", {})
    ended = [row for row in read_rows(tmp_path / "rows") if "status" in row]
    assert [(row["job"], row["status"]) for row in ended] == [("7", "failed"), ("8", "done")]
    assert "power of two" in ended[0]["why"]


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown part 'stepz'; the parts are: generator, step"):
        bench(["stepz"], out=tmp_path)


def test_no_run_of_a_sweep_depends_on_the_bench(monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "sha256", lambda path: seen.append(path))
    runs.code_hash()
    assert any(path.name == "trainer.py" for path in seen)
    assert not any(path.parent.name == "bench" for path in seen)


def test_the_overview_has_a_column_for_each_machine(quick, tmp_path):
    folder = quick[0]
    about = {"job": "machine", "part": "machine", "gpu": "GPU X", "cpu": "CPU Y", "flags": []}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bench.jsonl").write_bytes((folder / "bench.jsonl").read_bytes())
    (tmp_path / "a" / "sweep.md").write_text("# Many at once\n\nWords.\n", encoding="utf-8")
    pack = {"part": "scaling", "device": "cuda", "name": "pack", "dtype": "float32", "steps": 300, "n": 5}
    pack |= {"low": 0.1, "high": 0.1, "peak_gb": 1}
    steps = {
        "part": "step",
        "device": "cuda",
        "dtype": "float32",
        "peak_gb": 2,
        "n": 1,
        "losses": {"loss": 1.0},
    }
    rows = [
        about | {"commit": "abc1234"},
        pack | {"job": "p", "value": 1, "median": 0.1},
        pack | {"job": "p", "value": 4, "median": 0.2},
        steps | {"job": "s", "name": "published", "median": 9.0},
        steps | {"job": "s", "name": "ours", "median": 2.0},
    ]
    write_rows(tmp_path / "b" / "bench.jsonl", rows)
    write_rows(tmp_path / "c" / "bench.jsonl", [about | {"cpu": "CPU Z", "gpu": None}])  # no known flags
    text = report.write_overview(tmp_path).read_text(encoding="utf-8")
    header, _, *lines = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")]
    assert "(a/bench.md)" in header[0] and header[1].strip() == "[CPU Y, GPU X](b/bench.md)"
    column = [cells[1].strip() for cells in lines]
    assert column.count("abc1234") == column.count("CUDA") == 1
    assert "9.00 s, 2.00 GB (n = 1)" in column and "2.00 s, 2.00 GB (n = 1): 4.50 times faster" in column
    assert "a step 100 ms, 120 trainings an hour (n = 5)" in column
    assert "4 together: a step 200 ms, 240 trainings an hour, 2.00 times as many (n = 5)" in column
    assert "- [Many at once](a/sweep.md)" in text and "explorer: prompt" in text
