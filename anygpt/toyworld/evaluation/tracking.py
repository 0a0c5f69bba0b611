"""The matrix and the contact sheet in a tracker, through accelerate's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from anygpt.errors import InputError


def log_report(tracker: str, folder: Path, report: dict[str, Any], sheet: Image.Image) -> None:
    """Log every cell as `matrix/<input>/<output>`, the numbers beside it, and the sheet.

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
    values = {name: report[name] for name in ("mean", "min")}
    values |= {name: report[name]["rate"] for name in ("unasked", "missing")}
    for name in ("matrix", "caption_baseline"):
        values |= {f"{name}/{i}/{o}": rate for i, row in report[name].items() for o, rate in row.items()}
    values |= {f"upper_bound/{o}": rate for o, rate in report["upper_bound"].items()}
    values |= {f"text_only/{kind}": found["rate"] for kind, found in report["text_only"].items()}
    accelerator.log(values, step=0)
    started = accelerator.get_tracker(tracker)
    if tracker == "wandb":
        started.log_images({"contact_sheet": [sheet]}, step=0)
    else:
        started.log_images({"contact_sheet": np.asarray(sheet)[None]}, step=0, dataformats="NHWC")
    accelerator.end_training()
