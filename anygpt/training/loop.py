"""The training loop of all stages.

An update is some micro-batches on every process. Their losses are sums; the counts that they are divided by are those
of the whole update, so that its gradient does not depend on how the update was split.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader

from anygpt.data.collation import BAD, CUT, SAMPLE_IDS, TARGET_IDS, Collator, move
from anygpt.data.dataset import ConversationDataset
from anygpt.errors import InputError
from anygpt.training.checkpoint import (
    PREFIX,
    best_checkpoint,
    choose_checkpoint,
    load_tensors,
    load_training_state,
    read_optimizer_state,
    remove_old,
    rng_state,
    save_checkpoint,
    save_model,
)
from anygpt.training.checks import Aborted, NonFiniteLoss, check_finite, check_metrics, check_same_data
from anygpt.training.config import Config
from anygpt.training.folder import FINAL, check_folder, prepare_folder, written_or_as_before
from anygpt.training.loading import (
    MicroBatch,
    loader_options,
    make_generators,
    make_loader,
    ridge_batches,
    take_ids,
    take_updates,
    use_cache,
    use_frames_of,
)
from anygpt.training.optimization import clip_gradients, compile_layers, learning_rates, make_optimizer
from anygpt.training.processes import processes
from anygpt.training.record import environment
from anygpt.training.ridge import set_by_ridge
from anygpt.training.samples import generate_answers, log_answers, write_answers
from anygpt.training.setup import build, build_dataset, decoders_before
from anygpt.training.sharding import (
    check_sharding,
    gather_into,
    is_sharded,
    load_optimizer_state,
    optimizer_state,
    prepare,
)
from anygpt.training.stages import Stage, prepare_stage
from anygpt.training.tracking import RunLog, check_tracker, part_table

STOPPED = "stopped-"  # a checkpoint for inspection, which no run continues from by itself


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came; the run was checkpointed. The exit code is 128 + the signal's number."""


@dataclass
class Run:
    """Everything that updates need and move: the parts, the state, and where it stands.

    Attributes:
        wrapped: the model as accelerate prepared it.
        whole: the model to save; see `sharding.prepare`.
        step: updates done.
    """

    config: Config
    accelerator: Accelerator
    model: Any
    processor: Any
    wrapped: Any
    whole: Any
    optimizer: Any
    scheduler: Any
    dataset: ConversationDataset
    held_out: ConversationDataset | None
    collator: Collator
    step: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)

    def save(self, name: str, log: RunLog, metrics: dict[str, float], random_state: dict | None = None) -> Path:
        """Write a checkpoint `<name><step>` and return its folder.

        Raises:
            NonFiniteLoss: something that trains is not finite, which no checkpoint may hold that a run continues from.
        """
        if name == PREFIX:
            check_finite(self.model, self.accelerator)
        path = self.folder / f"{name}{self.step}"
        state = {"step": self.step, "samples": self.dataset.lengths, "tracker_run": log.run_id, "metrics": metrics}
        gather_into(self.whole, self.model)
        moved = optimizer_state(self.model, self.optimizer, self.accelerator)
        parts = (self.whole, self.processor, moved, self.scheduler, self.accelerator, self.config)
        save_checkpoint(path, state, *parts, random_state)
        return path


def train(config: Config, stage: Stage) -> Path:
    """Run a stage from its settings to its `final/` folder.

    Returns:
        The `final/` folder.

    Raises:
        InputError: settings, parts or data that are wrong; nothing is written then, or only checkpoints.
        NonFiniteLoss: a loss or gradient that is not finite.
        Aborted: a metric above its bound.
    """
    check_tracker(config)
    folder = Path(config.run.output_dir)
    check_folder(folder, config)
    checkpoint, passed_over = choose_checkpoint(config)
    if checkpoint is None and config.run.resume == "auto" and (folder / FINAL).exists():
        raise InputError(
            f"{folder / FINAL} is there already, and no checkpoint to continue from; choose another run.output_dir, or "
            "replace it with run.resume=never"
        )
    with processes(config) as accelerator:
        return train_stage(config, stage, checkpoint, passed_over, accelerator)


