"""What a run checks beyond single settings: metrics that are named, data that was counted, tensors that are finite."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from anygpt.data.dataset import ConversationDataset
from anygpt.errors import InputError
from anygpt.training.config import Config
from anygpt.training.sharding import local


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is no finite number; the update was not made."""


class Aborted(RuntimeError):
    """A metric went above its bound in `train.abort_above`."""


def check_metrics(config: Config, model: Any) -> None:
    """`train.keep_best` and `train.abort_above` must name metrics that this run will have."""
    train, names = config.train, ["loss", "gradient_norm", *model.loss_names()]
    evaluated = [f"eval/{name}" for name in names if name != "gradient_norm"]
    wanted = {"train.abort_above": list(train.abort_above), "train.keep_best": [train.keep_best or "loss"]}
    for setting, chosen in wanted.items():
        for name in chosen:
            if name in evaluated and not train.eval_steps:
                raise InputError(f"{setting} names {name}, but there is no evaluation; give train.eval_steps")
            if name not in names + evaluated:
                near = difflib.get_close_matches(name, names + evaluated, n=1, cutoff=0.0)[0]
                raise InputError(f"{setting} names the metric {name!r}, which there is not; did you mean {near}?")
    if train.keep_best and not train.save_steps:
        raise InputError(f"train.keep_best is {train.keep_best!r}, but there are no checkpoints; give train.save_steps")
    if train.keep_best in evaluated and train.save_steps % train.eval_steps:
        raise InputError(
            f"train.keep_best is {train.keep_best!r}, so there must be an evaluation at each checkpoint; "
            f"train.save_steps is {train.save_steps}, expected a multiple of train.eval_steps, {train.eval_steps}"
        )


def check_same_data(checkpoint: Path, state: dict[str, Any], dataset: ConversationDataset) -> None:
    """The place in the data is a number of updates, so the files must be as long as they were."""
    if state["samples"] != dataset.lengths:
        raise InputError(
            f"{checkpoint} was written over data.train files of {state['samples']} samples, which now have "
            f"{dataset.lengths}; restore the files, or start over with run.resume=never"
        )


def check_finite(model: Any, accelerator: Accelerator) -> None:
    """Raise `NonFiniteLoss`, on all processes, if something that trains is no finite number."""
    trainable = [(name, local(p)) for name, p in model.named_parameters() if p.requires_grad]
    bad = gather_object([name for name, tensor in trainable if not bool(tensor.isfinite().all())])
    if bad:
        raise NonFiniteLoss(
            f"{len(set(bad))} trained tensors are not finite, {bad[0]} first: the last updates overflowed, so they are "
            "not saved; lower train.learning_rate"
        )
