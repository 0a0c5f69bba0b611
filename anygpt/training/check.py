"""`--check`: checks a run's parts, data and memory from settings, configs and headers alone.

Resolves every part's id, reads its config, and compares the names and shapes in the headers of its weight files with
those that its class needs; reads and counts the first rows of the data. All faults are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from anygpt.data.dataset import DataSource
from anygpt.data.formats import iterate_samples, missing_error
from anygpt.data.lengths import Lengths
from anygpt.decoders.projector import OutputProjectorConfig
from anygpt.encoders.projector import MultimodalProjectorConfig
from anygpt.errors import InputError, reading
from anygpt.model.language_models import load_language_model, load_tokenizer
from anygpt.model.loading import read_config
from anygpt.model.multimodal import MultimodalModel
from anygpt.parts.networks import shapes_only
from anygpt.parts.source import PartSettings
from anygpt.processing.processor import MultimodalProcessor
from anygpt.training.config import Config, DecoderConfig, EncoderConfig, ModelConfig
from anygpt.training.folder import GIB, check_folder
from anygpt.training.memory import Plan, Rows, plan_memory
from anygpt.training.setup import (
    check_parts_by_key,
    check_same_parts,
    new_decoder,
    new_encoder,
    source,
    term_of,
)
from anygpt.training.stages import Stage, prepare_stage

FLAG = "--check"
ROWS = 8
"""Rows checked in each data file."""
DEFAULT_TOKENS = 512
"""Assumed for a row if no data can be read."""


@dataclass
class Findings:
    """Result of a check.

    Attributes:
        faults: errors that would stop the run.
        notes: other observations.
        rows: for each data file: path, rows read, fewest and most tokens per row.
        kinds: for each kind of rows, the most tokens of a row, and how many of them carry a loss.
        plan: memory; None if parts are missing.
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
    found = Findings()
    with found.collected("run"):
        check_folder(Path(config.run.output_dir), config)
    with found.collected("model"):
        check_parts_by_key(config)
    config = replace(config, model=with_parts_of_start(config, found))
    with shapes_only():
        model, processor = compose(config, found)
        if model is not None:
            model.loss_weights = config.loss
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
            found.notes.append(f"no rows could be read: the plan is for {tokens} tokens a row")
        found.plan = plan_memory(model, processor, config, found.kinds)
    return found


def with_parts_of_start(config: Config, found: Findings) -> ModelConfig:
    """The model config completed with the parts of `model.init_from` that it does not name."""
    model = config.model
    if model.init_from is None:
        return model
    folder = Path(model.init_from)
    if not folder.exists() and model.language_model is not None:
        found.notes.append(f"model.init_from={model.init_from!r} is not there yet: train the stage before first")
        return replace(model, init_from=None)
    with found.collected("model.init_from"), reading(folder):
        check_same_parts(folder, config)
        saved = read_config(folder)
        encoders = {k: _as_config(EncoderConfig, e, folder, f"{k}_encoder") for k, e in saved.encoders.items()}
        decoders = {k: _as_config(DecoderConfig, e, folder, f"{k}_decoder") for k, e in saved.decoders.items()}
        language_model = _as_config(PartSettings, saved.language_model, folder, "language_model")
        return ModelConfig(
            None, encoders | model.encoders, model.language_model or language_model, decoders | model.decoders
        )
    return replace(model, init_from=None)


def _as_config(cls: type, entry: dict[str, Any], folder: Path, name: str) -> Any:
    """Settings of a saved part; one without a source is stored in the folder itself."""
    known = {f.name for f in fields(cls)}
    settings = {**entry, **(entry["source"] or {"path": str(folder / "parts" / name)})}
    if "projector" in settings:  # saved with further keys by transformers
        names = {n for kind in (MultimodalProjectorConfig, OutputProjectorConfig) for n in signature(kind).parameters}
        settings["projector"] = {n: value for n, value in settings["projector"].items() if n in names}
    return cls(**{name: value for name, value in settings.items() if name in known and value is not None})


