"""Checkpoints of a run: everything that exact resume needs, written whole or not at all.

`checkpoint-<step>/` holds the composition as `MultimodalModel.save_pretrained` writes it, the processor, and
`optimizer.pt`, `rng-<rank>.pt` (read with `weights_only=True`) and `training_state.json`. `final/` holds the first
two. A folder is written beside its place and renamed, so one that bears its name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from anygpt.errors import InputError
from anygpt.training.config import Config

STATE = "training_state.json"
PREFIX = "checkpoint-"


def config_digest(config: Config) -> str:
    """A digest of the settings on which the trained weights depend; where and how often a run writes is not in it."""
    settings = config.to_dict()
    for section, names in {
        "run": ("output_dir", "name", "project", "tracker", "resume"),
        "data": ("num_workers", "eval"),
        "train": ("save_steps", "keep_checkpoints", "eval_steps", "log_steps"),
    }.items():
        for name in names:
            settings[section].pop(name)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def written_whole(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place when the block ends without an error."""
    temporary = folder.parent / f".{folder.name}.incomplete"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield temporary
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()


def save_model(folder: Path, model: Any, processor: Any, accelerator: Accelerator) -> None:
    """Write a composition and its processor as `final/`."""
    with written_whole(folder, accelerator) as temporary:
        if accelerator.is_main_process:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)


def save_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    processor: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    accelerator: Accelerator,
    config: Config,
) -> None:
    """Write `checkpoint-<step>` into a run's folder, and remove those beyond `train.keep_checkpoints`."""
    with written_whole(folder / f"{PREFIX}{step}", accelerator) as temporary:
        if accelerator.is_main_process:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
            state = {"step": step, "config": config_digest(config), "scheduler": scheduler.state_dict()}
            (temporary / STATE).write_text(json.dumps(state, default=float))
        torch.save(rng_state(), temporary / f"rng-{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        for old in find_checkpoints(folder)[: -config.train.keep_checkpoints]:
            shutil.rmtree(old)


def find_checkpoints(folder: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def choose_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `run.resume` asks for, or None to start at the beginning.

    Raises:
        InputError: no checkpoint at the given path; or the run's folder holds those of other settings.
    """
    resume, folder = config.run.resume, Path(config.run.output_dir)
    if resume == "never":
        return None
    if resume == "auto":
        found = find_checkpoints(folder)
        if not found:
            return None
        checkpoint = found[-1]
    else:
        checkpoint = Path(resume)
        if not (checkpoint / STATE).is_file():
            raise InputError(
                f"run.resume={resume!r} is no checkpoint: it has no {STATE}; give a checkpoint-<step> "
                "folder, auto or never"
            )
    if json.loads((checkpoint / STATE).read_text())["config"] != config_digest(config):
        raise InputError(
            f"{checkpoint} was written with other settings; give this run its own run.output_dir, or start over with "
            "run.resume=never"
        )
    return checkpoint


def load_training_state(
    checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, accelerator: Accelerator
) -> int:
    """Put tensors, optimizer, scheduler and random state back; returns the number of updates done."""
    restored = type(model).from_pretrained(checkpoint)
    # Everything, buffers and frozen projectors too: what `model.init_from` holds by now may be another model.
    model.load_state_dict(restored.state_dict())
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"))
    state = json.loads((checkpoint / STATE).read_text())
    scheduler.load_state_dict(state["scheduler"])
    own = checkpoint / f"rng-{accelerator.process_index}.pt"
    if own.is_file():
        set_rng_state(torch.load(own, weights_only=True))
    return state["step"]


def rng_state() -> dict[str, Any]:
    """The random state of Python, NumPy, torch and its accelerator, of plain types and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
