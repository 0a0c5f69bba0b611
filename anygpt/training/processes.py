"""The processes of a run: start, signals, agreement, and shutdown."""

import contextlib
import importlib.util
import signal
import traceback
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from anygpt.errors import InputError
from anygpt.model.multimodal import MultimodalModel
from anygpt.training.config import Config
from anygpt.training.sharding import local


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is not finite; the update was not made."""


class Aborted(RuntimeError):
    """A metric went above its bound in `train.abort_above`."""


class Interrupted(SystemExit):
    """The run was checkpointed after a signal, as `line` says. The exit code is 128 + the signal's number."""

    def __init__(self, number: int, line: str):
        super().__init__(128 + number)
        self.line = line


@contextlib.contextmanager
def started(config: Config) -> Iterator[Accelerator]:
    """Yield the run's accelerator; at the end, close its trackers and destroy its process group.

    All references to the wrapped model must be gone by then, so run the stage in a function of its own: once the group
    is destroyed, DDP's destructor holds the GIL while it waits for gloo's threads, which may need the GIL to free
    their last tensors.
    """
    if config.run.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise InputError("run.tracker is tensorboard, which is not installed; pip install tensorboard")
    accelerator = Accelerator(
        # Must be explicit: otherwise several processes on a machine without an accelerator form no process group.
        cpu=config.run.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision=config.train.mixed_precision,
        log_with=None if config.run.tracker == "none" else config.run.tracker,
        project_dir=config.run.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    try:
        yield accelerator
    except BaseException as error:
        if accelerator.num_processes > 1:
            traceback.clear_frames(error.__traceback__)  # they reference the wrapped model
        raise
    finally:
        accelerator.free_memory()
        accelerator.end_training()


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Record SIGTERM and SIGINT instead of exiting, so that the loop can write a checkpoint first."""
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(flag: bool, accelerator: Accelerator) -> bool:
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def check_finite(model: MultimodalModel) -> None:
    """Raise `NonFiniteLoss` on all processes if a trainable parameter is not finite."""
    trainable = [(name, local(p)) for name, p in model.named_parameters() if p.requires_grad]
    bad = gather_object([name for name, tensor in trainable if not bool(tensor.isfinite().all())])
    if bad:
        raise NonFiniteLoss(
            f"{len(set(bad))} trained tensors are not finite, {bad[0]} first: the last updates overflowed, so they are "
            "not saved; lower train.learning_rate"
        )


def add_up(values: Mapping[str, torch.Tensor | float], accelerator: Accelerator) -> dict[str, float]:
    """The sums of scalars over all processes, in float64; a collective call, for which names have the same order."""
    device = accelerator.device
    scalars = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()]
    return dict(zip(values, accelerator.reduce(torch.stack(scalars), reduction="sum").tolist(), strict=True))
