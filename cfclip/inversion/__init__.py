"""Photos: aligned as the generator's training faces were, then inverted into W+."""

from cfclip.inversion import align
from cfclip.inversion.projector import InversionConfig, encode, held_out, invert

__all__ = ["InversionConfig", "align", "encode", "held_out", "invert"]
