"""Fits of a few steps, for the tests of all methods."""

from cfclip.baselines.methods import fit, settings

SMALL = {"steps": 6, "batch": 2, "train_latents": 6, "samples": 3, "style_samples": 40, "beta": 0.0}


def small(method, **changes):
    """The settings of SMALL that the method has, and ``changes``."""
    return {name: value for name, value in SMALL.items() if name in settings(method)} | changes


def quick(method, domain, out=None, prompt="green lipstick", callbacks=(), **changes):
    given = small(method, **changes)
    return fit(method, domain, prompt, out=out, progress=False, callbacks=callbacks, **given)
