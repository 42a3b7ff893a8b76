"""CF-CLIP and the methods before it behind one interface, and the library of trained editors."""

from cfclip.baselines.editor import Editor
from cfclip.baselines.library import find_editors, find_mappers, load_editor
from cfclip.baselines.many import Job, fit_many
from cfclip.baselines.methods import METHODS, configure, fit, settings

__all__ = [
    "METHODS",
    "Editor",
    "Job",
    "configure",
    "find_editors",
    "find_mappers",
    "fit",
    "fit_many",
    "load_editor",
    "settings",
]
