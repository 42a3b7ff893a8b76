"""CF-CLIP: counterfactual image manipulation via CLIP. Modules are imported when they are first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "baselines",
        "domains",
        "evaluation",
        "experiments",
        "explorer",
        "inversion",
        "latents",
        "models",
    ],
    submod_attrs={
        "baselines": ["find_mappers"],
        "checkpoints": ["load_generator", "load_identity", "load_latents", "load_mapper"],
        "domains": ["load_domain"],
        "inversion": ["align"],
        "method": ["CFCLIPConfig", "losses", "train_mapper"],
    },
)
