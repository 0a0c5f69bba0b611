"""A run's folder: checked before anything is loaded, prepared before the first update, undone after a mistake."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from anygpt.errors import InputError
from anygpt.training.checkpoint import find_checkpoints, set_aside
from anygpt.training.config import Config

FINAL = "final"


def check_folder(folder: Path, config: Config) -> None:
    """The run's folder must be one that can be written to, and not the one that the run starts from."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise _not_writable(folder, f"{there} {'may not be written to' if there.is_dir() else 'is not a folder'}")
    start = config.model.init_from
    if start is not None and Path(start).resolve().parent == folder.resolve():
        raise InputError(
            f"model.init_from={start!r} lies in run.output_dir={str(folder)!r}, which this run writes to; choose "
            "another run.output_dir"
        )


def _not_writable(folder: Path, reason: str) -> InputError:
    return InputError(f"run.output_dir={str(folder)!r} cannot be written to: {reason}; choose another folder")


def prepare_folder(
    folder: Path, config: Config, environment: dict[str, Any], step: int, accelerator: Accelerator
) -> list[str]:
    """The run's folder with its resolved settings and what it runs on.

    `run.resume=never` removes what an earlier run left; else checkpoints beyond `step` are set aside.

    Returns:
        What was done to checkpoints, in lines for people.
    """
    lines: list[str] = []
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
            (folder / "environment.json").write_text(json.dumps(environment, indent=1))
        except OSError as error:
            raise _not_writable(folder, str(error)) from error
        old = list(folder.glob(".*.incomplete"))  # of a run that was killed while it wrote
        if config.run.resume == "never":
            old += [*find_checkpoints(folder), *folder.glob("set-aside-*"), *folder.glob("stopped-*")]
            old += [folder / FINAL, folder / "samples"]
            (folder / "log.txt").unlink(missing_ok=True)
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        lines = set_aside(folder, step)
    accelerator.wait_for_everyone()
    return lines


@contextlib.contextmanager
def written_or_as_before(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """After a mistake that shows only later, a folder that was made for this run and holds no checkpoint goes again."""
    there = folder.exists()
    try:
        yield
    except InputError:
        if accelerator.is_main_process and not there and not find_checkpoints(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
