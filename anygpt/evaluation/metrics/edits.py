"""ToyWorld's edits, by what was asked for and by the rest (see `anygpt.toyworld.edits.judge`)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from anygpt.evaluation.metrics.base import Batch, Metric, Value, mean_value
from anygpt.toyworld.edits import judge, look


class EditScore(Metric):
    """Share of pictures that changed what was asked (`_changed`), that kept the rest (`_kept`), and both (`_right`)."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.scores: dict[str, list[float]] = defaultdict(list)

    def update(self, batch: Batch) -> None:
        seen = (look(batch.media(role, self.modality)) for role in ("source", "target", "answer"))
        for pictures in zip(*seen, strict=True):
            changed, kept = judge(*pictures)
            self.scores["_changed"].append(changed)
            self.scores["_kept"].append(kept)
            self.scores["_right"].append(changed and kept)

    def compute(self) -> dict[str, Value]:
        return {name: mean_value(scores) for name, scores in self.scores.items()}