def train_stage(
    config: Config, stage: Stage, checkpoint: Path | None, passed_over: list[str], accelerator: Accelerator
) -> Path:
    """`train` from the checkpoint that it continues from, if any; `passed_over` are warnings about others."""
    folder = Path(config.run.output_dir)
    check_sharding(accelerator, config, resumes=checkpoint is not None)
    set_seed(config.run.seed)
    model, processor = build(config)
    names = prepare_stage(model, stage, config)
    processor.describe_targets(model)
    check_metrics(config, model)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    dataset = build_dataset(config.data.train, model, config, stage)
    held_out = build_dataset(config.data.eval, model, config, stage) if config.data.eval else None
    collator = Collator(processor, config.data.max_length, cut=config.data.on_long_sample == "cut")
    for data in filter(None, (dataset, held_out)):
        use_frames_of(data, processor)
        data.decode_targets = model.loss_weights.wants_media
        data.in_memory = config.data.in_memory
    if checkpoint is not None:
        load_tensors(checkpoint, model)  # before the cache is compared with them
    cached = use_cache(filter(None, (dataset, held_out)), collator, model, processor, config, is_sharded(accelerator))
    new_decoders = [key for key in model.decoder_keys if key not in decoders_before(config)]
    strengths = {}
    if checkpoint is None and config.train.projector_init == "ridge" and new_decoders:
        model.to(accelerator.device)
        strengths = set_by_ridge(model, new_decoders, ridge_batches(dataset, collator, config, accelerator))

    optimizer, scheduler = make_optimizer(model, config)
    state: dict[str, Any] = {}
    if checkpoint is not None:
        state = load_training_state(checkpoint, None if is_sharded(accelerator) else optimizer, scheduler, accelerator)
        check_same_data(checkpoint, state, dataset)
    if config.train.compile:
        model.to(accelerator.device)
        compile_layers(model)
    wrapped, optimizer, whole = prepare(model, optimizer, accelerator, config)
    if checkpoint is not None and is_sharded(accelerator):
        load_optimizer_state(model, optimizer, read_optimizer_state(checkpoint))
    wrapped.train()
    parts = (model, processor, wrapped, whole, optimizer, scheduler, dataset, held_out, collator)
    run = Run(config, accelerator, *parts, step=state.get("step", 0))

    loader = make_loader(dataset, collator, config, accelerator, start=run.step)
    with contextlib.closing(take_updates(loader, config)) as updates:
        first = list(itertools.islice(updates, 1))  # mistakes in it are found before anything is written
        with written_or_as_before(folder, accelerator):
            facts = {"environment": environment(accelerator)}
            notes = passed_over + prepare_folder(folder, config, facts["environment"], run.step, accelerator)
            summary = model.summarize_parts()
            facts["parameters"] = {p.part: p.parameters for p in summary}
            facts["trainable"] = {p.part: p.trainable for p in summary if p.trainable}
            log = RunLog(accelerator, config, config.train.max_steps, run.step, facts, state.get("tracker_run"))
            with contextlib.closing(log), caught_signals() as caught:
                log.say(f"{stage.name}: {len(dataset)} samples, {len(names)} trainable tensors\n{part_table(summary)}")
                for line in notes:
                    log.say(f"warning: {line}")
                for line in cached:
                    log.say(line)
                for key, strength in strengths.items():
                    log.say(f"{key} output projector set by ridge regression, λ = {strength:.3g}")
                if checkpoint is not None:
                    log.say(f"continues from {checkpoint} after update {run.step}")
                run_updates(run, itertools.chain(first, updates), log, caught)
                gather_into(whole, model)
                save_model(folder / FINAL, whole, processor, accelerator)
                best = best_checkpoint(folder, config.train.keep_best) if config.train.keep_best else None
                if best is not None:
                    log.say(f"lowest {config.train.keep_best}: {best[1]:.4g}, in {best[0]}")
                log.say(f"finished: {folder / FINAL}")
    return folder / FINAL


