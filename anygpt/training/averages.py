"""Exponential moving averages (EMA) of what trains, by diffusers' `EMAModel`, and where they replace the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel

from anygpt.model.multimodal import MultimodalModel
from anygpt.training.checkpoint import read_optimizer_state
from anygpt.training.config import TrainConfig


class Averages:
    """The averages of a model's trainable parameters; does nothing without `train.ema_decay`.

    After update n the decay is min(ema_decay, n / (n + 9)), so that the beginning is soon forgotten.
    """

    def __init__(self, model: MultimodalModel, train: TrainConfig, checkpoint: Path | None = None):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.used_for = train.ema_for
        self.ema = None if train.ema_decay is None else EMAModel(self.parameters, decay=train.ema_decay)
        if self.ema is not None and checkpoint is not None:
            self.ema.load_state_dict(read_optimizer_state(checkpoint)["ema"])
            self.ema.to(self.parameters[0].device)

    def step(self) -> None:
        """Take in the weights after an update."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextmanager
    def instead(self, where: str) -> Iterator[None]:
        """Put the averages in place of the weights, if `train.ema_for` names this place, and the weights back."""
        if self.ema is None or where not in self.used_for:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the optimizer's state."""
        return {} if self.ema is None else {"ema": self.ema.state_dict()}
