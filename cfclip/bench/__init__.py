"""``make bench``: what everything costs on this machine, compared with the work of the published recipe.

:mod:`.published` repeats that work, with a switch for each piece that is wasted. :mod:`.networks` makes a
domain of FFHQ's size from random weights. :mod:`.parts` and :mod:`.explorer` measure, in processes
(:mod:`.worker`) that :mod:`.run` starts. :mod:`.tables` and :mod:`.report` write the results.
"""
