from . import baselines, domains, evaluation, experiments, explorer, inversion, latents, models
from .baselines import find_mappers
from .checkpoints import load_generator, load_identity, load_latents, load_mapper
from .domains import load_domain
from .inversion import align
from .method import CFCLIPConfig, losses, train_mapper

__all__ = [
    "CFCLIPConfig",
    "align",
    "baselines",
    "domains",
    "evaluation",
    "experiments",
    "explorer",
    "find_mappers",
    "inversion",
    "latents",
    "load_domain",
    "load_generator",
    "load_identity",
    "load_latents",
    "load_mapper",
    "losses",
    "models",
    "train_mapper",
]
