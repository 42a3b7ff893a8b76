"""``python -m cfclip.bench.worker FILE JOBS COLUMNS``: measures in this process; :mod:`.run` starts it."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cfclip.bench import parts
from cfclip.bench.explorer import explorer
from cfclip.files import append_row

logger = logging.getLogger(__name__)

FUNCTIONS = vars(parts) | {"explorer": explorer}


def work(jobs: Sequence[Mapping[str, Any]], file: Path, columns: Mapping[str, Any]) -> None:
    """Append the rows of ``jobs`` (:class:`.run.Job` as dicts) to the JSON lines of ``file``, one by one.

    Every row has the ``columns``. The last row of a job has a ``status``: done, or failed and ``why``.
    """
    for job in jobs:
        known = {**columns, "job": job["id"], "part": job["part"], "device": job["arguments"]["device"]}
        start = time.perf_counter()
        try:
            for row in FUNCTIONS[job["what"]](**job["arguments"]):
                append_row(file, known | row)
        except Exception as error:  # a part that does not work here must not stop the others
            logger.exception("%s failed", job["id"])
            first_line = (str(error).strip().splitlines() or [""])[0]
            why = f"{type(error).__name__}: {first_line}"[:300]
            append_row(file, known | {"status": "failed", "why": why})
        else:
            append_row(file, known | {"status": "done", "took": round(time.perf_counter() - start, 1)})


if __name__ == "__main__":
    with suppress(OSError):  # if memory runs out, the system ends this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    torch.backends.cudnn.allow_tf32 = False  # the rows called float32 are float32
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work(json.loads(sys.argv[2]), Path(sys.argv[1]), json.loads(sys.argv[3]))
