"""Sweeps: grids of notebook runs: spec (what to run), runs (what a run is), executors, sweep (driving)."""

from cfclip.experiments.runs import gather, records
from cfclip.experiments.spec import load_preset, load_spec
from cfclip.experiments.sweep import plan, sweep

__all__ = ["gather", "load_preset", "load_spec", "plan", "records", "sweep"]
