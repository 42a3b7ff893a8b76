"""Sweeps: grids of notebook runs.

Modules: spec (what to run), parameters (checks of notebooks' parameters), runs (one run), packs (many
trainings at once), executors (where runs happen), sweep (drives the runs), notebooks (the committed ones).
"""

from cfclip.experiments.parameters import check_parameters
from cfclip.experiments.runs import gather, measured, records
from cfclip.experiments.spec import load_preset, load_spec
from cfclip.experiments.sweep import plan, sweep

__all__ = ["check_parameters", "gather", "load_preset", "load_spec", "measured", "plan", "records", "sweep"]
