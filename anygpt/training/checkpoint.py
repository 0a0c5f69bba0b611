"""Checkpoints of a run: everything needed for exact resume, written atomically.

`checkpoint-<step>/` holds the composition as written by `MultimodalModel.save_pretrained`, the processor,
`optimizer.pt`, `rng-<rank>.pt` (read with `weights_only=True`), `training_state.json`, and `manifest.json` with the
size and digest of every file. `final/` holds the first two and a manifest. A folder is written under a temporary name,
synced and renamed, so a folder with its final name was complete; later damage shows as a mismatch with the manifest.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator

from anygpt.data.dataset import ConversationDataset
from anygpt.errors import InputError
from anygpt.model.multimodal import MultimodalModel
from anygpt.parts.manifest import find_fault, write_manifest
from anygpt.settings import flatten
from anygpt.training.config import Config
from anygpt.training.folder import (
    STATE,
    find_checkpoints,
    hide,
    read_state,
    remove,
    sync,
    sync_folder,
)


def settings_that_count(config: Config) -> dict[str, Any]:
    """Settings on which the trained weights depend, by name.

    Excludes output and logging, the folders of data and start (a run can be moved) and the length (it can be extended).
    Micro-batches are counted over all processes: one process with 2b rows and two with b train the same.
    """
    settings = config.to_dict()
    for source in settings["data"]["train"]:
        source |= {"path": Path(source["path"]).name, "media_root": None}
    for section, names in {
        "run": ("output_dir", "name", "project", "tracker", "resume"),
        "model": ("init_from",),  # a checkpoint contains it
        "data": ("cache_dir", "num_workers", "in_memory", "eval"),
        "train": (
            *("max_steps", "num_epochs", "save_steps", "keep_checkpoints", "keep_best", "abort_above"),
            *("eval_steps", "log_steps", "sample_steps", "sample_rows", "profile"),
        ),
    }.items():
        for name in names:
            settings[section].pop(name)
    settings["train"]["batch_size (of all processes)"] = settings["train"].pop("batch_size") * world_size()
    return flatten(settings)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_digests(dataset: ConversationDataset) -> list[str]:
    """Digest of each file of a dataset, over the ids, texts and media names of its rows in order."""
    digests, samples = [], iter(dataset.samples)
    for length in dataset.lengths:
        digest = xxhash.xxh3_128()
        for sample in itertools.islice(samples, length):
            parts = [(m.role, part) for m in sample.messages for part in m.content]
            row = [(role, p.type, p.text, p.caption, p.others, p.path and p.path.name) for role, p in parts]
            digest.update(repr((sample.id, row)).encode())
        digests.append(f"{length} rows, {digest.hexdigest()}")
    return digests


@contextmanager
def written_whole(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` if the block succeeds.

    Raises:
        InputError: on all processes, if one of them cannot write (such as on a full disk); `folder` is unchanged.
    """
    temporary = folder.parent / f".{folder.name}.incomplete"
    main = accelerator.is_main_process
    try:
        with _failing_together(folder, accelerator):
            if main:
                remove(temporary)
                temporary.mkdir(parents=True)
        with _failing_together(folder, accelerator):
            yield temporary
        with _failing_together(folder, accelerator):
            if main:
                write_manifest(temporary)
                sync_folder(temporary)
                before = hide(folder)
                os.rename(temporary, folder)
                sync(folder.parent)
                shutil.rmtree(before, ignore_errors=True)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _failing_together(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make all processes raise if the block fails on one of them, so that none waits forever."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = torch.tensor(float(failure is not None), device=accelerator.device)
    if not accelerator.reduce(failed, reduction="sum"):
        return
    if failure is not None and not is_disk_fault(failure):
        raise failure
    there = find_checkpoints(folder.parent)
    last = f"the last checkpoint is {there[-1]}" if there else "there is no checkpoint yet"
    reason = "another process could not write" if failure is None else str(failure)
    raise InputError(
        f"{folder} could not be written: {reason}; {last}. Make room, or see who may write there, and give the same "
        "command again"
    ) from failure


def is_disk_fault(error: BaseException) -> bool:
    """Whether an error comes from the disk; Rust libraries raise their own types, but the message has the errno."""
    return isinstance(error, OSError) or "os error" in str(error)


def save_model(folder: Path, model: MultimodalModel, processor: Any, accelerator: Accelerator) -> None:
    """Write a composition and its processor as `final/`."""
    with written_whole(folder, accelerator) as temporary:
        if accelerator.is_main_process:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)


