"""Evaluation: the any-to-any matrix of ToyWorld, what stands beside it, and its reports.

`anygpt evaluate` is the command.
"""

from anygpt.evaluation.statistics import wilson_interval
from anygpt.toyworld.evaluation.answers import Judged, Settings
from anygpt.toyworld.evaluation.matrix import evaluate

__all__ = ["Judged", "Settings", "evaluate", "wilson_interval"]
