"""CF-CLIP: counterfactual image manipulation via CLIP."""

from . import ablation, baselines, domains, evaluation, latents, losses, mapper, metrics, multiprompt, reporting
from .checkpoints import load_generator, load_identity, load_latents, load_mapper
from .domains import load_domain
from .method import CFCLIPConfig, find_mappers, train_mapper

__all__ = ["CFCLIPConfig", "ablation", "baselines", "domains", "evaluation", "find_mappers", "latents", "load_domain", "load_generator",
           "load_identity", "load_latents", "load_mapper", "losses", "mapper", "metrics", "multiprompt", "reporting", "train_mapper"]
