"""Files read in a process of their own, with a limit on its memory: ``run`` is called by tests."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GIB = 1 << 30
NO_MEMORY = re.compile(r"MemoryError|allocate|memory")
"""In a message: the limit was hit, and the refusal is not one of the reader's own."""


def run(module: str, *args: str | Path | int, seconds: float, memory: float) -> dict:
    """The report of ``module``'s ``files(*args)``, each read with ``memory`` GiB above what the imports take.

    A process that is lost, by a crash or after ``seconds``, is an error.
    """
    command = [sys.executable, __file__, str(memory), module, *map(str, args)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the same code as here
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env)
    if done.returncode:
        raise AssertionError(f"the process was lost: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def read(files: Iterator[tuple[str, str, Path]], memory: float) -> dict:
    """Read each of ``files``, (name, loader, path)."""
    import cfclip
    from cfclip.checkpoints import WeightsError

    resource.setrlimit(resource.RLIMIT_AS, (_size() + int(memory * GIB),) * 2)
    report: dict = {"files": {}, "loaded": 0, "wrong": [], "slowest": [0, ""]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, loader, path in files:
        start, message = time.process_time(), "loaded"
        try:
            getattr(cfclip.checkpoints, loader)(path)
        except WeightsError as error:
            message = str(error)
            if NO_MEMORY.search(message.replace("memory of its own", "")):
                report["wrong"].append(f"{name}: out of memory: {message[:300]}")
            if str(path) not in message or len(message) > 1000:
                report["wrong"].append(f"{name}: {message[:1500]}")
        except BaseException as error:  # whatever else comes out is wrong
            report["wrong"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        report["loaded"] += message == "loaded"
        report["files"][name] = message
        report["slowest"] = max(report["slowest"], [round(time.process_time() - start, 2), name])
    report["peak"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 << 20)  # GiB
    return report


def _size() -> int:
    """Bytes of address space that this process has now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    from importlib import import_module

    import torch

    torch.set_num_threads(1)
    print(json.dumps(read(import_module(sys.argv[2]).files(*sys.argv[3:]), float(sys.argv[1]))))
