"""Logging of an evaluation's numbers and images through accelerate's trackers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from anygpt.errors import InputError


def log_values(tracker: str, folder: Path, values: Mapping[str, float], **images: Image.Image) -> None:
    """Log numbers and images to `wandb` or `tensorboard` (or `none`), with files in `folder`.

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
    except Exception as error:  # each tracker raises its own types
        raise InputError(f"--tracker {tracker} cannot start: {' '.join(str(error).split())}") from error
    accelerator.log(dict(values), step=0)
    for name, image in images.items():
        content, form = ([image], {}) if tracker == "wandb" else (np.asarray(image)[None], {"dataformats": "NHWC"})
        accelerator.get_tracker(tracker).log_images({name: content}, step=0, **form)
    accelerator.end_training()
