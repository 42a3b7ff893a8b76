"""Sweeps: grids of notebook runs.

spec (what to run), parameters (of notebooks), runs (what a run is), packs (trainings of many
runs at once), executors, sweep (driving).
"""

from cfclip.experiments.parameters import check_parameters
from cfclip.experiments.runs import gather, measured, records
from cfclip.experiments.spec import load_preset, load_spec
from cfclip.experiments.sweep import plan, sweep

__all__ = ["check_parameters", "gather", "load_preset", "load_spec", "measured", "plan", "records", "sweep"]
