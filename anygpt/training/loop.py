"""The training loop of all stages.

An update is some micro-batches on every process. Their losses are sums; the counts that they are divided by are those
of the whole update, so that its gradient does not depend on how the update was split.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from anygpt.data.collation import BAD, SAMPLE_IDS, TARGET_IDS, Collator, move
from anygpt.data.dataset import ConversationDataset
from anygpt.errors import InputError
from anygpt.training.checkpoint import (
    choose_checkpoint,
    find_checkpoints,
    load_training_state,
    save_checkpoint,
    save_model,
)
from anygpt.training.config import Config
from anygpt.training.loading import (
    MicroBatch,
    loader_options,
    make_generators,
    make_loader,
    ridge_batches,
    take_ids,
    take_updates,
    use_frames_of,
)
from anygpt.training.ridge import set_by_ridge
from anygpt.training.setup import build, build_dataset, decoders_before
from anygpt.training.stages import Stage, prepare_stage
from anygpt.training.tracking import RunLog, check_tracker, part_table

FINAL = "final"


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is no finite number; the update was not made."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came; the run was checkpointed. The exit code is 128 + the signal's number."""


def train(config: Config, stage: Stage) -> Path:
    """Run a stage from its settings to its `final/` folder.

    Returns:
        The `final/` folder.

    Raises:
        InputError: settings, parts or data that are wrong; nothing is written then, or only checkpoints.
        NonFiniteLoss: a loss or gradient that is not finite.
    """
    check_tracker(config)
    folder = Path(config.run.output_dir)
    check_folder(folder, config)
    checkpoint = choose_checkpoint(config)
    if checkpoint is None and config.run.resume == "auto" and (folder / FINAL).exists():
        raise InputError(
            f"{folder / FINAL} is there already, and no checkpoint to continue from; choose another run.output_dir, or "
            "replace it with run.resume=never"
        )
    accelerator = Accelerator(
        # Said outright, or several processes on a machine without an accelerator would not find each other.
        cpu=config.run.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision=config.train.mixed_precision,
        log_with=None if config.run.tracker == "none" else config.run.tracker,
        project_dir=str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(config.run.seed)
    model, processor = build(config)
    names = prepare_stage(model, stage, config)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    dataset = build_dataset(config.data.train, model, config, stage)
    held_out = build_dataset(config.data.eval, model, config, stage) if config.data.eval else None
    collator = Collator(processor)
    for data in filter(None, (dataset, held_out)):
        use_frames_of(data, processor)
        data.decode_targets = model.loss_weights.wants_media
    new_decoders = [key for key in model.decoder_keys if key not in decoders_before(config)]
    strengths = {}
    if checkpoint is None and config.train.projector_init == "ridge" and new_decoders:
        model.to(accelerator.device)
        strengths = set_by_ridge(model, new_decoders, ridge_batches(dataset, collator, config, accelerator))

    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
    )
    scheduler = get_scheduler(config.train.scheduler, optimizer, config.train.warmup_steps, config.train.max_steps)
    step = 0 if checkpoint is None else load_training_state(checkpoint, model, optimizer, scheduler, accelerator)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()

    loader = make_loader(dataset, collator, config, accelerator, start=step)
    with contextlib.closing(take_updates(loader, config)) as updates:
        first = list(itertools.islice(updates, 1))  # mistakes in it are found before anything is written
        with written_or_as_before(folder, accelerator):
            prepare_folder(folder, config, accelerator)
            log = RunLog(accelerator, config, config.train.max_steps, step)
            with contextlib.closing(log), caught_signals() as caught:
                log.say(
                    f"{stage.name}: {len(dataset)} samples, {len(names)} trainable tensors\n"
                    f"{part_table(model.summarize_parts())}"
                )
                for key, strength in strengths.items():
                    log.say(f"{key} output projector set by ridge regression, λ = {strength:.3g}")
                if checkpoint is not None:
                    log.say(f"continues from {checkpoint} after update {step}")
                moved = step == config.train.max_steps
                for micro_batches in itertools.chain(first, updates):
                    metrics = update(wrapped, model, optimizer, micro_batches, step, config, accelerator, log)
                    scheduler.step()
                    step += 1
                    moved |= metrics["gradient_norm"] > 0
                    last = step == config.train.max_steps
                    log.bar.update()
                    log.bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
                    if last or step % config.train.log_steps == 0:
                        log.metrics(step, metrics | {"learning_rate": scheduler.get_last_lr()[0]})
                    if held_out is not None and config.train.eval_steps and step % config.train.eval_steps == 0:
                        log.metrics(step, evaluate(wrapped, model, held_out, collator, config, accelerator))
                    interrupted = any_rank(bool(caught), accelerator)
                    due = config.train.save_steps and (last or step % config.train.save_steps == 0)
                    if due or interrupted:
                        save_checkpoint(folder, step, model, processor, optimizer, scheduler, accelerator, config)
                    if interrupted and not last:
                        log.say(
                            f"interrupted; checkpoint after update {step} written, the same command continues from it"
                        )
                        raise Interrupted(128 + (caught[0] if caught else signal.SIGTERM))
                if not moved:
                    raise InputError(
                        "no gradient reached anything that trains, in no update: the data has nothing for the parts "
                        "that train, or every sample was skipped"
                    )
                save_model(folder / FINAL, model, processor, accelerator)
                log.say(f"finished: {folder / FINAL}")
    return folder / FINAL