def save_checkpoint(
    folder: Path,
    model: MultimodalModel,
    processor: Any,
    state: dict[str, Any],
    optimizer_state: dict[str, Any],
    random_state: dict[str, Any] | None,
    accelerator: Accelerator,
    config: Config,
) -> None:
    """Write a checkpoint.

    Args:
        folder: folder of the checkpoint.
        model, optimizer_state: unsharded, on the main process.
        state: content of `training_state.json` beside the settings.
        random_state: an earlier result of `rng_state`; the current state if None.
    """
    with written_whole(folder, accelerator) as temporary:
        if accelerator.is_main_process:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            _save(optimizer_state, temporary / "optimizer.pt")
            state = state | {"settings": settings_that_count(config)}
            (temporary / STATE).write_text(json.dumps(state, default=float, indent=1))
        _save(random_state or rng_state(), temporary / f"rng-{accelerator.process_index}.pt")


def _save(content: Any, path: Path) -> None:
    """`torch.save` through a memory buffer: its own error on a full disk does not mention the disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def choose_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """Checkpoint to resume from by `run.resume`, or None to start anew; and notes on skipped checkpoints.

    Raises:
        InputError: no intact checkpoint at the given path, or the chosen one has other settings.
    """
    resume, folder = config.run.resume, Path(config.run.output_dir)
    if resume == "never":
        return None, []
    passed_over: list[str] = []
    if resume == "auto":
        checkpoint = None
        for candidate in reversed(find_checkpoints(folder)):
            fault = find_fault(candidate)
            if fault is None:
                checkpoint = candidate
                break
            passed_over.append(f"{candidate} is damaged and passed over: {fault}")
        if checkpoint is None:
            return None, passed_over
    else:
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise InputError(
                f"run.resume={resume!r} is no checkpoint: there is no such folder; give a checkpoint-<step> folder, "
                "auto or never"
            )
        fault = find_fault(checkpoint) or (None if (checkpoint / STATE).is_file() else f"it has no {STATE}")
        if fault is not None:
            raise InputError(
                f"run.resume={resume!r} is no checkpoint, or a damaged one: {fault}; give another checkpoint-<step> "
                "folder, auto or never"
            )
    state = read_state(checkpoint)
    if not {"settings", "data"} <= state.keys():
        raise InputError(
            f"{checkpoint} was written by a version of anygpt that kept neither settings nor data in it, so no run can "
            "continue from it; start over with run.resume=never"
        )
    before, now = state["settings"], settings_that_count(config)
    if before != now:
        named = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        others = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in named)
        raise InputError(
            f"{checkpoint} was written with other settings: {others}; give them as they were, give this run its own "
            "run.output_dir, or start over with run.resume=never"
        )
    return checkpoint, passed_over


def check_same_data(checkpoint: Path, before: list[str], now: list[str], config: Config) -> None:
    """Check that the data files are unchanged: the position in the data is stored as a number of updates."""
    for source, was, there in zip(config.data.train, before, now, strict=True):
        if was != there:
            raise InputError(
                f"{source.path} has other rows, or in another order, than when {checkpoint} was written (it had {was}, "
                f"and has {there}); restore it, or start over with run.resume=never"
            )


def load_tensors(checkpoint: Path, model: MultimodalModel) -> None:
    """Restore a model's tensors, including buffers and frozen projectors: `model.init_from` may have changed."""
    model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())


def load_training_state(
    checkpoint: Path, optimizer: torch.optim.Optimizer | None, scheduler: Any, accelerator: Accelerator
) -> dict[str, Any]:
    """Restore optimizer, scheduler and random state; returns the `state` given to `save_checkpoint`.

    With `optimizer=None` its state is left to `read_optimizer_state`: a sharded optimizer loads it once prepared.
    """
    if optimizer is not None:
        optimizer.load_state_dict(read_optimizer_state(checkpoint))
    state = read_state(checkpoint)
    scheduler.load_state_dict(state["scheduler"])
    own = checkpoint / f"rng-{accelerator.process_index}.pt"
    if own.is_file():
        set_rng_state(_load(own))
    return state


def read_optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """The `optimizer_state` given to `save_checkpoint`."""
    return _load(checkpoint / "optimizer.pt")


def _load(path: Path) -> Any:
    """Content written by `_save`; only tensors and plain types are unpickled."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is no state of an optimizer or of random numbers, and is not loaded; remove its checkpoint, or "
            "give run.resume the path of another"
        ) from error


def rng_state() -> dict[str, Any]:
    """Random state of Python, NumPy, torch and its accelerator, as plain types and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
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
