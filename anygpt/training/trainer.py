"""The trainer of all stages.

An update consists of micro-batches on every process. Losses are sums divided by the counts of the whole update, so that
the gradient does not depend on how the update is split.
"""

import contextlib
import itertools
import json
import math
import shlex
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader

from anygpt.data.collation import BAD, CUT, SAMPLE_IDS, TARGET_IDS, move
from anygpt.encoders import fitting
from anygpt.errors import InputError
from anygpt.losses.formulas import weighted_total
from anygpt.model.multimodal import MultimodalModel
from anygpt.model.packing import check_packing
from anygpt.model.parts import is_peft
from anygpt.outputs import LossTerm
from anygpt.training import checkpoint as checkpoints
from anygpt.training import folder as folders
from anygpt.training import loading, processes, sharding
from anygpt.training.config import Config
from anygpt.training.folder import EVALUATION, FINAL, PREFIX, PROFILE, STATE, STOPPED
from anygpt.training.loading import MicroBatch
from anygpt.training.optimization import Averages, clip_gradients, compile_layers, make_optimizer
from anygpt.training.performance import Meter, profiler
from anygpt.training.processes import Aborted, Interrupted, NonFiniteLoss
from anygpt.training.setup import build, build_data, check_metrics, init_projectors
from anygpt.training.stages import Stage, prepare_stage
from anygpt.training.tracking import RunLog, part_table, run_suite, take_samples

LOSS, TOKENS, PLACES = "loss", "tok", "places"
ROWS = {"samples": SAMPLE_IDS, "skipped": BAD, "cut": CUT}


def train(config: Config, stage: Stage) -> Path:
    """Run a stage; returns its `final/` folder.

    Raises:
        InputError: wrong settings, parts or data; nothing but checkpoints has been written.
        NonFiniteLoss: a loss or gradient that is not finite.
        Aborted: a metric above its bound.
    """
    folder = Path(config.run.output_dir)
    folders.check_folder(folder, config)
    checkpoint, passed_over = checkpoints.choose_checkpoint(config)
    if checkpoint is None and config.run.resume == "auto" and (folder / FINAL).exists():
        raise InputError(
            f"{folder / FINAL} is there already, and no checkpoint to continue from; choose another run.output_dir, or "
            "replace it with run.resume=never"
        )
    with processes.started(config) as accelerator:
        return Trainer(config, stage, accelerator).setup(checkpoint).fit(passed_over)


