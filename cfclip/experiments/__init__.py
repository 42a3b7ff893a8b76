"""Sweeps, which are grids of notebook runs: what to run, what a run is, where it runs, and driving."""

from cfclip.experiments.runs import gather, records
from cfclip.experiments.spec import load_preset, load_spec
from cfclip.experiments.sweep import plan, sweep

__all__ = ["gather", "load_preset", "load_spec", "plan", "records", "sweep"]
