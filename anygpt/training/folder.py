"""A run's folder: what it holds, checked before anything is loaded, prepared before the first update, undone after a
mistake. A manifest in each folder that is written whole tells the size and digest of its files, so that a damaged one
is known for one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator

from anygpt.errors import InputError
from anygpt.training.config import Config

FINAL, SAMPLES, LOG = "final", "samples", "log.txt"
STATE = "training_state.json"
PREFIX = "checkpoint-"
STOPPED = "stopped-"  # a checkpoint for inspection, which no run continues from by itself
GIB = 2**30
PACKAGES = (
    "anygpt-link",
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "safetensors",
    "datasets",
    "numpy",
)
_NAME = re.compile(rf"{PREFIX}(\d+)")


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
            old += [*find_checkpoints(folder), *folder.glob("set-aside-*"), *folder.glob(f"{STOPPED}*")]
            old += [folder / FINAL, folder / SAMPLES]
            (folder / LOG).unlink(missing_ok=True)
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


def sync_folder(folder: Path) -> None:
    """Put a folder's files, and the folders' entries of them, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Put one file, or one folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Remove a folder; one that is killed half way does not leave half a folder under its name."""
    shutil.rmtree(hide(folder), ignore_errors=True)


def hide(folder: Path) -> Path:
    """Rename a folder, if it is there, to what the next start of the run removes."""
    hidden = folder.parent / f".{folder.name.removeprefix('.')}.removed.incomplete"
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        os.rename(folder, hidden)
    return hidden


def find_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints by their names, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The updates done, by a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A whole checkpoint's `training_state.json`."""
    return json.loads((checkpoint / STATE).read_text())


MAX = "max:"  # before a metric whose highest value is the best


def best_checkpoint(folder: Path, metric: str) -> tuple[Path, float] | None:
    """The checkpoint whose metric was lowest (of `max:metric` highest), and the metric; None where none has it."""
    sign, metric = (-1, metric.removeprefix(MAX)) if metric.startswith(MAX) else (1, metric)
    values = {}
    for path in find_checkpoints(folder):
        if (path / STATE).is_file():
            values[path] = read_state(path)["metrics"].get(metric)
    values = {path: value for path, value in values.items() if value is not None and math.isfinite(value)}
    return min(values.items(), key=lambda item: sign * item[1], default=None)


def remove_old(folder: Path, config: Config) -> None:
    """Remove checkpoints beyond `train.keep_checkpoints`, but not the best by `train.keep_best`."""
    best = best_checkpoint(folder, config.train.keep_best) if config.train.keep_best else None
    for old in find_checkpoints(folder)[: -config.train.keep_checkpoints]:
        if best is None or old != best[0]:
            remove(old)


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints from beyond `step`: damaged ones, or of a branch that the run leaves. Returns what was done.

    Left where they are, they would count as newer than those that the run is about to write.
    """
    lines = []
    for path in find_checkpoints(folder):
        if step_of(path) > step:
            aside = folder / f"set-aside-{step_of(path)}"
            remove(aside)
            os.rename(path, aside)
            lines.append(f"{path.name} is beyond update {step}, and now called {aside.name}")
    return lines


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Commit, versions and hardware, for `environment.json` and the tracker."""
    return {
        "git": git_state(Path(__file__).resolve().parent),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "distributed": str(accelerator.distributed_type.value),
        "processes": accelerator.num_processes,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and branch of the code, and the files that differ from the commit; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD").strip(),
            "changed": [line[3:] for line in git("status", "--porcelain").splitlines()],
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
