"""Micro-batches of updates: data loaders, ids, and noise generators."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import random
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from anygpt.cache.reading import LANGUAGE_MODEL, open_cache
from anygpt.data.collation import BAD, NOT_FOR_MODEL, SAMPLE_IDS, Collator, move
from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.data.lengths import Lengths
from anygpt.data.sampling import UpdateSampler
from anygpt.data.workers import end_with_parent
from anygpt.encoders.module import EncoderRefusal
from anygpt.errors import InputError
from anygpt.media.types import VIDEO, is_timed
from anygpt.model.multimodal import MultimodalModel
from anygpt.training.config import Config

MicroBatch = tuple[dict[str, Any], dict[str, Any]]  # arguments of the model, and the entries removed by `take_ids`


class BadSampleError(InputError):
    """Unreadable sample in this process's batch."""


def take_updates(loader: DataLoader, config: Config) -> Generator[list[MicroBatch], None, None]:
    """Yield the micro-batches of each update."""
    taken = ((batch, take_ids(batch, config)) for batch in loader)
    while micro_batches := list(itertools.islice(taken, config.train.gradient_accumulation_steps)):
        yield micro_batches


def take_ids(batch: dict[str, Any], config: Config) -> dict[str, Any]:
    """Remove and return the entries of a batch that are not for the model; raises for bad samples unless skipped."""
    ids, data = {name: batch.pop(name) for name in NOT_FOR_MODEL}, config.data
    policies = {"bad": data.on_bad_sample, "long": data.on_long_sample, "stale": "error"}
    for sample in ids[BAD]:
        if policies[sample.kind] == "error":
            raise BadSampleError(sample.reason)
    return ids


@contextmanager
def naming_rows(
    dataset: ConversationDataset, collator: Collator, model: MultimodalModel, ids: dict[str, Any]
) -> Iterator[None]:
    """Turn an encoder's refusal of a batch into an error that names the first row that is refused by itself."""
    try:
        yield
    except EncoderRefusal as refusal:
        for index, sample in enumerate(dataset.samples):
            if sample.id in ids[SAMPLE_IDS] and isinstance(loaded := dataset[index], LoadedSample):
                try:
                    with torch.no_grad():
                        data = collator.encoder_inputs([loaded])[0]
                        data = {n: v for n, v in data.items() if n.partition(".")[0] not in model.tokenizer_keys}
                        model.encode(move(data, model.device))
                except InputError as error:
                    raise BadSampleError(sample.naming(error)) from error
        raise BadSampleError(f"one of the rows {', '.join(ids[SAMPLE_IDS])}: {refusal}") from refusal


def make_generators(target_ids: dict[str, list[str]], seed: int, step: int) -> dict[str, list[torch.Generator]]:
    """One generator per target, seeded by (seed, update, target), so that noise does not depend on the split."""

    def generator(target: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{step}/{target}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    return {key: [generator(target) for target in targets] for key, targets in target_ids.items()}


def make_loader(
    dataset: ConversationDataset, collator: Collator, config: Config, accelerator: Accelerator, start: int
) -> DataLoader:
    """Loader of this process's micro-batches from update `start` on; accelerate must not shard them again."""
    data, train, sizes = config.data, config.train, None
    lengths = Lengths(collator.processor, dataset.num_video_frames)
    if data.max_batch_tokens is not None or data.group_by_length:
        sizes = np.minimum(lengths.estimate(dataset.samples), data.max_length or sys.maxsize)
    sampler = UpdateSampler(
        dataset.lengths,
        weights=dataset.weights,
        batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        num_updates=train.max_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=config.run.seed,
        start_update=start,
        groups=dataset.output_groups() if data.group_by_modality else None,
        sizes=sizes,  # type: ignore[arg-type]  # an array is indexed like a sequence
        max_tokens=data.max_batch_tokens,
        packed=data.pack_to is not None,
    )
    pinned = accelerator.device.type == "cuda"
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, pin_memory=pinned, **loader_options(config))


