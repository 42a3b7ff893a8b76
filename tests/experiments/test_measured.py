"""What a run has measured is not measured again by the notebook that gathers."""

import pandas as pd

from cfclip.baselines import fit, load_editor
from cfclip.evaluation import measure
from cfclip.experiments import measured
from cfclip.experiments.runs import Run, code_hash, weights_hash, write_record
from cfclip.experiments.spec import find_notebook
from cfclip.files import read_rows, write_rows

SEEN = {"n": 3, "seed": 5, "strengths": [0.5, 1.0]}


def test_rows_of_the_same_faces_strengths_and_code_are_those_of_the_run(domain, tmp_path):
    trained = fit("offset", domain, "red hair", out=tmp_path, progress=False, steps=2, train_latents=2)
    anew = measure(trained, domain.latents(3, "test", 5), [0.5, 1.0])
    file = write_rows(tmp_path / "metrics.jsonl", pd.DataFrame(anew).to_dict("records"))

    today = {"code": code_hash(), "weights": weights_hash(domain.name, {})}

    def record(**content: str) -> None:
        run = Run("a", find_notebook("02_training"), SEEN | {"device": "cpu"}, today | content)
        write_record(run, tmp_path, "finished")

    record()
    editor = load_editor(tmp_path, domain)
    found = measured(editor, **SEEN, device="cpu")
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(anew), check_exact=True)
    write_rows(file, [row | {"identity": 7.0} for row in read_rows(file)])  # so that one sees what is read
    assert {row["identity"] for row in measured(editor, **SEEN)} == {7.0}
    other = [{"n": 2}, {"seed": 6}, {"strengths": [1.0]}, {"device": "cuda"}]
    assert not any(row["identity"] == 7.0 for one in other for row in measured(editor, **SEEN | one))
    assert measured(trained, **SEEN) == anew, "an editor that was not opened from a file"
    for name in today:
        record(**{name: "of an earlier version"})
        assert measured(editor, **SEEN) == anew
