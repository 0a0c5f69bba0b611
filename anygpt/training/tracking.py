"""Where a run's numbers go: the console, `log.txt`, and accelerate's trackers."""

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
    """What trains, as a table: part, parameters, trainable, share."""
    total = sum(p.parameters for p in parts)
    trainable = sum(p.trainable for p in parts)
    rows = [(p.part, p.parameters, p.trainable) for p in parts] + [("total", total, trainable)]
    lines = [f"{'part':<28}{'parameters':>14}{'trainable':>14}{'share':>9}"]
    lines += [f"{name:<28}{n:>14,}{t:>14,}{t / n if n else 0:>9.2%}" for name, n, t in rows]
    return "\n".join(lines)


class RunLog:
    """Writes lines to the console and `log.txt`, and metrics to the tracker; on the main process only.

    Args:
        accelerator: its `log_with` says which tracker.
        config: the run's settings, sent to the tracker.
        total, done: updates of the run, and those done before (for the progress bar).
        facts: what the tracker gets beside the settings.
        run_id: the tracker's name of a run that goes on.

    Attributes:
        run_id: for the checkpoint, so that the run can go on in the tracker too.
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
            disable=None if self.main else True,  # None: only where somebody watches; a file gets the lines below
            dynamic_ncols=True,
            mininterval=1,
        )
        if config.run.tracker != "none":
            name, board = config.run.name or self.folder.name, config.run.tracker == "tensorboard"
            wandb = {"name": name, "dir": str(self.folder), "id": self.run_id, "resume": "allow"}
            os.environ.setdefault("WANDB_SILENT", "true")
            try:
                settings = flatten(config.to_dict() | (facts or {}))
                if board:  # it has projects by folder, and no nulls
                    settings = {key: "null" if value is None else value for key, value in settings.items()}
                project = name if board else config.run.project
                accelerator.init_trackers(project, settings, init_kwargs={} if board else {"wandb": wandb})
            except Exception as error:  # each tracker has exceptions of its own
                accelerator.trackers.clear()  # one that did not start cannot be ended
                reason = " ".join(str(error).split())
                raise InputError(f"run.tracker {config.run.tracker} cannot start: {reason}") from error

    def say(self, text: str) -> None:
        """A line, or several, for people."""
        if self.main:
            tqdm.write(text)
            with (self.folder / "log.txt").open("a") as file:
                file.write(f"{text}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line, and the tracker."""
        self.say(f"update {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        self.bar.close()


def check_tracker(config: Config) -> None:
    """Say which package a tracker needs before anything is loaded."""
    if config.run.tracker == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise InputError("run.tracker is tensorboard, which is not installed; pip install tensorboard") from error
