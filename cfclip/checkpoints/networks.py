"""Frozen networks from official files: identity, CLIP, e4e, VGG19, LPIPS."""

import hashlib
import os
import warnings
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import lpips
import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cfclip.checkpoints import weights
from cfclip.checkpoints.reading import about, build, describe, option, read_torch, sniff, state_dict
from cfclip.files import DOWNLOADS
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.e4e import Encoder4Editing
from cfclip.models.vgg import VGG19

OPENAI_SHA256 = {
    "ViT-B-32-quickgelu": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16-quickgelu": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
}
"""open_clip's name of a model -> sha256 of OpenAI's file of it, ``ViT-B-32.pt`` and ``ViT-B-16.pt``."""
ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET}"


def load_identity(path: str | os.PathLike) -> FaceIdentity:
    """ArcFace: ``model_ir_se50.pth``, or our safetensors of kind "identity". Raises WeightsError.

    The published alignment crop belongs to networks that take 112 px (IR-SE50), as trained on FFHQ-like crops.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config, _ = weights.read(path, "identity")
            backbone = build(lambda: IRSE(**config), tensors, "identity network")
        else:
            tree = read_torch(path)
            tensors = state_dict(tree, "state_dict")
            if "input_layer.0.weight" not in tensors or "output_layer.3.weight" not in tensors:
                raise ValueError(f"it holds {describe(tree)}, where model_ir_se50.pth is needed")
            backbone = build(IRSE, tensors, "identity network")
        return FaceIdentity(backbone, crop=backbone.input_size == 112).eval()


def load_openai_clip(path: str | os.PathLike, model: str = "ViT-B-32-quickgelu") -> ClipGuide:
    """OpenAI's CLIP from its own file (the paper's is ``ViT-B-32.pt``), or from open_clip's copy of it (safetensors, or a torch state dict).

    ``model`` is open_clip's name; plain "ViT-B-32" would silently use another GELU. Frozen, float32. Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors = load_file(path)
        elif kind == "torch-zip" and _is_torchscript(path):
            with path.open("rb") as file:  # TorchScript is a program: only OpenAI's own file is opened
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != OPENAI_SHA256.get(model):
                raise ValueError(
                    f"it is a TorchScript archive, but not OpenAI's {model.removesuffix('-quickgelu')}.pt: its sha256 is {digest}"
                )
            with warnings.catch_warnings():  # torch deprecates TorchScript
                warnings.simplefilter("ignore", FutureWarning)
                tensors = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            tree = read_torch(path)
            tensors = state_dict(tree, "state_dict")
            if "text_projection" not in tensors:
                raise ValueError(f"it holds {describe(tree)}, where OpenAI's CLIP is needed")
        with torch.random.fork_rng(devices=[]):  # its random start is overwritten
            network = open_clip.CLIP(**open_clip.get_model_config(model))
        for name, tensor in network.state_dict().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ValueError(f"it has no {name} of shape {list(tensor.shape)}: it is not a {model}")
        network.load_state_dict({name: tensors[name].float() for name in network.state_dict()})
    return ClipGuide(network)


def _is_torchscript(path: Path) -> bool:
    try:
        with ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except BadZipFile:  # read_torch says what is wrong
        return False


def load_e4e(path: str | os.PathLike) -> Encoder4Editing:
    """The frozen encoder of ``e4e_ffhq_encode.pt`` (its generator: ``load_generator`` of the same file). Raises WeightsError."""
    path = Path(path)
    with about(path):
        tree = read_torch(path)
        state = state_dict(tree, "state_dict")
        tensors = {
            key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")
        }
        kind = option(tree, "encoder_type", "Encoder4Editing")
        if kind != "Encoder4Editing" or "latlayer1.weight" not in tensors:
            raise ValueError(f"it holds {describe(tree)} ({kind}), where an e4e encoder is needed")
        num_ws = len({key.split(".")[1] for key in tensors if key.startswith("styles.")})
        dim = tensors["latlayer1.weight"].shape[0]
        average = tree.get("latent_avg")
        if not isinstance(average, Tensor) or not option(tree, "start_from_latent_avg", True):
            average = torch.zeros(dim)
        if average.shape not in ((dim,), (1, dim), (num_ws, dim)):
            raise ValueError(
                f"its latent_avg has shape {list(average.shape)}, where [{num_ws}, {dim}] is needed"
            )
        return build(
            lambda: Encoder4Editing(num_ws, dim),
            tensors | {"latent_avg": average.expand(num_ws, dim)},
            "encoder",
        )


def load_vgg(path: str | os.PathLike) -> VGG19:
    """The frozen network from ``vgg19_conv.pth``. Raises WeightsError."""
    path = Path(path)
    with about(path):
        tree = read_torch(path)
        tensors = state_dict(tree, "state_dict")
        if "conv1_1.weight" not in tensors:
            raise ValueError(f"it holds {describe(tree)}, where vgg19_conv.pth is needed")
        return build(VGG19, tensors, "VGG19")


def load_lpips(path: str | os.PathLike) -> lpips.LPIPS:
    """LPIPS with AlexNet, from torchvision's ``alexnet-owt-7be5be79.pth``. Frozen. Raises WeightsError."""
    path = Path(path)
    with about(path):
        tensors = state_dict(read_torch(path), "state_dict")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
            network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        for name, module in network.net.named_modules():  # "slice2.3" is torchvision's "features.3"
            if isinstance(module, nn.Conv2d):
                for part, parameter in module.named_parameters():
                    parameter.data.copy_(tensors[f"features.{name.split('.')[-1]}.{part}"])
        return network.eval().requires_grad_(False)


def lpips_file() -> Path | None:
    """AlexNet's weights, in data/downloads or in torch's cache; None if they are on this machine in neither."""
    places = (DOWNLOADS / ALEXNET, Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET)
    return next((path for path in places if path.exists()), None)


@lru_cache(maxsize=1)
def _load_lpips(path: Path) -> lpips.LPIPS:
    return load_lpips(path)


def find_lpips() -> lpips.LPIPS | None:
    """LPIPS where its weights are on this machine, loaded once; never downloads."""
    path = lpips_file()
    return None if path is None else _load_lpips(path)


def lpips_note() -> str:
    """One sentence: which perceptual distance is used on this machine, and how to get the published one."""
    if lpips_file() is not None:
        return "LPIPS: the lpips package with AlexNet."
    return (
        "LPIPS: AlexNet's weights are not on this machine, so the same distance on the readout's encoder is used "
        f"(column lpips_readout). For the published one download {ALEXNET_URL} to data/downloads."
    )
