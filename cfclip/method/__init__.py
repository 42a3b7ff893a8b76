"""The paper, in reading order: config, objectives, losses, views, networks, trainer, loop, pack."""

from cfclip.method import losses
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.loop import Callback, run_loop
from cfclip.method.networks import FrozenNetworks
from cfclip.method.objectives import CLIPNCE, ClipDistance, Directional
from cfclip.method.trainer import MapperTrainer, train_mapper

__all__ = [
    "CLIPNCE",
    "CFCLIPConfig",
    "Callback",
    "ClipDistance",
    "Directional",
    "FrozenNetworks",
    "MapperTrainer",
    "MultiPromptConfig",
    "losses",
    "run_loop",
    "train_mapper",
]