class Trainer:
    """One run of a stage: `setup` builds everything, `fit` runs the updates, evaluations and checkpoints.

    `done` are the updates made, `wrapped` is the model prepared by accelerate, `whole` the one to save (see
    `sharding.prepare`), and `notes` are lines for the log about the start.
    """

    log: RunLog

    def __init__(self, config: Config, stage: Stage, accelerator: Accelerator):
        self.config, self.stage, self.accelerator = config, stage, accelerator
        self.folder, self.meter = Path(config.run.output_dir), Meter(accelerator)
        self.done, self.tracker_run = 0, None

    def setup(self, checkpoint: Path | None = None) -> "Trainer":
        """Build model, data and optimizer, anew or from a checkpoint; writes nothing."""
        config, stage, accelerator = self.config, self.stage, self.accelerator
        sharding.check_sharding(accelerator, config, resumes=checkpoint is not None)
        set_seed(config.run.seed)
        self.model, self.processor = model, processor = build(config)
        names = prepare_stage(model, stage, config)
        processor.describe_targets(model)
        check_metrics(config.train, model.loss_names())
        model.pack_to = config.data.pack_to
        if model.pack_to is not None:
            check_packing(model)
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.dataset, self.held_out, self.collator = build_data(model, processor, config, stage)
        self.digests = checkpoints.data_digests(self.dataset)
        self.notes = [f"{stage.name}: {len(self.dataset)} samples, {len(names)} trainable tensors"]
        if self.held_out is not None and not (config.train.eval_steps or config.train.sample_steps):
            self.notes.append("data.eval is not used: train.eval_steps and train.sample_steps are 0")
        self.notes += loading.count_epochs(config, self.dataset, accelerator.num_processes)
        self.notes += fitting.notes(processor.modalities, processor.encoder_processors, processor.fit)
        self.notes += [f"{key}: {targets.note}" for key, targets in (processor.coded | processor.targets).items()]
        if checkpoint is not None:
            checkpoints.load_tensors(checkpoint, model)  # before the cache is compared with the tensors
        datasets = [one for one in (self.dataset, self.held_out) if one is not None]
        self.notes += loading.use_cache(datasets, self.collator, model, config, sharding.is_sharded(accelerator))
        if checkpoint is None:
            self.notes += init_projectors(model, self.dataset, self.collator, config, accelerator)
        optimizer, self.scheduler = make_optimizer(model, config)
        if config.train.compile:
            model.to(accelerator.device)
            compile_layers(model)
        self.wrapped, self.optimizer, self.whole = sharding.prepare(model, optimizer, accelerator, config)
        self.averages = Averages(model, config.train)
        if checkpoint is not None:
            self.restore(checkpoint)
        self.wrapped.train()
        return self

    def restore(self, checkpoint: Path) -> None:
        """Restore the state of training, except the model's tensors."""
        state, saved = folders.read_state(checkpoint), checkpoints.load_state(checkpoint / checkpoints.OPTIMIZER)
        checkpoints.check_same_data(checkpoint, state["data"], self.digests, self.config)
        sharding.load_optimizer_state(self.model, self.optimizer, saved)
        self.averages.load(saved)
        self.scheduler.load_state_dict(state["scheduler"])
        rates = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, (peak, share) in zip(self.optimizer.param_groups, rates, strict=True):  # the run may be longer now
            group["lr"] = peak * share(self.scheduler.last_epoch)
        checkpoints.restore_random_state(checkpoint, self.accelerator)
        self.done, self.tracker_run = state["step"], state["tracker_run"]
        self.notes.append(f"continues from {checkpoint} after update {self.done}")
        before, steps = state["max_steps"], self.config.train.max_steps
        if self.done > steps:
            raise InputError(f"{checkpoint} is beyond train.max_steps, which is {steps}; give at least {self.done}")
        if before != steps:
            self.notes.append(f"of {steps} updates instead of {before}: the learning rate follows the new schedule")

    def fit(self, warnings: Iterable[str] = ()) -> Path:
        """Run the remaining updates and write `final/`; returns that folder. Raises `InputError` if no parameter
        changed or the disk is full, and `NonFiniteLoss`, `Aborted` or `Interrupted` after the state has been written.
        """
        config, accelerator = self.config, self.accelerator
        loader = loading.make_loader(self.dataset, self.collator, config, accelerator, start=self.done)
        with contextlib.closing(loading.take_updates(loader, config)) as updates, contextlib.ExitStack() as stack:
            first = list(itertools.islice(updates, 1))  # finds its errors before anything is written
            stack.enter_context(folders.written_or_as_before(self.folder, accelerator))
            environment = folders.environment(accelerator)
            prepared = folders.prepare_folder(self.folder, config, environment, self.done, accelerator)
            parts = self.model.summarize_parts()
            facts = {"environment": environment, "parameters": {p.part: p.parameters for p in parts}}
            facts["trainable"] = {p.part: p.trainable for p in parts if p.trainable}
            self.log = RunLog(accelerator, config, self.done, facts, self.tracker_run)
            stack.callback(self.log.bar.close)
            caught = stack.enter_context(processes.caught_signals())
            self.log.say(f"{self.notes[0]}\n{part_table(parts)}")
            for line in [f"warning: {line}" for line in (*warnings, *prepared)] + self.notes[1:]:
                self.log.say(line)
            with profiler(config.train.profile, self.folder / PROFILE, accelerator.process_index) as trace:
                self.run_updates(itertools.chain(first, updates), caught, trace)
            self.finish()
        return self.folder / FINAL

    def run_updates(self, updates: Iterator[list[MicroBatch]], caught: list[int], trace: Any) -> None:
        """Run the updates, with metrics, evaluation, samples and checkpoints in between; stops on a signal."""
        train, log = self.config.train, self.log
        moved = self.done == train.max_steps
        self.meter.start()
        while self.done < train.max_steps:
            with self.meter.phase("data"):
                micro_batches = next(updates)
            before = checkpoints.rng_state()
            try:
                metrics = self.step(micro_batches)
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}; the state before it is in {self.save(STOPPED, {}, before)}") from None
            metrics |= {group["name"]: group["lr"] for group in self.optimizer.param_groups}
            self.scheduler.step()
            self.done += 1
            moved |= metrics["gradient_norm"] > 0
            last = self.done == train.max_steps
            log.bar.update()
            log.bar.set_postfix(loss=f"{metrics.get(LOSS, math.nan):.4g}", refresh=False)
            if trace is not None:
                trace.step()
            if last or self.is_due(train.log_steps):
                log.metrics(self.done, metrics | self.meter.read())
            with self.meter.paused():
                with self.averages.instead("evaluation"):
                    if self.is_due(train.eval_steps):
                        found = self.evaluate()
                        log.metrics(self.done, found)
                        metrics |= found
                    if self.is_due(train.sample_steps):  # on every process, as a sharded model requires
                        rows = self.held_out, self.accelerator, self.config
                        log.say(take_samples(self.model, self.processor, *rows, self.done))
                if last:
                    self.describe(metrics)
                self.stop_if_above(metrics)
                interrupted = processes.any_rank(bool(caught), self.accelerator)
                if interrupted or (train.save_steps and (last or self.is_due(train.save_steps))):
                    self.save(PREFIX, metrics)
                    if self.accelerator.is_main_process:
                        folders.remove_old(self.folder, self.config)
            if interrupted and not last:
                line = f"interrupted; checkpoint after update {self.done} written, the same command continues from it"
                log.say(line)
                raise Interrupted(caught[0] if caught else signal.SIGTERM, line)
        if not moved:
            raise InputError(
                "no gradient reached any trained parameter in any update: the data has nothing for the parts that "
                "train, or every sample was skipped"
            )
        processes.check_finite(self.model)

    def is_due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def step(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Make one update; returns its metrics over all processes: the weighted loss, the mean of each term, the norm
        before clipping, and the share of padding if counted. Raises `NonFiniteLoss` before the optimizer's step. If
        nothing has a loss, as when every row was skipped, there is no such metric, and the optimizer makes no step."""
        names, accelerator = self.model.loss_names(), self.accelerator
        counts = Counter(dict.fromkeys(names, 0))
        for batch, _ in micro_batches:
            counts.update(self.model.count_losses(batch))
        denominators = processes.add_up(counts, accelerator)
        sums: Any = Counter(dict.fromkeys((*names, LOSS, *ROWS, TOKENS, PLACES), 0))
        for index, (batch, ids) in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            generators = loading.make_generators(ids[TARGET_IDS], self.config.run.seed, self.done)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                batch = move(batch, accelerator.device)
                named = loading.naming_rows(self.dataset, self.collator, self.model, ids)
                with self.meter.phase("forward"), named:
                    output = self.wrapped(**batch, loss_counts=denominators, generators=generators)
                # Without a loss, the other processes still wait for these gradients.
                loss = nothing(self.model, output) if output.loss is None else output.loss
                # DDP averages gradients over processes, but this loss is a share of one sum: undo the division.
                if loss.requires_grad:  # false if, in a single process, no trainable parameter is involved
                    with self.meter.phase("backward"):
                        accelerator.backward(loss * accelerator.num_processes)
            for name, term in output.losses.items():
                assert term.count <= denominators[name], f"{name}: counted {denominators[name]}, not {term.count}"
                sums[name] += term.total.detach().double()
            sums[LOSS] += loss.detach().double()
            sums[TOKENS] += int(output.attention_mask.sum())
            sums[PLACES] += output.places if self.model.pack_to or self.config.data.max_batch_tokens else 0
            sums.update({shown: len(ids[name]) for shown, name in ROWS.items()})
        with self.meter.phase("optimizer"):
            norm = clip_gradients(self.model, self.optimizer, self.config.train.max_grad_norm, accelerator)
        totals = processes.add_up(sums, accelerator)
        if not (math.isfinite(totals[LOSS]) and math.isfinite(norm)):
            bad = [name for name in names if not math.isfinite(totals[name])]
            seen = gather_object([sample for _, ids in micro_batches for sample in ids[SAMPLE_IDS]])
            raise NonFiniteLoss(
                f"update {self.done + 1}: loss {totals[LOSS]}, gradient norm {norm}, not finite: "
                f"{', '.join(bad) or 'the gradient'}; samples {', '.join(seen)}. The optimizer's step was not made"
            )
        with self.meter.phase("optimizer"):
            if learned := any(denominators[name] and self.model.loss_weights.of(name) for name in names):
                self.optimizer.step()
                self.averages.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.meter.count(totals)
        means = {name: totals[name] / denominators[name] for name in names if denominators[name]}
        padding = {"padding": 1 - totals[TOKENS] / totals[PLACES]} if totals[PLACES] else {}
        return {**({LOSS: totals[LOSS]} if learned else {}), **means, "gradient_norm": norm, **padding}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean of every sub-term over `data.eval`, the weighted loss, the numbers of rows skipped and cut if not 0, and
        the metrics of `train.eval_suite`. An `InputError` if no row gives a loss.

        Noise is the same each time.
        """
        names, accelerator, device = self.model.loss_names(), self.accelerator, self.accelerator.device
        totals, counts = Counter(dict.fromkeys(names, 0.0)), Counter(dict.fromkeys((*names, *ROWS), 0))
        size, world, rows = self.config.train.batch_size, accelerator.num_processes, range(len(self.held_out))
        starts = range(0, len(rows), size * world)
        chunks = [list(rows[i : i + size * world][accelerator.process_index :: world]) for i in starts]
        # Sharded processes must take equally many steps: one without rows computes a row that is not counted.
        order = [chunk or [0] for chunk in chunks]
        self.wrapped.eval()
        options = {"collate_fn": self.collator, **loading.loader_options(self.config)}
        loader = DataLoader(self.held_out, batch_sampler=order, **options)
        for batch, chunk in zip(loader, chunks, strict=True):
            ids = loading.take_ids(batch, self.config)
            generators = loading.make_generators(ids[TARGET_IDS], self.config.run.seed, 0)
            with loading.naming_rows(self.held_out, self.collator, self.model, ids):
                losses = self.model(**move(batch, device), generators=generators).losses
            if chunk:
                totals.update({name: term.total.double() for name, term in losses.items()})
                counts.update({name: term.count for name, term in losses.items()})
                counts.update({shown: len(ids[name]) for shown, name in ROWS.items()})
        self.wrapped.train()
        total, count = processes.add_up(totals, accelerator), processes.add_up(counts, accelerator)
        means = {name: total[name] / count[name] for name in names if count[name]}
        losses = {name: LossTerm(torch.tensor(total[name]), int(count[name])) for name in means}
        loss = weighted_total(losses, self.model.loss_weights)
        if loss is None:
            raise InputError(
                f"no row of data.eval gives a loss, and {count['skipped']:.0f} of {len(rows)} were skipped; fix the "
                "file, or leave it out"
            )
        left_out = {name: count[name] for name in ("skipped", "cut") if count[name]}
        found = {f"eval/{name}": value for name, value in ({LOSS: float(loss)} | means | left_out).items()}
        if suite := self.config.train.eval_suite:
            folder = self.folder / EVALUATION / f"{self.done:06d}"
            found |= run_suite(suite, folder, self.model, self.processor, accelerator)
            if self.done == self.config.train.eval_steps:
                check_metrics(self.config.train, names, found)
        return found

    def stop_if_above(self, metrics: dict[str, float]) -> None:
        """Raise `Aborted`, after a checkpoint for inspection, if a metric is above its bound or NaN."""
        bounds = self.config.train.abort_above
        over = {name: metrics[name] for name, bound in bounds.items() if name in metrics and not metrics[name] <= bound}
        if over:
            path = self.save(STOPPED, metrics)
            found = ", ".join(f"{name} is {value:.4g}, above {bounds[name]:.4g}" for name, value in over.items())
            raise Aborted(f"stopped after update {self.done}: {found} (train.abort_above); the state is in {path}")

    def save(self, name: str, metrics: dict[str, float], random_state: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint `<name><updates done>`, with an earlier `rng_state` if given, and return its folder.
        Raises `NonFiniteLoss` if a trainable parameter is not finite, as a run could not continue from that."""
        if name == PREFIX:
            processes.check_finite(self.model)
        path = self.folder / f"{name}{self.done}"
        state = {"step": self.done, "max_steps": self.config.train.max_steps, "data": self.digests}
        state |= {"scheduler": self.scheduler.state_dict(), "metrics": metrics, "tracker_run": self.log.run_id}
        state |= {"settings": checkpoints.settings_that_count(self.config)}
        optimizer_state = sharding.optimizer_state(self.model, self.optimizer, self.accelerator) | self.averages.state()
        with self.written(path) as folder:
            if self.accelerator.is_main_process:
                checkpoints.save_state(optimizer_state, folder / checkpoints.OPTIMIZER)
                (folder / STATE).write_text(json.dumps(state, default=float, indent=1))
            own = checkpoints.rng_file(folder, self.accelerator)
            checkpoints.save_state(random_state or checkpoints.rng_state(), own)
        return path

    @contextlib.contextmanager
    def written(self, path: Path) -> Iterator[Path]:
        """Write model and processor to a folder atomically, with what the block adds to it."""
        sharding.gather_into(self.whole, self.model)
        with checkpoints.written_whole(path, self.accelerator) as folder:
            if self.accelerator.is_main_process:
                self.whole.save_pretrained(folder)
                self.processor.save_pretrained(folder)
            yield folder

    def describe(self, metrics: dict[str, float]) -> None:
        """Record the training in the model's config, for its card."""
        losses = {name: value for name, value in metrics.items() if "loss" in name or name in self.model.loss_names()}
        if self.whole is not None:  # None on other processes if sharded
            adapted = is_peft(self.whole.language_model)
            parts = [
                "adapters of the language model" if part == "language_model" and adapted else part
                for part in self.config.train.parts or self.stage.parts(self.whole)
            ]
            made = {"stage": self.stage.name, "updates": self.done, "parts": parts, "losses": losses}
            self.whole.config.trained = made

    def finish(self) -> None:
        """Write `final/`, and say which checkpoint is best."""
        with self.averages.instead("final"), self.written(self.folder / FINAL):
            pass
        keep = self.config.train.keep_best
        best = folders.best_checkpoint(self.folder, keep)
        if best is not None:
            word = "highest" if keep.startswith(folders.MAX) else "lowest"
            self.log.say(f"{word} {keep.removeprefix(folders.MAX)}: {best[1]:.4g}, in {best[0]}")
            if self.averages.evaluated and (step := folders.step_of(best[0])) >= self.config.train.warmup_steps:
                last = f"train.max_steps={step} --train.num_epochs=null '--train.ema_for=[final]'"
                where = shlex.quote(f"--run.resume={best[0]}")
                self.log.say(f"its averages, in a new run.output_dir: {where} --{last}")
        self.log.say(f"finished: {self.folder / FINAL}")


def nothing(model: MultimodalModel, output: Any) -> torch.Tensor:
    """Zero loss that depends on all trainable parameters, for a batch without any loss."""
    zero = model.touch_trainable()
    states = output.hidden_states
    return zero if states is None or not states.requires_grad else zero + states.float().mean() * 0
