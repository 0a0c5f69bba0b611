"""How well single answers fit what was asked for: cosines of features, and labels of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anygpt.evaluation.metrics.base import Batch, Mean, Value

Score = Callable[[Batch], list[float]]


class ClipScore(Mean):
    """100 times a mean of cosines, not below 0, as torchmetrics takes it (arXiv 2104.08718)."""

    def compute(self) -> dict[str, Value]:
        value = super().compute()[""]
        return {"": value | {"value": max(value["value"], 0.0), "interval": [max(x, 0.0) for x in value["interval"]]}}


def cosine(network: Any, modality: str, role: str, num_frames: int | None) -> Score:
    """100 times the cosine of an answer and its `role`: `caption`, `source` or `target`."""

    def score(batch: Batch) -> list[float]:
        answers = batch.features(network, "answer", modality, num_frames)
        return (100 * F.cosine_similarity(answers, batch.features(network, role, modality, num_frames))).tolist()

    return score


def frames_to_text(network: Any, modality: str, num_frames: int | None) -> Score:
    """CLIPSIM (arXiv 2104.14806): 100 times the cosine of a caption and each frame, as a mean over frames."""

    def score(batch: Batch) -> list[float]:
        texts = batch.features(network, "caption", modality)
        return [
            float(100 * F.cosine_similarity(frames, text[None]).mean())
            for frames, text in zip(_frames(network, batch, modality, num_frames), texts, strict=True)
        ]

    return score


def frames_to_frames(network: Any, modality: str, num_frames: int | None) -> Score:
    """100 times the cosine of each frame and the next, as a mean; of a single frame 100."""

    def score(batch: Batch) -> list[float]:
        clips = _frames(network, batch, modality, num_frames)
        pairs = (F.cosine_similarity(f[:-1], f[1:]) if len(f) > 1 else torch.ones(1) for f in clips)
        return [float(100 * cosines.mean()) for cosines in pairs]

    return score


def _frames(network: Any, batch: Batch, modality: str, num_frames: int | None) -> list[Tensor]:
    return [network.of_frames(clip.frames) for clip in batch.media("answer", modality, num_frames)]


def label_divergence(network: Any, modality: str) -> Score:
    """KL(labels of the true sound ‖ labels of the answer), of a classifier's softmax, in nats."""

    def score(batch: Batch) -> list[float]:
        answers, targets = (
            batch.features(network, role, modality).double().log_softmax(-1) for role in ("answer", "target")
        )
        return F.kl_div(answers, targets, reduction="none", log_target=True).sum(-1).tolist()

    return score
