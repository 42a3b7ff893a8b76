"""Nothing is left on the CPU, and no float64 is made, where the networks are on another device.

That device need not be there: its tensors know their shape, dtype and device, and have no numbers. What a real one refuses, tensors of two
devices in one operator, is refused. Forward passes only: torch's autograd wants a driver.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter, tree_map_only

from cfclip.baselines import methods as baselines
from cfclip.baselines.stylespace import channel_statistics
from cfclip.domain import Domain
from cfclip.domains import load_domain
from cfclip.evaluation import metrics
from cfclip.inversion import projector as inversion
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.trainer import MapperTrainer

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore")  # of numbers that nobody chose


class Pretended(FakeTensorMode):
    """Tensors of a GPU have no numbers in here; those of the CPU have theirs. What is copied from there is zeros, a number read from there 0.5."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(
            isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type != "cpu")
            for x in tree_iter((args, kwargs))
        ):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return args[0].dtype.is_floating_point * 0.5
        if func in (
            aten.index.Tensor,
            aten.index_put_.default,
        ):  # how many a mask chooses is known of a real one
            chosen = [
                i.nonzero()[:, 0]
                if isinstance(i, Tensor) and not isinstance(i, FakeTensor) and i.dtype == torch.bool
                else i
                for i in args[1]
            ]
            args = args[0], chosen, *args[2:]
        args, kwargs = tree_map_only(
            Tensor,
            lambda t: t if isinstance(t, FakeTensor) else self.from_tensor(t.detach().clone()),
            (args, kwargs),
        )
        out = super().dispatch(func, types, args, kwargs)
        there = [t for t in tree_iter(out) if isinstance(t, FakeTensor) and t.device.type != "cpu"]
        assert all(t.dtype != torch.float64 for t in there), f"{func}: MPS has no float64"
        return tree_map_only(
            FakeTensor, lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.device.type == "cpu" else t, out
        )


def _apply(self: nn.Module, convert, recurse: bool = True) -> nn.Module:
    for module in self.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    new = convert(tensor.detach())
                    store[name] = (
                        nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    )
    return self


@pytest.fixture
def there(domain, monkeypatch) -> Domain:
    """The tiny domain on a GPU that is not there."""
    domain.clip.encode_text("green lipstick")  # what was kept from before it moved is not of that device
    monkeypatch.setattr(nn.Module, "_apply", _apply)  # torch's swaps tensors, and these cannot be
    monkeypatch.setattr(Tensor, "backward", lambda self: None)
    monkeypatch.setattr("cfclip.models.ops.dispatch.triton_works", lambda device: False)
    with Pretended():
        yield domain.to("cuda")


@pytest.mark.parametrize("device", ["gpu", "mps:3", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used on this machine"):
        load_domain("toonfaces", device)


SHORT = {"batch": 2, "train_latents": 4}


def test_two_devices_are_refused(there):
    assert there.generator.const.device.type == "cuda"
    with pytest.raises(RuntimeError, match="same device"):
        there.generator.map_one(torch.zeros(1, there.generator.z_dim))
    with pytest.raises(AssertionError, match="no float64"):
        there.generator.const.double()


@pytest.mark.parametrize(
    "config",
    [
        CFCLIPConfig("green lipstick", micro_batch=1, negatives="per_image", dtype="bfloat16", **SHORT),
        MultiPromptConfig(prompts=("green lipstick", "blue hair"), prompts_at_once=2, draws=0, **SHORT),
    ],
)
def test_a_step(config, there):
    run = MapperTrainer(there, config)
    assert (
        set(run.step(0)) >= {"loss", "l2", "id"}
        and run.w.device.type == run.source_clip.device.type == "cuda"
    )


@pytest.mark.parametrize("method", sorted(set(baselines.METHODS) - {"styleclip-global"}))
def test_a_method(method, there):
    editor = baselines.fit(method, there, "green lipstick", progress=False, steps=1)
    assert editor.edit(there.latents(2, "test"), 1.0).device.type == "cuda"


def test_channels(there):
    found, _ = channel_statistics(
        there,
        baselines.configure("styleclip-global", "green lipstick", samples=2, style_samples=20),
        progress=False,
    )
    assert found.effect.device.type == found.std.device.type == "cuda"


def test_metrics(there):
    w = there.latents(4, "test")
    ((_, edit),) = metrics.edits(
        there, "green lipstick", lambda w, strength: there.generator.synthesis(w + strength), w, [1.0]
    )
    assert {"identity", "clip_after", "leakage"} <= set(metrics.evaluate(edit)) and metrics.kid_to_renders(
        edit, 4
    )


def test_inversion(there):
    found = inversion.invert(
        there, torch.zeros(1, 3, 16, 16), inversion.InversionConfig(steps=2), progress=False
    )
    assert found.w_plus.device.type == "cuda"
