"""Nothing is left on the CPU, and no float64 is made, where the networks are on another device.

That device need not exist: its tensors have a shape, dtype and device, but no numbers. As on a real one, an
operator refuses tensors of two devices. Forward passes only: torch's autograd needs a driver.
"""

from functools import cache, partial

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
from cfclip.evaluation.kid import kid_to_renders
from cfclip.inversion import projector as inversion
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.loop import Request, generator_for
from cfclip.method.networks import FrozenNetworks
from cfclip.method.objectives import CLIPNCE
from cfclip.method.pack import Pack, Stack
from cfclip.method.trainer import MapperTrainer
from cfclip.models.ops import using

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore")  # they are about numbers that are made up
SHORT = {"batch": 2, "train_latents": 4}
PER_IMAGE = CLIPNCE(negatives="per_image")


def is_elsewhere(x) -> bool:
    return isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type != "cpu")


class PretendedDevice(FakeTensorMode):
    """Tensors of a GPU have no numbers; those of the CPU do.

    A tensor copied from the GPU is zeros, a number read from there is 0.5.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(map(is_elsewhere, tree_iter((args, kwargs)))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return args[0].dtype.is_floating_point * 0.5
        if func in (aten.index.Tensor, aten.index_put_.default):
            # a mask of the CPU has numbers, so how many elements it selects is known
            args = args[0], [indices_of(i) for i in args[1]], *args[2:]
        args, kwargs = tree_map_only(Tensor, self.fake, (args, kwargs))
        out = super().dispatch(func, types, args, kwargs)
        made = [t for t in tree_iter(out) if isinstance(t, FakeTensor) and t.device.type != "cpu"]
        assert all(t.dtype != torch.float64 for t in made), f"{func}: MPS has no float64"
        return tree_map_only(FakeTensor, zeros_on_cpu, out)

    def fake(self, t: Tensor) -> FakeTensor:
        return t if isinstance(t, FakeTensor) else self.from_tensor(t.detach().clone())


def indices_of(index):
    is_mask = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
    return index.nonzero()[:, 0] if is_mask else index


def zeros_on_cpu(t: FakeTensor) -> Tensor:
    return torch.zeros(t.shape, dtype=t.dtype) if t.device.type == "cpu" else t


def replace_tensors(self: nn.Module, convert, recurse: bool = True) -> nn.Module:
    for module in self.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    new, trained = convert(tensor.detach()), tensor.requires_grad
                    store[name] = nn.Parameter(new, trained) if isinstance(tensor, nn.Parameter) else new
    return self


@pytest.fixture
def there(domain, monkeypatch) -> Domain:
    """The tiny domain on a GPU that does not exist."""
    domain.clip.encode_text("green lipstick")  # cached on the CPU; must not be used on the GPU
    monkeypatch.setattr(Tensor, "backward", lambda self: None)
    monkeypatch.setattr(
        nn.Module, "_apply", replace_tensors
    )  # torch's changes them in place; these cannot be
    with PretendedDevice(), using("frozen"):  # Triton needs a real GPU
        yield domain.to("cuda")


@pytest.mark.parametrize("device", ["gpu", "mps:3", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_does_not_exist_is_named(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used on this machine"):
        load_domain("toonfaces", device)


def test_two_devices_in_one_operator_are_refused(there):
    assert there.generator.const.device.type == "cuda"
    with pytest.raises(RuntimeError, match=r"same device|two different devices"):
        there.generator.map_one(torch.zeros(1, there.generator.z_dim))
    with pytest.raises(AssertionError, match="no float64"):
        there.generator.const.double()


@pytest.mark.parametrize(
    "config",
    [
        CFCLIPConfig("green lipstick", micro_batch=1, objective=PER_IMAGE, dtype="bfloat16", **SHORT),
        MultiPromptConfig(prompts=("green lipstick", "blue hair"), prompts_at_once=2, num_views=0, **SHORT),
    ],
)
def test_a_training_step_runs_on_the_device(config, there):
    run = MapperTrainer(there, config)
    assert set(run.step(0, generator_for(0, 0))) >= {"loss", "l2", "id"}
    assert run.w.device.type == run.sources.clip.device.type == "cuda"


def test_a_step_of_a_pack_runs_on_the_device(there):
    """Two trainings in one stack, and one beside it, whose numbers are not looked at."""
    networks = cache(partial(FrozenNetworks, there))
    jobs = [("cfclip", "green lipstick"), ("cfclip", "blue hair"), ("styleclip-mapper", "blue hair")]
    configs = [baselines.configure(method, prompt, **SHORT) for method, prompt in jobs]
    runs = [MapperTrainer(there, config, networks=networks) for config in configs]
    pack = Pack()
    logs = pack.step({run: Request(0, generator_for(0, 0), False) for run in runs})
    assert [type(unit) for unit in pack.units] == [Stack, MapperTrainer]
    for run in runs:
        assert set(logs[run]) >= {"loss", "l2", "id"}
        assert all(value.device.type == "cuda" for value in logs[run].values())
    pack.give_back(runs)


@pytest.mark.parametrize("method", sorted(set(baselines.METHODS) - {"styleclip-global"}))
def test_a_method_fits_and_edits_on_the_device(method, there):
    few = {"steps": 1} | ({"train_latents": 2} if "train_latents" in baselines.settings(method) else {})
    with using("reference" if method.startswith("nada") else "frozen"):  # NADA trains the generator
        editor = baselines.fit(method, there, "green lipstick", progress=False, **few)
    assert editor.edit(there.latents(2, "test"), 1.0).device.type == "cuda"


def test_channel_statistics_are_on_the_device(there):
    config = baselines.configure("styleclip-global", "green lipstick", samples=2, style_samples=20)
    statistics, _ = channel_statistics(there, config, progress=False)
    assert statistics.effect.device.type == statistics.std.device.type == "cuda"


def test_metrics_are_measured_on_the_device(there):
    def draw(w, strength):
        return there.generator.synthesis(w + strength)

    ((_, edit),) = metrics.edits(there, "green lipstick", draw, there.latents(4, "test"), [1.0])
    assert {"identity", "clip_after", "leakage"} <= set(metrics.evaluate(edit))
    assert kid_to_renders(edit, 4)


def test_photos_are_inverted_on_the_device(there):
    config = inversion.InversionConfig(steps=2)
    result = inversion.invert(there, torch.zeros(1, 3, 16, 16), config, progress=False)
    assert result.w_plus.device.type == "cuda"
