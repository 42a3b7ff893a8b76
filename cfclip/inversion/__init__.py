"""Inversion of photos into W+, after aligning them like the generator's training faces."""

from cfclip.inversion import align
from cfclip.inversion.projector import InversionConfig, encode, held_out, invert

__all__ = ["InversionConfig", "align", "encode", "held_out", "invert"]