def update(
    wrapped: Any,
    model: Any,
    optimizer: Any,
    micro_batches: list[MicroBatch],
    step: int,
    config: Config,
    accelerator: Accelerator,
    log: RunLog,
) -> dict[str, float]:
    """One update; returns its loss, every sub-term of it by itself, and the gradient's norm.

    Raises:
        NonFiniteLoss: before the optimizer's step.
    """
    names = model.loss_names()
    counts = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
    for batch, _ in micro_batches:
        found = model.count_losses(batch)
        counts += torch.tensor([found.get(name, 0) for name in names], dtype=torch.float64, device=counts.device)
    counts = accelerator.reduce(counts, reduction="sum")
    denominators = dict(zip(names, counts.tolist(), strict=True))
    sums = torch.zeros(len(names) + 4, dtype=torch.float64, device=accelerator.device)
    for index, (batch, ids) in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        generators = make_generators(ids[TARGET_IDS], config.run.seed, step)
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            output = wrapped(**move(batch, accelerator.device), loss_counts=denominators, generators=generators)
            # Rows without a weighted loss, or none at all: the other processes still wait for these gradients.
            loss = model.touch_trainable() if output.loss is None else output.loss
            # DDP averages gradients over processes, but this loss is a share of one sum: undo the division.
            accelerator.backward(loss * accelerator.num_processes)
        for name, term in output.losses.items():
            assert term.count <= denominators[name], f"{name} was counted as {denominators[name]}, not {term.count}"
            sums[names.index(name)] += term.total.detach().double()
        done = (float(loss.detach()), int(batch["attention_mask"].sum()), len(ids[SAMPLE_IDS]), len(ids[BAD]))
        sums[-4:] += torch.tensor(done, dtype=torch.float64, device=sums.device)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), config.train.max_grad_norm))
    *totals, loss, tokens, samples, skipped = accelerator.reduce(sums, reduction="sum").tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bad = [name for name, value in zip(names, totals, strict=True) if not math.isfinite(value)]
        seen = gather_object([sample for _, ids in micro_batches for sample in ids[SAMPLE_IDS]])
        raise NonFiniteLoss(
            f"update {step + 1}: loss {loss}, gradient norm {norm}, not finite: "
            f"{', '.join(bad) or 'the gradient'}; samples {', '.join(seen)}. The optimizer's step was not made"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    log.count(int(tokens), int(samples), int(skipped))
    means = {name: total / denominators[name] for name, total in zip(names, totals, strict=True) if denominators[name]}
    return {"loss": loss, **means, "gradient_norm": norm}


@torch.no_grad()
def evaluate(
    wrapped: Any, model: Any, dataset: ConversationDataset, collator: Collator, config: Config, accelerator: Accelerator
) -> dict[str, float]:
    """Every sub-term's mean over a dataset, and the weighted loss; noise is the same each time."""
    names = model.loss_names()
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=accelerator.device)
    size, rank, world = config.train.batch_size, accelerator.process_index, accelerator.num_processes
    order = range(len(dataset))[rank::world]
    chunks = [list(order[i : i + size]) for i in range(0, len(order), size)]
    wrapped.eval()
    loader = DataLoader(dataset, batch_sampler=chunks, collate_fn=collator, **loader_options(config))
    for batch in loader:
        ids = take_ids(batch, config)
        generators = make_generators(ids[TARGET_IDS], config.run.seed, 0)
        output = model(**move(batch, accelerator.device), generators=generators)
        for name, term in output.losses.items():
            sums[:, names.index(name)] += torch.tensor([float(term.total), term.count], dtype=torch.float64).to(sums)
    wrapped.train()
    totals, counts = accelerator.reduce(sums, reduction="sum").tolist()
    means = {name: t / c for name, t, c in zip(names, totals, counts, strict=True) if c}
    loss = sum(model.loss_weights.of(name) * mean for name, mean in means.items())
    return {f"eval/{name}": value for name, value in ({"loss": loss} | means).items()}


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


def prepare_folder(folder: Path, config: Config, accelerator: Accelerator) -> None:
    """The run's folder with its resolved settings; `run.resume=never` removes what an earlier run left."""
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        except OSError as error:
            raise _not_writable(folder, str(error)) from error
        old = list(folder.glob(".*.incomplete"))  # of a run that was killed while it wrote
        if config.run.resume == "never":
            old += [*find_checkpoints(folder), folder / FINAL]
            (folder / "log.txt").unlink(missing_ok=True)
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


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


def any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set on any process."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Note SIGTERM and SIGINT instead of dying of them: the loop checkpoints first."""
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
