"""What edits achieve and cost: metrics, measurements of an editor, statistics, tables, figures, claims."""

from cfclip.evaluation.measure import measure
from cfclip.evaluation.metrics import Edit, evaluate

__all__ = ["Edit", "evaluate", "measure"]
