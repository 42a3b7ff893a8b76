"""Frozen networks from official files: identity, CLIP, e4e, VGG19, LPIPS."""

import os
import warnings
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import lpips
import open_clip
import torch
from torch import nn

from cfclip.checkpoints import weights
from cfclip.checkpoints.reading import (
    about,
    build,
    find_networks,
    mean_latent,
    official_state,
    option,
    part_of,
    read_torch,
    sniff,
    the_network,
)
from cfclip.checkpoints.safe_pickle import open_zip
from cfclip.checkpoints.weights import check_numbers
from cfclip.files import DOWNLOADS, sha256
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.e4e import Encoder4Editing
from cfclip.models.vgg import VGG19

OPENAI_SHA256 = {
    "ViT-B-32-quickgelu": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16-quickgelu": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14-quickgelu": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}
"""open_clip's name of a model -> sha256 of OpenAI's file with its weights, e.g. ``ViT-B-32.pt``."""
ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET}"


def load_identity(path: str | os.PathLike) -> FaceIdentity:
    """Load ArcFace from ``model_ir_se50.pth`` or our safetensors of kind "identity". Raises WeightsError.

    Networks with an input of 112 px (IR-SE50) see images through the published alignment crop of FFHQ faces.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config, _ = weights.read(path, "identity")
        else:
            names, config = ("input_layer.0.weight", "output_layer.3.weight"), {}
            tensors = official_state(read_torch(path), "model_ir_se50.pth", *names)
        backbone = build(lambda: IRSE(**config), tensors, "identity network")
        return FaceIdentity(backbone, crop=backbone.input_size == 112).eval()


def load_vgg(path: str | os.PathLike) -> VGG19:
    """The frozen network from ``vgg19_conv.pth``. Raises WeightsError."""
    with about(Path(path)):
        return build(VGG19, official_state(read_torch(path), "vgg19_conv.pth", "conv1_1.weight"), "VGG19")


def load_openai_clip(path: str | os.PathLike, model: str = "ViT-B-32-quickgelu") -> ClipGuide:
    """Load CLIP from OpenAI's file (in the paper ``ViT-B-32.pt``) or open_clip's copy (safetensors, torch).

    ``model`` is open_clip's name; "ViT-B-32" without "-quickgelu" would silently use another GELU.
    Frozen, float32. Raises WeightsError.
    """
    path, kind, config = Path(path), sniff(path), open_clip.get_model_config(model)
    with about(path):
        if config is None:
            raise ValueError(f"open_clip has no model {model!r}; OpenAI's are {', '.join(OPENAI_SHA256)}")
        if kind == "safetensors":
            tensors = official_state(weights.read_tensors(path), "OpenAI's CLIP", "text_projection")
        elif kind == "torch-zip" and _is_torchscript(path):
            digest = sha256(path)  # TorchScript is a program: only OpenAI's own file is opened
            if digest != OPENAI_SHA256.get(model):
                raise ValueError(
                    f"it is a TorchScript archive, but not OpenAI's {model.removesuffix('-quickgelu')}.pt: "
                    f"its sha256 is {digest}"
                )
            with warnings.catch_warnings():  # torch deprecates TorchScript
                warnings.simplefilter("ignore", FutureWarning)
                tensors = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            tensors = official_state(read_torch(path), "OpenAI's CLIP", "text_projection")
        with torch.random.fork_rng(devices=[]):  # the random initial weights are overwritten
            network = open_clip.CLIP(**config)
        for name, tensor in network.state_dict().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ValueError(f"it has no {name} of shape {list(tensor.shape)}: it is not a {model}")
            check_numbers(name, tensors[name], tensor)
        network.load_state_dict({name: tensors[name].float() for name in network.state_dict()})
    return ClipGuide(network)


def _is_torchscript(path: Path) -> bool:
    try:
        with path.open("rb") as file, open_zip(file) as archive:
            return any("/code/" in name for name in archive.namelist())
    except BadZipFile:  # read_torch reports it
        return False


def load_e4e(path: str | os.PathLike) -> Encoder4Editing:
    """The frozen encoder of ``e4e_ffhq_encode.pt``. Raises WeightsError.

    The generator in the same file is read by :func:`cfclip.load_generator`.
    """
    path = Path(path)
    with about(path):
        tree = read_torch(path)
        names = "latlayer1.weight", "input_layer.0.weight"
        place, tensors = the_network(find_networks(tree, *names), tree, "an e4e encoder", names[0])
        kind = option(tree, "encoder_type", "Encoder4Editing")
        if not isinstance(kind, str) or kind != "Encoder4Editing":
            named = kind[:60] if isinstance(kind, str) else type(kind).__name__
            raise ValueError(f"its encoder is a {named}, but an e4e encoder (Encoder4Editing) is needed")
        num_ws = len({key.split(".")[1] for key in tensors if key.startswith("styles.")})
        dim = tensors["latlayer1.weight"].shape[0]
        average = mean_latent(tree, place)
        if option(tree, "start_from_latent_avg", average is not None) in (False, None):
            average = torch.zeros(dim)
        if average is None:
            raise ValueError("it has no latent_avg, from which its codes start: the file is incomplete")
        check_numbers("latent_avg", average)
        if average.shape not in ((dim,), (1, dim), (num_ws, dim)):
            raise ValueError(f"its latent_avg has shape {list(average.shape)}, but needs [{num_ws}, {dim}]")
        tensors["latent_avg"] = average.expand(num_ws, dim)
        return build(lambda: Encoder4Editing(num_ws, dim), tensors, "encoder")


@lru_cache(maxsize=2)
def load_lpips(path: str | os.PathLike, device: str | torch.device = "cpu") -> lpips.LPIPS:
    """LPIPS with torchvision's ``alexnet-owt-7be5be79.pth``, frozen and cached. Raises WeightsError."""
    path = Path(path)
    with about(path):
        tensors = official_state(read_torch(path), ALEXNET, "features.0.weight")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
            network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        for name, tensor in part_of(tensors, "features.").items():
            check_numbers(f"features.{name}", tensor)
        for name, module in network.net.named_modules():  # "slice2.3" is torchvision's "features.3"
            if isinstance(module, nn.Conv2d):
                module.load_state_dict(part_of(tensors, f"features.{name.split('.')[-1]}."))
        return network.eval().requires_grad_(False).to(device)


def lpips_file() -> Path | None:
    """AlexNet's weights in data/downloads or in torch's cache; None if neither has them."""
    for folder in (DOWNLOADS, Path(torch.hub.get_dir()) / "checkpoints"):
        if (folder / ALEXNET).exists():
            return folder / ALEXNET
    return None


def find_lpips(device: str | torch.device = "cpu") -> lpips.LPIPS | None:
    """LPIPS, cached per device; None if its weights are not local. Never downloads. Raises WeightsError."""
    path = lpips_file()
    return path and load_lpips(path, str(device))


def lpips_note() -> str:
    """A note on which perceptual distance this machine uses and, if it lacks LPIPS, how to get that."""
    if lpips_file() is not None:
        return "LPIPS: the lpips package with AlexNet."
    return (
        "LPIPS: AlexNet's weights are not on this machine, so the same distance on the readout's encoder is "
        f"used (column lpips_readout). For the published one download {ALEXNET_URL} to data/downloads."
    )
