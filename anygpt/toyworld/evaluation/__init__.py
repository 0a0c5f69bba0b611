"""Evaluation on ToyWorld: the any-to-any matrix, its baselines and its reports (`anygpt evaluate`)."""

from anygpt.evaluation.statistics import wilson_interval
from anygpt.toyworld.evaluation.answers import Judged, Settings
from anygpt.toyworld.evaluation.matrix import evaluate

__all__ = ["Judged", "Settings", "evaluate", "wilson_interval"]
