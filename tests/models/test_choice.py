"""Which operators run, in which dtype, and whether filters are folded into kernels."""

import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import cfclip
from cfclip.models import ops
from cfclip.models.ops import choice, convolution, dispatch, frozen, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPEEDUPS = (([1.0, 0.5], True), ([1.0, 0.95], False), ([0.5, 1.0], False))
"""Seconds of the plain and the other way, and whether the other is clearly faster."""


@pytest.fixture
def forget():
    """Forget what was measured, before and after."""
    convolution.folding_pays.cache_clear()
    yield convolution.folding_pays.cache_clear
    convolution.folding_pays.cache_clear()


def test_filters_are_folded_in_half_precision_where_that_is_clearly_faster(forget, monkeypatch):
    measured = []
    f, weight = ops.setup_filter((1, 3, 3, 1)), torch.zeros(4, 3, 3, 3)
    assert not ops.folds(weight, f, torch.float32) and not ops.folds(weight, f, torch.float64)
    assert not measured
    for times, pays in SPEEDUPS:
        forget()
        measured.clear()
        result = partial(lambda times, ways, device: measured.append(device) or times, times)
        monkeypatch.setattr(convolution, "best_times", result)
        for w in (weight, weight + 1):
            assert ops.folds(w, f, torch.bfloat16) is pays
            assert ops.prepare(w, f, torch.bfloat16).phases is pays
        assert len(measured) == 1, "once for each number of channels"
    other = ops.setup_filter((1, 2, 1))
    assert not ops.folds(weight, other, torch.bfloat16), "only four taps can be folded"
    with ops.folding(True):
        assert ops.folds(weight, f, torch.float32) and not ops.folds(weight, other, torch.float32)


@pytest.mark.parametrize(("times", "fold"), SPEEDUPS)
def test_folding_is_measured_with_the_operators_of_a_frozen_generator(times, fold, forget, monkeypatch):
    weight, f = torch.zeros(4, 3, 3, 3, device=DEVICE), ops.setup_filter((1, 3, 3, 1)).to(DEVICE)
    used = []

    def best_times(ways, device):
        for way in ways:
            way()
        used.append(dispatch.operators_for(weight))
        return times

    monkeypatch.setattr(convolution, "best_times", best_times)
    with ops.using("reference"), torch.inference_mode():
        assert ops.folds(weight, f, torch.bfloat16) is ops.folds(weight, f, torch.bfloat16) is fold
    assert len(used) == 1 and used[0] is not reference


def test_ways_are_timed_alternately_until_patience_ends():
    calls = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    times = choice.best_times([slow, lambda: calls.append("quick")], torch.device("cpu"), rounds=3)
    assert times[0] >= 0.02 and times[1] < times[0] and calls == ["slow", "quick"] * 4
    calls.clear()
    choice.best_times([slow], torch.device("cpu"), patience=0.03)
    assert calls == ["slow"] * 2, "once to warm up, and the round in which patience ends"


def test_bfloat16_is_chosen_where_it_is_clearly_faster(monkeypatch):
    measure = ops.fast_dtype.__wrapped__
    for times, faster in SPEEDUPS:
        monkeypatch.setattr(choice, "best_times", lambda ways, device, times=times: times)
        assert measure(torch.device("cpu")) is (torch.bfloat16 if faster else torch.float32)

    def fails(ways, device):
        raise TypeError("no bfloat16 here")

    monkeypatch.setattr(choice, "best_times", fails)
    assert measure(torch.device("cpu")) is torch.float32


def test_which_operators_run(kernels, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_works", lambda device: True)
    x, trained = torch.zeros(1), torch.zeros(1, requires_grad=True)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=None)
    choose = dispatch.operators_for
    assert choose(on_gpu, None, trained.detach()) is kernels
    assert choose(on_gpu, trained) is reference
    with torch.no_grad():
        assert choose(on_gpu, trained) is kernels
    assert choose(SimpleNamespace(is_cuda=True, dtype=torch.float64)) is frozen
    assert choose(x) is frozen and choose(x, trained) is reference
    with ops.using("triton"):
        assert choose(x, trained) is kernels
        with ops.using("reference"):
            assert choose(on_gpu) is reference
        assert choose(x) is kernels
    assert choose(x) is frozen
    with pytest.raises(ValueError, match="'cuda'"), ops.using("cuda"):
        pass


def test_where_triton_does_not_work_a_warning_says_why(kernels, monkeypatch):
    def fails(x, e):
        raise RuntimeError("no C compiler")

    works = dispatch.triton_works.__wrapped__
    assert works(DEVICE)
    monkeypatch.setattr(kernels, "epilogue", fails)
    with pytest.warns(UserWarning, match=r"in plain torch.*no C compiler"):
        assert not works(DEVICE)


COMPILED = """
import sys, types
package = sys.modules["cfclip"] = types.ModuleType("cfclip")  # without torchvision, which imports Triton
package.__path__ = sys.argv[1:]
import cfclip.models.ops
assert "triton" not in sys.modules and "cfclip.models.ops.triton_ops" not in sys.modules

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cfclip.models.ops import triton_ops as t

integers = "C H W OUT_H OUT_W noise_step before_row before_col first_row first_col"
dtypes = dict.fromkeys(integers.split(), "i32") | dict.fromkeys("x y y0 y1 g0 g1 gx".split(), "*fp16")
dtypes |= dict.fromkeys(("slope", "gain", "clamp"), "fp32")
tile = {"LAST": True, "PIXELS": 32, "CHANNELS": 32}
fir = {"UP": 2, "DOWN": 1, "FH": 4, "FW": 4, "FLIPPED": False}
least = {"SHUFFLE": False, "TILES": 8, "C": 1, "H": 1, "W": 1}
least |= dict.fromkeys(("d", "noise", "style0", "style1", "g1", "clamp"))
kernels = [(t._upfirdn2d, fir), (t._epilogue, {"SHUFFLE": True})]
kernels += [(t._epilogue_backward, {"SHUFFLE": True, "TILES": 8}), (t._epilogue_backward, least)]
for kernel, constants in kernels:
    constants = tile | constants
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else dtypes.get(n, "*fp32") for n in names}
    source = ASTSource(kernel, signature, constants)
    print(kernel.__name__, len(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""


@pytest.mark.long
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """The interpreter accepts more than the compiler. And importing the operators does not import Triton."""
    pytest.importorskip("triton", minversion="3.3")  # the compiler's interface was different before
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, *cfclip.__path__]
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
