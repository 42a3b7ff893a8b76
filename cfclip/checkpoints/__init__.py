"""Every reader and writer of weight files. Opening a file never runs anything that is in it."""

# ruff: noqa: F401 (what other modules import from here)
from cfclip.checkpoints.convert import convert
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.latents import load_latents
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.networks import load_e4e, load_identity, load_openai_clip, load_vgg
from cfclip.checkpoints.weights import WeightsError
