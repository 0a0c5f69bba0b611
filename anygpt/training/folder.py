"""The folder of a run: checked before loading, prepared before the first update, restored after a user error."""

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
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator

from anygpt.errors import InputError, refusing
from anygpt.training.config import Config

FINAL, SAMPLES, EVALUATION, LOG = "final", "samples", "evaluation", "log.txt"
PARTS, PROFILE = "parts", "profile"
STATE = "training_state.json"
PREFIX = "checkpoint-"
STOPPED = "stopped-"  # a checkpoint for inspection, ignored by `run.resume=auto`
MAX = "max:"  # prefix of metrics whose highest value is best
GIB = 2**30


def check_folder(folder: Path, config: Config) -> None:
    """Check that the run's folder is writable and is not the one that the run starts from."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = f"{there} {'may not be written to' if there.is_dir() else 'is not a folder'}"
        raise InputError(f"run.output_dir={str(folder)!r} cannot be written to: {reason}; choose another folder")
    model, own = config.model, folder.resolve()
    parts = [model.language_model, *model.encoders.values(), *model.decoders.values(), *model.tokenizers.values()]
    read = [("a part of the model", part.path, own / PARTS) for part in parts if part is not None]
    for what, path, written in (("model.init_from", model.init_from, own), *read):
        if path is not None and Path(path).resolve().parent == written:
            raise InputError(
                f"{what}={path!r} lies in run.output_dir={str(folder)!r}, which this run writes to; choose another "
                "run.output_dir"
            )


def prepare_folder(
    folder: Path, config: Config, environment: dict[str, Any], step: int, accelerator: Accelerator
) -> list[str]:
    """Create the run's folder and write its resolved settings and environment; returns lines about changed checkpoints.

    `run.resume=never` removes the output of an earlier run; otherwise checkpoints beyond `step` are set aside.
    """
    lines: list[str] = []
    if accelerator.is_main_process:
        with refusing(f"run.output_dir={str(folder)!r} cannot be written to", (OSError,), "; choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
            (folder / "environment.json").write_text(json.dumps(environment, indent=1))
        old = list(folder.glob(".*.incomplete"))  # left by a run killed while writing
        if config.run.resume == "never":
            old += [*find_checkpoints(folder), *folder.glob("set-aside-*"), *folder.glob(f"{STOPPED}*")]
            old += [folder / name for name in (FINAL, SAMPLES, EVALUATION, PARTS, PROFILE)]
            (folder / LOG).unlink(missing_ok=True)
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        lines = set_aside(folder, step)
    accelerator.wait_for_everyone()
    return lines


@contextlib.contextmanager
def written_or_as_before(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Remove a folder created for this run if the block fails before its first checkpoint."""
    there = folder.exists()
    try:
        yield
    except InputError:
        if accelerator.is_main_process and not there and not find_checkpoints(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def sync(*paths: Path) -> None:
    """Flush files, or the entries of folders, to disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(folder: Path) -> None:
    """Remove a folder; it is renamed first, so an interruption leaves no partial folder under its name."""
    shutil.rmtree(hide(folder), ignore_errors=True)


def hide(folder: Path) -> Path:
    """Rename a folder, if it exists, to a name that the next start of the run removes."""
    hidden = folder.parent / f".{folder.name.removeprefix('.')}.removed.incomplete"
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        os.rename(folder, hidden)
    return hidden


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run by name, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def best_checkpoint(folder: Path, metric: str | None) -> tuple[Path, float] | None:
    """Checkpoint with the lowest value of a metric (highest for `max:metric`), and the value; None if none has it."""
    if metric is None:
        return None
    sign, name = (-1 if metric.startswith(MAX) else 1), metric.removeprefix(MAX)
    there = [path for path in find_checkpoints(folder) if (path / STATE).is_file()]
    values = [(path, read_state(path)["metrics"].get(name)) for path in there]
    finite = [(path, value) for path, value in values if value is not None and math.isfinite(value)]
    return min(finite, key=lambda item: sign * item[1], default=None)


def remove_old(folder: Path, config: Config) -> None:
    """Remove checkpoints beyond `train.keep_checkpoints`, except the best by `train.keep_best`."""
    best = best_checkpoint(folder, config.train.keep_best)
    for old in find_checkpoints(folder)[: -config.train.keep_checkpoints]:
        if best is None or old != best[0]:
            remove(old)


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step`, which are damaged or of an abandoned branch; returns lines about them.

    Otherwise they would count as newer than those that the run is about to write. Evaluations and samples beyond `step`
    are removed, since they would be mistaken for those of the coming updates, or contradict them.
    """
    lines = []
    for path in (*(folder / EVALUATION).glob("*"), *(folder / SAMPLES).glob("*")):
        if path.name.isdigit() and int(path.name) > step:
            remove(path)
    for path in find_checkpoints(folder):
        if step_of(path) > step:
            aside = folder / f"set-aside-{step_of(path)}"
            remove(aside)
            os.rename(path, aside)
            lines.append(f"{path.name} is beyond update {step}, and was renamed to {aside.name}")
    return lines


@cache
def packages() -> dict[str, str]:
    return {package.name: package.version for package in importlib.metadata.distributions()}


def environment(accelerator: Accelerator) -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "commit": commit or None,
        "packages": packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "distributed": str(accelerator.distributed_type.value),
        "processes": accelerator.num_processes,
    }
