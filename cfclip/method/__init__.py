"""The paper, in reading order: config, objectives, losses, views, networks, trainer, loop, pack."""

# ruff: noqa: F401 (what other modules import from here)
from cfclip.method import losses
from cfclip.method.config import CFCLIPConfig
from cfclip.method.loop import Callback, run_loop
from cfclip.method.networks import FrozenNetworks
from cfclip.method.objectives import CLIPNCE, ClipDistance, Directional
from cfclip.method.trainer import MapperTrainer, train_mapper