def compose(config: Config, found: Findings) -> tuple[MultimodalModel | None, MultimodalProcessor | None]:
    """The composition on the meta device; None if a part is faulty."""
    precision, faults = config.train.mixed_precision, len(found.faults)
    encoders, processors, decoders = {}, {}, {}
    language_model = tokenizer = None
    if config.model.language_model is not None:
        part = source(config.model.language_model, precision)
        with found.collected("model.language_model"):
            language_model = load_language_model(part)
        with found.collected("model.language_model"):
            tokenizer = load_tokenizer(part)
    # placeholders, so that the other parts are checked even if the language model is faulty
    width = head = 8
    if language_model is not None:
        width = language_model.get_input_embeddings().weight.shape[1]
        head = language_model.get_output_embeddings().weight.shape[1]
    for key, entry in config.model.encoders.items():
        with found.collected(f"model.encoders.{key}"):
            encoders[key], processors[key] = new_encoder(key, entry, width, precision)
    for key, settings in config.model.decoders.items():
        with found.collected(f"model.decoders.{key}"):
            decoders[key] = new_decoder(key, settings, head, precision, config.train.projector_init == "ridge")
            decoders[key].defaults = settings.defaults
    if language_model is None or tokenizer is None or len(found.faults) > faults:
        return None, None
    model = MultimodalModel(encoders, language_model, decoders)
    fit = {key: entry.fit for key, entry in config.model.encoders.items() if entry.fit}
    return model, MultimodalProcessor(processors, tokenizer, model=model, fit=fit)


def check_data(
    file: DataSource,
    model: MultimodalModel | None,
    processor: MultimodalProcessor | None,
    config: Config,
    stage: Stage,
    found: Findings,
) -> None:
    """Check the form, media, kind and tokens of a data file's first rows."""
    lengths = []
    for sample in islice(iterate_samples(file), ROWS):
        if isinstance(sample, InputError):
            raise sample
        missing = [(sample, path) for path in sample.missing_files()]
        if missing and config.data.on_bad_sample == "error":
            raise missing_error(missing)
        if processor is None:
            continue
        term_of(sample, model, stage)
        tokens, labels = Lengths(processor).with_labels(sample)
        lengths.append(tokens)
        read = sorted({processor.encoder_key(part.type) for role, part in sample.media() if role != "assistant"})
        made = sorted({processor.decoder_key(part.type) for role, part in sample.media() if role == "assistant"})
        kind, most = Rows(tuple(read), tuple(made)), config.data.max_length or tokens
        before = found.kinds.get(kind, (0, 0))
        found.kinds[kind] = (max(before[0], min(tokens, most)), max(before[1], min(labels, most)))
        if config.data.max_length and tokens > config.data.max_length and config.data.on_long_sample == "error":
            raise InputError(
                f"{sample.name} has {tokens:,} tokens, more than data.max_length = "
                f"{config.data.max_length:,}; raise it, or set data.on_long_sample"
            )
    if lengths:
        found.rows.append((file.path, len(lengths), min(lengths), max(lengths)))


def report(found: Findings, config: Config) -> str:
    """Text of a check: tables and lines."""
    lines: list[str] = []
    if found.plan is not None:
        lines += plan_table(found.plan)
    if found.rows:
        lines += ["", "| data | rows read | tokens a row |", "|---|---|---|"]
        lines += [f"| {path} | {rows} | {low} to {high} |" for path, rows, low, high in found.rows]
    if found.plan is not None:
        lines += ["", "| rows of a micro-batch | tokens | activations, GiB | TFLOP |", "|---|---|---|---|"]
        lines += [
            f"| {config.train.batch_size} × {kind} | {found.kinds[kind][0]} | {size / GIB:.2f} | "
            f"{found.plan.flops[kind] / 1e12:.2f} |"
            for kind, size in found.plan.activations.items()
        ]
        held = psutil.Process().memory_info()
        process = (held.rss - getattr(held, "shared", 0)) / GIB  # without mapped files
        lines += [
            "",
            f"computed, not measured: {found.plan.total / GIB:.2f} GiB on one device, "
            f"and {process:.2f} GiB of the process with its libraries",
        ]
        lines += [f"note: not counted: {line}" for line in found.plan.left_out]
    lines += [f"note: {line}" for line in found.notes]
    return "\n".join(lines)


def plan_table(plan: Plan) -> list[str]:
    """Markdown table with one line per part."""
    lines = [
        "| part | parameters | trainable | weights | GiB | gradients | AdamW |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in plan.parts:
        kinds = ", ".join(sorted(part.bytes_by_dtype)) or "none"
        lines.append(
            f"| {part.part} | {part.parameters:,} | {part.trainable:,} | {kinds} | {part.weights / GIB:.3f} | "
            f"{part.gradients / GIB:.3f} | {part.moments / GIB:.3f} |"
        )
    return lines
