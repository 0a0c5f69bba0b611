"""Logging of a run to the console, `log.txt`, and accelerate's trackers."""

from __future__ import annotations

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


def part_table(parts: list[PartSummary]) -> str:
    """Table of parts: parameters, trainable parameters, share."""
    total = sum(p.parameters for p in parts)
    trainable = sum(p.trainable for p in parts)
    rows = [(p.part, p.parameters, p.trainable) for p in parts] + [("total", total, trainable)]
    lines = [f"{'part':<28}{'parameters':>14}{'trainable':>14}{'share':>9}"]
    lines += [f"{name:<28}{n:>14,}{t:>14,}{t / n if n else 0:>9.2%}" for name, n, t in rows]
    return "\n".join(lines)


class RunLog:
    """Writes lines to the console and `log.txt`, and metrics to the tracker; on the main process only.

    Args:
        accelerator: its `log_with` selects the tracker.
        config: the run's settings, sent to the tracker.
        total, done: updates of the run, and those already done (for the progress bar).
        facts: further values for the tracker.
        run_id: the tracker's id of a resumed run.

    Attributes:
        run_id: saved in checkpoints, so that the tracker can resume the run too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        total: int,
        done: int,
        facts: dict[str, Any] | None = None,
        run_id: str | None = None,
    ):
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.folder = Path(config.run.output_dir)
        self.run_id = run_id or secrets.token_hex(4)
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=self.folder.name,
            unit="update",
            disable=None if self.main else True,  # None: on a terminal only; a file gets the lines below
            dynamic_ncols=True,
            mininterval=1,
        )
        if config.run.tracker != "none":
            name, board = config.run.name or self.folder.name, config.run.tracker == "tensorboard"
            wandb = {"name": name, "dir": str(self.folder), "id": self.run_id, "resume": "allow"}
            os.environ.setdefault("WANDB_SILENT", "true")
            try:
                settings = flatten(config.to_dict() | (facts or {}))
                if board:  # tensorboard separates projects by folder and takes no nulls
                    settings = {key: "null" if value is None else value for key, value in settings.items()}
                project = name if board else config.run.project
                accelerator.init_trackers(project, settings, init_kwargs={} if board else {"wandb": wandb})
            except Exception as error:  # each tracker raises its own types
                accelerator.trackers.clear()  # a tracker that did not start cannot be ended
                reason = " ".join(str(error).split())
                raise InputError(f"run.tracker {config.run.tracker} cannot start: {reason}") from error

    def say(self, text: str) -> None:
        """Write one or several lines."""
        if self.main:
            tqdm.write(text)
            with (self.folder / "log.txt").open("a") as file:
                file.write(f"{text}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log metrics as one line and to the tracker."""
        self.say(f"update {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        self.bar.close()


def check_tracker(config: Config) -> None:
    """Check, before anything is loaded, that the tracker's package is installed."""
    if config.run.tracker == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise InputError("run.tracker is tensorboard, which is not installed; pip install tensorboard") from error
