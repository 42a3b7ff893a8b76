"""``python -m cfclip.bench.worker JOBS ROWS``: does the jobs of a JSON file in this process, and writes a row as soon as it is known."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cfclip.bench import parts
from cfclip.bench.explorer import explorer

WHAT = {
    name: getattr(parts, name)
    for name in (
        "floors",
        "generator",
        "compiled",
        "generator_memory",
        "step",
        "ladder",
        "wastes",
        "growing_resolution",
        "growing_batch",
        "growing_prompts",
        "growing_sweep",
        "pictures",
        "success",
        "profile",
    )
} | {"explorer": explorer}


def work(jobs: list[dict[str, Any]], out: Path) -> None:
    """``jobs``: {id, part, what, arguments}. A row more per job says that it is done, or why not."""
    with out.open("a", encoding="utf-8") as file:

        def write(job: dict[str, Any], **row: Any) -> None:
            file.write(
                json.dumps(
                    {"job": job["id"], "part": job["part"], "device": job["arguments"]["device"]} | row,
                    ensure_ascii=False,
                )
                + "\n"
            )
            file.flush()

        for job in jobs:
            begun = time.perf_counter()
            try:
                for row in WHAT[job["what"]](**job["arguments"]):
                    write(job, **row)
            except Exception as error:  # one part that does not work here keeps no other from being measured
                words = str(error).strip().splitlines() or [""]
                write(job, status="failed", why=f"{type(error).__name__}: {words[0]}"[:300])
            else:
                write(job, status="done", took=round(time.perf_counter() - begun, 1))


if __name__ == "__main__":
    with suppress(OSError):  # if memory runs out, this process goes, and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean it
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
