"""Checkpoints of a run: everything needed for exact resume, written atomically.

`checkpoint-<step>/` holds the composition as written by `MultimodalModel.save_pretrained`, the processor,
`optimizer.pt`, `rng-<rank>.pt` (read with `weights_only=True`), `training_state.json`, and `manifest.json` with the
size and digest of every file. `final/` holds the first two and a manifest. A folder is written under a temporary name,
synced and renamed, so a folder with its final name was complete; later damage shows as a mismatch with the manifest.
"""

import io
import itertools
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
from anygpt.training.folder import STATE, find_checkpoints, hide, read_state, remove, sync
from anygpt.training.processes import any_rank

OPTIMIZER = "optimizer.pt"
WITHOUT_EFFECT = (  # on the trained weights: output, logging, paths of data and start (a run can be moved), its length
    *("run.output_dir", "run.name", "run.project", "run.tracker", "run.resume", "model.init_from"),
    *("data.cache_dir", "data.num_workers", "data.in_memory", "data.eval", "train.max_steps", "train.num_epochs"),
    *("train.save_steps", "train.keep_checkpoints", "train.keep_best", "train.abort_above", "train.eval_steps"),
    "train.eval_suite",
    *("train.log_steps", "train.sample_steps", "train.sample_rows", "train.profile", "train.ema_for"),
)


def settings_that_count(config: Config) -> dict[str, Any]:
    """Settings on which the trained weights depend, by name.

    Micro-batches are counted over all processes: one process with 2b rows and two with b rows each train the same. With
    `data.max_batch_tokens`, they depend on the number of processes.
    """
    settings = config.to_dict()
    for source in settings["data"]["train"]:
        source |= {"path": Path(source["path"]).name, "media_root": None}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings["train"]["batch_size (of all processes)"] = settings["train"].pop("batch_size") * processes
    if config.data.max_batch_tokens is not None:
        settings["train"]["processes"] = processes
    return {name: value for name, value in flatten(settings).items() if not name.startswith(WITHOUT_EFFECT)}


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
    """Yield a temporary folder that replaces `folder` if the block succeeds; on all processes an `InputError` if one
    cannot write."""
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
                sync(*temporary.rglob("*"), temporary)
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
    if not any_rank(failure is not None, accelerator):
        return
    # Rust libraries raise their own types on a full disk, but the message has the errno.
    if failure is not None and not isinstance(failure, OSError) and "os error" not in str(failure):
        raise failure
    there = find_checkpoints(folder.parent)
    last = f"the last checkpoint is {there[-1]}" if there else "there is no checkpoint yet"
    reason = "another process could not write" if failure is None else str(failure)
    raise InputError(
        f"{folder} could not be written: {reason}; {last}. Make room, or check who may write there, and give the same "
        "command again"
    ) from failure


def save_state(content: Any, path: Path) -> None:
    """`torch.save` through a memory buffer: its own error on a full disk does not mention the disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def choose_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """Checkpoint to resume from by `run.resume`, or None to start anew; and notes on skipped checkpoints. It is an
    `InputError` if the given path holds no intact checkpoint, or the chosen one has other settings."""
    resume, own = config.run.resume, find_checkpoints(Path(config.run.output_dir))
    passed_over: list[str] = []
    for checkpoint in {"never": [], "auto": own[::-1]}.get(resume, [Path(resume)]):
        fault = find_fault(checkpoint) if checkpoint.is_dir() else "there is no such folder"
        if fault is None and not (checkpoint / STATE).is_file():
            fault = f"it has no {STATE}"
        if fault is None:
            check_same_settings(checkpoint, config)
            return checkpoint, passed_over
        if resume != "auto":
            raise InputError(
                f"run.resume={resume!r} is no checkpoint, or a damaged one: {fault}; give another checkpoint-<step> "
                "folder, auto or never"
            )
        passed_over.append(f"{checkpoint} is damaged and skipped: {fault}")
    return None, passed_over


def check_same_settings(checkpoint: Path, config: Config) -> None:
    before, now = read_state(checkpoint).get("settings"), settings_that_count(config)
    if before is None:
        raise InputError(f"{checkpoint} is of an older version of anygpt; start over with run.resume=never")
    named = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if named:
        others = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in named)
        raise InputError(
            f"{checkpoint} was written with other settings: {others}; give them as they were, give this run its own "
            "run.output_dir, or start over with run.resume=never"
        )


def check_same_data(checkpoint: Path, before: list[str], now: list[str], config: Config) -> None:
    """Check that the data files are unchanged: the position in the data is stored as a number of updates."""
    for source, was, there in zip(config.data.train, before, now, strict=True):
        if was != there:
            raise InputError(
                f"{source.path} does not have the same rows in the same order as when {checkpoint} was written (it "
                f"had {was}, and has {there}); restore it, or start over with run.resume=never"
            )


def load_tensors(checkpoint: Path, model: MultimodalModel) -> None:
    """Restore all tensors, also buffers and frozen projectors, since `model.init_from` may have changed, and the record
    of the training, which a run that only has to write `final/` does not make again."""
    saved = type(model).from_pretrained(checkpoint)
    model.load_state_dict(saved.state_dict())
    model.config.trained = saved.config.trained


def rng_file(checkpoint: Path, accelerator: Accelerator) -> Path:
    return checkpoint / f"rng-{accelerator.process_index}.pt"


def load_state(path: Path) -> Any:
    """Content written by `save_state`; only tensors and plain types are unpickled."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is not the state of an optimizer or of random numbers, so it is not loaded; remove its "
            "checkpoint, or give run.resume the path of another"
        ) from error


def rng_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    numpy = (kind, np.asarray(keys).tolist(), *rest)
    state: dict[str, Any] = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(checkpoint: Path, accelerator: Accelerator) -> None:
    own = rng_file(checkpoint, accelerator)
    if not own.is_file():  # the run was one of fewer processes
        return
    state = load_state(own)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
