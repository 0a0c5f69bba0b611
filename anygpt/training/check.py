"""`--check`: checks a run's parts, data and memory from settings, configs and headers alone.

Resolves every part's id, reads its config, and compares the names and shapes in the headers of its weight files with
those that its class needs; reads and counts the first rows of the data. All faults are reported together.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import psutil

from anygpt.data.dataset import DataSource
from anygpt.data.formats.reading import iterate_samples, missing_error
from anygpt.data.lengths import Lengths
from anygpt.errors import InputError
from anygpt.model.multimodal import MultimodalModel
from anygpt.parts.files import shapes_only
from anygpt.processing.processor import MultimodalProcessor
from anygpt.training.config import Config
from anygpt.training.folder import GIB, check_folder
from anygpt.training.memory import Plan, Rows, plan_memory
from anygpt.training.setup import compose, term_of
from anygpt.training.stages import Stage, prepare_stage

FLAG = "--check"
ROWS = 8
"""Rows checked in each data file."""
DEFAULT_TOKENS = 512
"""Tokens assumed for a row if no data can be read."""


@dataclass
class Findings:
    """Result of a check: `faults` would stop the run; `rows` are path, rows read, fewest and most tokens of a row, by
    file; `kinds` the most tokens of a row and of its labels, by kind of row; `plan` is None if parts are missing.
    """

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[str, int, int, int]] = field(default_factory=list)
    kinds: dict[Rows, tuple[int, int]] = field(default_factory=dict)
    plan: Plan | None = None

    @contextmanager
    def collected(self, where: str) -> Iterator[None]:
        """Record an error raised within and continue."""
        try:
            yield
        except InputError as error:
            self.faults.append(f"{where}: {' '.join(str(error).split())}")


def check(config: Config, stage: Stage) -> Findings:
    """Check a run without starting it; see the module."""
    found, made = Findings(), None
    with found.collected("run"):
        check_folder(Path(config.run.output_dir), config)
    start = config.model.init_from
    if start is not None and not Path(start).exists() and config.model.language_model is not None:
        found.notes.append(f"model.init_from={start!r} does not exist yet: train the previous stage first")
        config = replace(config, model=replace(config.model, init_from=None))
    with shapes_only(), found.collected("model"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that tensors are not copied to the meta device
        made = compose(config, found.collected)
    model, processor = made or (None, None)
    if model is not None:
        with found.collected("stage"):
            names = prepare_stage(model, stage, config)
            found.notes.append(f"{stage.name}: {len(names)} trainable tensors")
            if config.train.gradient_checkpointing:
                model.gradient_checkpointing_enable()
    for place, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for number, file in enumerate(sources):
            with found.collected(f"data.{place}[{number}]"):
                check_data(file, model, processor, config, stage, found)
    if model is not None:
        if not found.kinds:
            tokens = config.data.max_length or DEFAULT_TOKENS
            kinds = [Rows((key,)) for key in model.encoders] + [Rows((), (key,)) for key in model.decoders]
            found.kinds = dict.fromkeys(kinds, (tokens, tokens // 2))
            found.notes.append(f"no rows could be read: the plan assumes {tokens} tokens per row")
        found.plan = plan_memory(model, processor, config, found.kinds)
    return found


def check_data(
    file: DataSource,
    model: MultimodalModel | None,
    processor: MultimodalProcessor | None,
    config: Config,
    stage: Stage,
    found: Findings,
) -> None:
    data, lengths = config.data, []
    for sample in islice(iterate_samples(file), ROWS):
        if isinstance(sample, InputError):
            raise sample
        missing = [(sample, path) for path in sample.missing_files()]
        if missing and data.on_bad_sample == "error":
            raise missing_error(missing)
        if processor is None:
            continue
        term_of(sample, model, stage)
        tokens, labels = Lengths(processor).with_labels(sample)
        if data.max_length and tokens > data.max_length and data.on_long_sample == "error":
            raise InputError(
                f"{sample.name} has {tokens:,} tokens, more than data.max_length = "
                f"{data.max_length:,}; raise it, or set data.on_long_sample"
            )
        lengths.append(tokens)
        read = {processor.encoder_key(part.type) for role, part in sample.media() if role != "assistant"}
        made = {processor.decoder_key(part.type) for role, part in sample.media() if role == "assistant"}
        kind = Rows(tuple(sorted(read & set(model.encoders))), tuple(sorted(made & set(model.decoders))))
        most = data.max_length or tokens
        before = found.kinds.get(kind, (0, 0))
        found.kinds[kind] = (max(before[0], min(tokens, most)), max(before[1], min(labels, most)))
    if lengths:
        found.rows.append((file.path, len(lengths), min(lengths), max(lengths)))


def report(found: Findings, config: Config) -> str:
    lines: list[str] = []
    if plan := found.plan:
        lines += _table("part", "parameters", "trainable", "weights", "GiB", "gradients", "AdamW")
        for part in plan.parts:
            sizes = " | ".join(f"{size / GIB:.3f}" for size in (part.weights, part.gradients, part.moments))
            dtypes = ", ".join(sorted(part.bytes_by_dtype)) or "none"
            lines.append(f"| {part.part} | {part.parameters:,} | {part.trainable:,} | {dtypes} | {sizes} |")
    if found.rows:
        lines += ["", *_table("data", "rows read", "tokens per row")]
        lines += [f"| {path} | {rows} | {low} to {high} |" for path, rows, low, high in found.rows]
    if plan := found.plan:
        lines += ["", *_table("rows of a micro-batch", "tokens", "activations, GiB", "TFLOP")]
        for kind, size in plan.activations.items():
            numbers = f"{found.kinds[kind][0]} | {size / GIB:.2f} | {plan.flops[kind] / 1e12:.2f}"
            lines.append(f"| {config.train.batch_size} × {kind} | {numbers} |")
        held = psutil.Process().memory_info()
        process = (held.rss - getattr(held, "shared", 0)) / GIB  # without mapped files
        lines += ["", f"computed, not measured: {plan.total / GIB:.2f} GiB on one device, "]
        lines[-1] += f"and {process:.2f} GiB for the process with its libraries"
        lines += [f"note: not counted: {line}" for line in plan.left_out]
        for part in (part for part in plan.parts if part.waiting):
            lines.append(
                f"note: not counted: {part.waiting / GIB:.3f} GiB of {part.part} that wait on the CPU (offload)"
            )
    return "\n".join(lines + [f"note: {line}" for line in found.notes])


def _table(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
