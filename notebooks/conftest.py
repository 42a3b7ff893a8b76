"""pytest runs each notebook at the settings of presets/smoke.yaml, in seconds; outputs are not compared."""

from nbval.plugin import IPyNbCell
from papermill.translators import papermill_translators

from cfclip.experiments.spec import load_preset, parameters_of
from cfclip.files import NOTEBOOKS


def pytest_collection_modifyitems(items):
    smoke = load_preset(NOTEBOOKS / "presets" / "smoke.yaml")
    python = papermill_translators.find_translator("python3", "python")
    for item in items:
        if isinstance(item, IPyNbCell) and "parameters" in item.cell.metadata.get("tags", []):
            known = parameters_of(item.parent.path)
            given = {name: value for name, value in smoke.items() if name in known}
            item.cell.source += "\n" + python.codify(given, "presets/smoke.yaml")
