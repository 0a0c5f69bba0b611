"""Numbers and pictures of an evaluation in a tracker, through accelerate's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from anygpt.errors import InputError


def log_values(
    tracker: str, folder: Path, values: Mapping[str, float], images: Mapping[str, Image.Image] | None = None
) -> None:
    """Log numbers and pictures.

    Args:
        tracker: `wandb`, `tensorboard`, or `none`.
        folder: where a tracker keeps its files; its name is the run's.

    Raises:
        InputError: the tracker cannot start.
    """
    if tracker == "none":
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    accelerator = Accelerator(log_with=tracker, project_dir=str(folder), cpu=True)
    options = {"wandb": {"name": folder.name, "dir": str(folder)}} if tracker == "wandb" else {}
    try:
        accelerator.init_trackers("anygpt", init_kwargs=options)
    except Exception as error:  # each tracker has exceptions of its own
        raise InputError(f"--tracker {tracker} cannot start: {' '.join(str(error).split())}") from error
    accelerator.log(dict(values), step=0)
    started = accelerator.get_tracker(tracker)
    for name, image in (images or {}).items():
        if tracker == "wandb":
            started.log_images({name: [image]}, step=0)
        else:
            started.log_images({name: np.asarray(image)[None]}, step=0, dataformats="NHWC")
    accelerator.end_training()
