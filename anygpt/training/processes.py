"""The processes of a run: how they start together, and how they part."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from anygpt.training.config import Config


@contextlib.contextmanager
def processes(config: Config) -> Iterator[Accelerator]:
    """The run's accelerator; at the end its trackers are closed and its process group is left.

    What holds the wrapped model must be gone by then, so run the stage in a function of its own: the destructor of DDP
    keeps Python's lock while it waits for gloo's threads, and these may need that lock to drop their last tensors. As
    long as the group is held elsewhere there is nothing to wait for.
    """
    accelerator = Accelerator(
        # Said outright, or several processes on a machine without an accelerator would not find each other.
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
            traceback.clear_frames(error.__traceback__)  # they hold the wrapped model too
        raise
    finally:
        accelerator.free_memory()
        accelerator.end_training()