def run_updates(run: Run, updates: Iterable[list[MicroBatch]], log: RunLog, caught: list[int]) -> None:
    """All updates, with what is due between them: metrics, evaluation, samples, checkpoints, and the end on a signal.

    Raises:
        InputError: nothing moved; or the disk is full.
        NonFiniteLoss, Aborted, Interrupted: after the state was written.
    """
    config, accelerator, settings = run.config, run.accelerator, run.config.train
    moved = run.step == settings.max_steps
    for micro_batches in log.timed(updates):
        before = rng_state()
        try:
            metrics = update(run.wrapped, run.model, run.optimizer, micro_batches, run.step, config, accelerator, log)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{error}; the state before it is in {run.save(STOPPED, log, {}, before)}") from None
        metrics |= learning_rates(run.optimizer)
        run.scheduler.step()
        run.step += 1
        moved |= metrics["gradient_norm"] > 0
        last = run.step == settings.max_steps
        log.bar.update()
        log.bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
        if last or run.step % settings.log_steps == 0:
            log.training(run.step, metrics)
        with log.paused():
            if is_due(run.step, settings.eval_steps):
                found = evaluate(run.wrapped, run.model, run.held_out, run.collator, config, accelerator)
                log.metrics(run.step, found)
                metrics |= found
            if is_due(run.step, settings.sample_steps):
                sample(run, log)
            stop_if_above(run, metrics, log)
            interrupted = any_rank(bool(caught), accelerator)
            if interrupted or (settings.save_steps and (last or is_due(run.step, settings.save_steps))):
                run.save(PREFIX, log, metrics)
                if accelerator.is_main_process:
                    remove_old(run.folder, config)
        if interrupted and not last:
            log.say(f"interrupted; checkpoint after update {run.step} written, the same command continues from it")
            raise Interrupted(128 + (caught[0] if caught else signal.SIGTERM))
    if not moved:
        raise InputError(
            "no gradient reached anything that trains, in no update: the data has nothing for the parts that train, or "
            "every sample was skipped"
        )
    check_finite(run.model, accelerator)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many updates (0: never) happens after this one."""
    return every > 0 and step % every == 0


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
    sums = torch.zeros(len(names) + 5, dtype=torch.float64, device=accelerator.device)
    for index, (batch, ids) in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        generators = make_generators(ids[TARGET_IDS], config.run.seed, step)
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            output = wrapped(**move(batch, accelerator.device), loss_counts=denominators, generators=generators)
            # Rows without a weighted loss, or none at all: the other processes still wait for these gradients.
            loss = nothing(model, output) if output.loss is None else output.loss
            # DDP averages gradients over processes, but this loss is a share of one sum: undo the division.
            if loss.requires_grad:  # else, in a single process, nothing that trains had a part in it
                accelerator.backward(loss * accelerator.num_processes)
        for name, term in output.losses.items():
            assert term.count <= denominators[name], f"{name} was counted as {denominators[name]}, not {term.count}"
            sums[names.index(name)] += term.total.detach().double()
        done = (
            float(loss.detach()),
            int(batch["attention_mask"].sum()),
            *(len(ids[i]) for i in (SAMPLE_IDS, BAD, CUT)),
        )
        sums[-5:] += torch.tensor(done, dtype=torch.float64, device=sums.device)
    norm = clip_gradients(model, optimizer, config.train.max_grad_norm, accelerator)
    *totals, loss, tokens, samples, skipped, cut = accelerator.reduce(sums, reduction="sum").tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bad = [name for name, value in zip(names, totals, strict=True) if not math.isfinite(value)]
        seen = gather_object([sample for _, ids in micro_batches for sample in ids[SAMPLE_IDS]])
        raise NonFiniteLoss(
            f"update {step + 1}: loss {loss}, gradient norm {norm}, not finite: "
            f"{', '.join(bad) or 'the gradient'}; samples {', '.join(seen)}. The optimizer's step was not made"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    log.count(int(tokens), int(samples), int(skipped), int(cut))
    means = {name: total / denominators[name] for name, total in zip(names, totals, strict=True) if denominators[name]}
    return {"loss": loss, **means, "gradient_norm": norm}


def nothing(model: Any, output: Any) -> torch.Tensor:
    """A zero through everything that trains, for a batch without any loss: other processes wait for its gradients."""
    zero = model.touch_trainable()
    states = output.hidden_states
    return zero if states is None or not states.requires_grad else zero + states.float().mean() * 0


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


def sample(run: Run, log: RunLog) -> None:
    """Answers to the first rows of data.eval; every process generates, as a sharded model needs them all."""
    rows, seed = run.config.train.sample_rows, run.config.run.seed
    try:
        with run.accelerator.autocast():
            answers = list(generate_answers(run.model, run.processor, run.held_out, rows, seed))
    except InputError as error:
        log.say(f"warning: no samples after update {run.step}: {error}")
        return
    if run.accelerator.is_main_process:
        folder = run.folder / "samples" / f"{run.step:06d}"
        log_answers(write_answers(answers, run.model, folder), run.accelerator, run.step)
        log.say(f"samples after update {run.step}: {folder}")


def stop_if_above(run: Run, metrics: dict[str, float], log: RunLog) -> None:
    """Raise `Aborted`, after a checkpoint for inspection, where a metric is above its bound or not a number."""
    bounds = run.config.train.abort_above
    over = {name: metrics[name] for name, bound in bounds.items() if name in metrics and not metrics[name] <= bound}
    if over:
        path = run.save(STOPPED, log, metrics)
        found = ", ".join(f"{name} is {value:.4g}, above {bounds[name]:.4g}" for name, value in over.items())
        raise Aborted(f"stopped after update {run.step}: {found} (train.abort_above); the state is in {path}")


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
