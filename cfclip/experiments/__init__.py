"""Grids of notebooks: what to run, how a run is known, and where it happens."""

from cfclip.experiments.runs import gather, records
from cfclip.experiments.spec import load_preset, load_spec
from cfclip.experiments.sweep import plan, sweep

__all__ = ["gather", "load_preset", "load_spec", "plan", "records", "sweep"]