def count_epochs(config: Config, dataset: ConversationDataset, processes: int) -> list[str]:
    """Set `train.max_steps` from `train.num_epochs` if given; returns lines for the log."""
    data, train = config.data, config.train
    if train.num_epochs is None:
        return []
    micro, parts = train.batch_size * processes, train.gradient_accumulation_steps
    groups = dataset.output_groups() if data.group_by_modality else [0] * sum(dataset.lengths)
    settings: dict[str, Any] = {"batch_size": micro, "num_updates": sys.maxsize, "seed": config.run.seed}
    sampler = UpdateSampler(dataset.lengths, weights=dataset.weights, groups=groups, **settings)
    rows = sampler.epoch_size
    train.max_steps = math.ceil(train.num_epochs * rows / (micro * parts))
    if data.group_by_modality or data.group_by_length:  # the last micro-batch of a group, or of an epoch, may be short
        drawn = itertools.accumulate(map(len, sampler))
        full = itertools.takewhile(lambda count: count < train.num_epochs * rows, drawn)
        train.max_steps = math.ceil((1 + sum(1 for _ in full)) / parts)
    if train.warmup_steps > train.max_steps:
        raise InputError(
            f"train.warmup_steps is {train.warmup_steps}, expected at most the {train.max_steps} updates of "
            f"train.num_epochs = {train.num_epochs:g}"
        )
    return [f"{train.num_epochs:g} epochs of {rows} rows, {micro * parts} an update: {train.max_steps} updates"]


def loader_options(config: Config) -> dict[str, Any]:
    return {
        "num_workers": config.data.num_workers,
        "worker_init_fn": leave_signals_to_the_loop,
        # The loader would otherwise draw a seed from the main process's random state.
        "generator": torch.Generator().manual_seed(config.run.seed),
    }


def leave_signals_to_the_loop(worker: int) -> None:
    """Ignore signals in workers, so that the loop can finish its update; workers end with the loop's process."""
    os.setpgid(0, 0)
    end_with_parent(worker)


def ridge_batches(
    dataset: ConversationDataset, collator: Collator, config: Config, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """Yield the training captions in batches, the same on every process, without decoding targets that no tokenizer
    encodes. Of more than `train.ridge_captions` rows, that many are drawn at random, as rows are ordered by file."""
    rows = [i for i, sample in enumerate(dataset.samples) if any(role == "assistant" for role, _ in sample.media())]
    if len(rows) > config.train.ridge_captions:
        rows = sorted(random.Random(config.run.seed).sample(rows, config.train.ridge_captions))
    captions = copy.copy(dataset)
    captions.decode_targets = bool(collator.processor.spans)
    chosen, size = Subset(captions, rows), config.train.batch_size
    loader = DataLoader(chosen, batch_size=size, collate_fn=collator, **loader_options(config))
    quiet = None if accelerator.is_main_process else True
    for batch in tqdm(loader, desc="ridge", unit="batch", disable=quiet, mininterval=1):
        take_ids(batch, config)
        yield move(batch, accelerator.device)


def use_cache(
    datasets: list[ConversationDataset], collator: Collator, model: MultimodalModel, config: Config, sharded: bool
) -> list[str]:
    """Make datasets and collator read outputs of frozen parts from the feature cache; returns log lines, one per part.

    Call after `prepare_stage` and `use_frames_of`; `sharded` if the language model's layers are.
    """
    if config.data.cache_dir is None:
        return []
    frames, precision = datasets[0].num_video_frames, config.train.mixed_precision
    cache = open_cache(config.data.cache_dir, model, collator.processor, frames, precision)
    for dataset in datasets:
        dataset.use_cache(cache)
    if not sharded:
        collator.cache = cache
        return cache.notes
    # All processes gather each layer together, so none may skip the language model while others need it.
    notes = [note for note in cache.notes if not note.startswith(f"{LANGUAGE_MODEL}:")]
    return [*notes, f"{LANGUAGE_MODEL}: computed anew: its layers are sharded"]


def use_frames_of(dataset: ConversationDataset, processor: Any) -> None:
    """Make the dataset decode only as many frames of a clip as its consumers sample, and references for decoders that
    take them, and leave bad samples to the loop."""
    consumers = [*processor.encoder_processors.values(), *processor.targets.values(), *processor.coded.values()]
    timed = [c for c in consumers if is_timed(getattr(c, "modality", VIDEO.name))]  # not a sound's frames
    dataset.num_video_frames = max((c.num_frames for c in timed if hasattr(c, "num_frames")), default=None)
    dataset.references = {processor.makes[key] for key, one in processor.targets.items() if one.reference}
    dataset.on_bad_sample = "skip"
