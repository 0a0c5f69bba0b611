"""Logging of a run to the console, `log.txt`, and accelerate's trackers."""

from __future__ import annotations

import importlib.util
import os
import secrets
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from anygpt.errors import InputError
from anygpt.model.freezing import PartSummary
from anygpt.settings import flatten
from anygpt.training.config import Config
from anygpt.training.folder import LOG


def part_table(parts: list[PartSummary]) -> str:
    """Table of parts: parameters, trainable parameters, share."""
    total = PartSummary("total", sum(p.parameters for p in parts), sum(p.trainable for p in parts))
    lines = [f"{'part':<28}{'parameters':>14}{'trainable':>14}{'share':>9}"]
    for p in (*parts, total):
        share = p.trainable / p.parameters if p.parameters else 0
        lines.append(f"{p.part:<28}{p.parameters:>14,}{p.trainable:>14,}{share:>9.2%}")
    return "\n".join(lines)


class RunLog:
    """Writes lines to the console and `log.txt`, and metrics to the tracker; on the main process only.

    Args:
        accelerator: its `log_with` selects the tracker.
        config: the run's settings, sent to the tracker.
        done: updates already done.
        facts: further values for the tracker.
        run_id: the tracker's id of a resumed run.

    Attributes:
        run_id: saved in checkpoints, so that the tracker can resume the run too.
    """

    def __init__(self, accelerator: Accelerator, config: Config, done: int, facts: dict[str, Any], run_id: str | None):
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.folder = Path(config.run.output_dir)
        self.run_id = run_id or secrets.token_hex(4)
        self.bar = tqdm(
            total=config.train.max_steps,
            initial=done,
            desc=self.folder.name,
            unit="update",
            disable=None if self.main else True,  # None: on a terminal only; a file gets the lines below
            dynamic_ncols=True,
            mininterval=1,
        )
        if config.run.tracker != "none":
            self.start_tracker(config, flatten(config.to_dict() | facts))

    def start_tracker(self, config: Config, settings: dict[str, Any]) -> None:
        name, project, options = config.run.name or self.folder.name, config.run.project, {}
        if config.run.tracker == "tensorboard":  # it separates projects by folder and takes no nulls
            project = name
            settings = {key: "null" if value is None else value for key, value in settings.items()}
        else:
            os.environ.setdefault("WANDB_SILENT", "true")
            wandb = {"name": name, "dir": str(self.folder), "id": self.run_id, "resume": "allow"}
            options = {"wandb": wandb}
        try:
            self.accelerator.init_trackers(project, settings, init_kwargs=options)
        except Exception as error:  # each tracker raises its own types
            self.accelerator.trackers.clear()  # a tracker that did not start cannot be ended
            reason = " ".join(str(error).split())
            raise InputError(f"run.tracker {config.run.tracker} cannot start: {reason}") from error

    def say(self, text: str) -> None:
        """Write one or several lines."""
        if self.main:
            tqdm.write(text)
            with (self.folder / LOG).open("a") as file:
                file.write(f"{text}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log metrics as one line and to the tracker."""
        self.say(f"update {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.accelerator.log(values, step=step)

    def advance(self, loss: float) -> None:
        """Move the progress bar by one update."""
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

    def close(self) -> None:
        self.bar.close()


def check_tracker(config: Config) -> None:
    """Check, before anything is loaded, that the tracker's package is installed."""
    if config.run.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise InputError("run.tracker is tensorboard, which is not installed; pip install tensorboard")
