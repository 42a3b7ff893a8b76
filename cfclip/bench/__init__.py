"""``make bench``: what everything costs on this machine, and what of the published recipe's work we do not do.

``published.py`` does that recipe's work, each of its wastes a switch; ``networks.py`` makes a domain of FFHQ's size from random weights;
``parts.py`` and ``explorer.py`` measure, in processes of their own (``worker.py``) that ``run.py`` starts; ``report.py`` draws tables and figures.
"""

from cfclip.bench.run import PARTS, bench

__all__ = ["PARTS", "bench"]
