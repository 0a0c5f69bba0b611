"""Construction of a model, its processor and its data from settings."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from anygpt.data.collation import Collator
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.data.schema import Sample
from anygpt.decoders.loading import load_decoder
from anygpt.decoders.module import ModalDecoderModule
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.encoders.loading import load_encoder, load_encoder_processor
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.errors import InputError, reading
from anygpt.evaluation.suite import read_suite
from anygpt.media.types import is_timed
from anygpt.model.language_models import load_language_model, load_tokenizer
from anygpt.model.loading import read_config
from anygpt.model.multimodal import MultimodalModel
from anygpt.parts.source import PartSettings, Source
from anygpt.processing.processor import MultimodalProcessor
from anygpt.training.config import Config, DecoderConfig, EncoderConfig, check_values
from anygpt.training.folder import GIB, MAX
from anygpt.training.loading import ridge_batches, use_frames_of
from anygpt.training.ridge import set_by_ridge
from anygpt.training.stages import Stage

logger = logging.getLogger(__name__)

_BF16, MAX_LAYERS = "bfloat16", 1000


def source(part: PartSettings, mixed_precision: str) -> Source:
    """Source of a part; with `bf16`, its dtype is bfloat16 unless the config sets one."""
    known = {f.name for f in fields(Source)}
    settings = {name: value for name, value in asdict(part).items() if name in known}
    if settings["dtype"] is None and mixed_precision == "bf16":
        settings["dtype"] = _BF16
    return Source(**settings)


def build(config: Config) -> tuple[MultimodalModel, MultimodalProcessor]:
    """Build the composition of a config, starting from `model.init_from` if given.

    Raises:
        InputError: a part cannot be loaded, or differs from that in `init_from`.
    """
    check_parts_by_key(config)
    encoders, decoders, language_model, start = {}, {}, None, None
    processors: dict[str, Any] = {}
    fit: dict[str, str | None] = {}
    tokenizer = None
    precision = config.train.mixed_precision
    if config.model.init_from is not None:
        folder = Path(config.model.init_from)
        with reading(folder):
            check_same_parts(folder, config)
            start = MultimodalModel.from_pretrained(folder)
            before = MultimodalProcessor.from_pretrained(folder)
        encoders, decoders, language_model = start.encoders, start.decoders, start.language_model
        processors, tokenizer, fit = before.encoder_processors, before.llm_tokenizer, before.fit
    if language_model is None:
        part = source(config.model.language_model, precision)
        language_model, tokenizer = load_language_model(part), load_tokenizer(part)
        rows = language_model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise InputError(
                f"the tokenizer in {part.path!r} has {len(tokenizer)} tokens, but the language model there only "
                f"{rows} embeddings; it is another model's"
            )
    width = language_model.get_input_embeddings().weight.shape[1]
    head = language_model.get_output_embeddings().weight.shape[1]
    for key, entry in config.model.encoders.items():
        if key not in encoders:
            encoders[key], processors[key] = new_encoder(key, entry, width, precision)
    for key, settings in config.model.decoders.items():
        if key not in decoders:
            ridge = config.train.projector_init == "ridge"
            decoders[key] = new_decoder(key, settings, head, precision, ridge)
        if settings.defaults:
            decoders[key].defaults = settings.defaults
    unknown = sorted(set(config.loss.by_modality) - set(decoders))
    if unknown:
        raise InputError(
            f"loss.by_modality names {', '.join(unknown)}; the decoders are {', '.join(decoders) or 'none'}"
        )
    model = MultimodalModel(encoders, language_model, decoders)
    fit |= {key: entry.fit for key, entry in config.model.encoders.items() if entry.fit}
    processor = MultimodalProcessor(processors, tokenizer, model=model, fit=fit)
    if start is not None:
        for before, after in ((start.token_ids, model.token_ids), (start.signal_tokens.ids, model.signal_tokens.ids)):
            moved = [key for key, ids in (before or {}).items() if after.get(key) != ids]
            if moved:
                raise InputError(
                    f"the tokenizer in {config.model.init_from} gives the tokens of {', '.join(moved)} other ids than "
                    "the model there was trained with; it is another model's"
                )
        new = [f"{key}_encoder." for key in encoders if key not in start.encoder_keys]
        new += [f"{key}_decoder." for key in decoders if key not in start.decoder_keys]
        new += [
            f"signal_tokens.{rows}.{key}"
            for rows in ("input_rows", "output_rows")
            for key in decoders
            if key not in start.decoder_keys
        ]
        model.load_own_tensors(config.model.init_from, may_lack=tuple(new))
    model.loss_weights = config.loss
    return model, processor


def new_encoder(key: str, entry: EncoderConfig, width: int, precision: str) -> tuple[ModalEncoderModule, Any]:
    """An encoder with its projector, and its processor."""
    modality, part = entry.modality or key, source(entry, precision)
    encoder = load_encoder(part, modality)
    check_arguments(f"model.encoders.{key}.projector", entry.projector, MultimodalProjectorConfig)
    module = ModalEncoderModule(encoder, modality=modality)
    sizes = module.projector_sizes | {"out_features": width}
    projector = MultimodalProjectorConfig(**sizes | entry.projector)
    module.projector = build_projector(f"model.encoders.{key}", MultimodalProjector, projector)
    return module, load_encoder_processor(part, modality)


def new_decoder(key: str, entry: DecoderConfig, width: int, precision: str, ridge: bool) -> ModalDecoderModule:
    """A decoder with its output projector, which has a linear path if `ridge`."""
    decoder = load_decoder(source(entry, precision))
    module = ModalDecoderModule(
        decoder, None, entry.num_signal_tokens, entry.hidden_layer, entry.modality, signal=entry.signal
    )
    if entry.num_frames is not None and not is_timed(module.modality):
        raise InputError(f"model.decoders.{key}.num_frames is {entry.num_frames}, but {module.modality} has no frames")
    check_arguments(f"model.decoders.{key}.projector", entry.projector, OutputProjectorConfig)
    sizes = module.projector_sizes(width)
    transformer = entry.projector.get("projection_type", "transformer") == "transformer"
    line = {"linear_path": True} if ridge and transformer else {}
    projector = OutputProjectorConfig(**sizes | line | entry.projector)
    module.projector = build_projector(f"model.decoders.{key}", OutputProjector, projector)
    return module


def build_projector(where: str, kind: type[nn.Module], config: Any) -> nn.Module:
    """Build a projector; raises `InputError` if it does not fit into the machine's memory."""
    for name, value in config.to_dict().items():
        if "layers" in name and isinstance(value, int) and value > MAX_LAYERS:
            raise InputError(f"{where}.projector.{name} is {value}, expected at most {MAX_LAYERS}")
    with torch.device("meta"):
        size = sum(4 * parameter.numel() for parameter in kind(config).parameters())
    if size > psutil.virtual_memory().total:
        raise InputError(f"{where}.projector would take {size / GIB:,.0f} GiB, more than there are; make it smaller")
    return kind(config)


def check_parts_by_key(config: Config) -> None:
    """Check that keys are names and that no modality has a second encoder, which would get no input."""
    for section, parts in (("encoders", config.model.encoders), ("decoders", config.model.decoders)):
        bad = [key for key in parts if not key.isidentifier()]
        if bad:
            raise InputError(f"model.{section} has the key {bad[0]!r}; expected a name of letters, digits and _")
    modalities = Counter(entry.modality or key for key, entry in config.model.encoders.items())
    twice = [modality for modality, count in modalities.items() if count > 1]
    if twice:
        raise InputError(
            f"model.encoders has several encoders for {twice[0]!r}, of which only the first would be given media; name "
            "one, or compose the model in Python"
        )


def check_arguments(where: str, given: dict[str, Any], cls: type) -> None:
    """Reject unknown arguments, which transformers' configs would accept and ignore."""
    known = [name for name in inspect.signature(cls).parameters if name != "kwargs"]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"{where} has the unknown settings {', '.join(unknown)}; known are {', '.join(known)}")


def check_same_parts(folder: Path, config: Config) -> None:
    """Check that parts named by both the config and `init_from` agree in all settings that the config gives."""
    saved = read_config(folder)
    pairs: dict[str, tuple[PartSettings | None, dict[str, Any] | None]] = {
        **{f"encoders.{k}": (e, saved.encoders.get(k)) for k, e in config.model.encoders.items()},
        **{f"decoders.{k}": (e, saved.decoders.get(k)) for k, e in config.model.decoders.items()},
        "language_model": (config.model.language_model, saved.language_model),
    }
    for name, (wanted, found) in pairs.items():
        if wanted is None or found is None:
            continue
        for setting, value, before in differences(wanted, found):
            raise InputError(
                f"model.{name}.{setting} is {value!r}, but {folder} was trained with {before!r}; name the same part, "
                "leave it out, or start from other weights with model.init_from"
            )


def differences(wanted: PartSettings, found: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, given value, saved value) of settings that differ from those of the saved part."""
    saved = (
        found if found["source"] is None else dict.fromkeys(f.name for f in fields(Source)) | found["source"] | found
    )
    for setting in fields(wanted):
        value: Any = getattr(wanted, setting.name)
        value = Source(value).path if setting.name == "path" else value
        given = setting.name != "defaults" and (setting.default is MISSING or value != setting.default)
        if setting.name == "projector":
            cls = MultimodalProjectorConfig if isinstance(wanted, EncoderConfig) else OutputProjectorConfig
            check_arguments("projector", value, cls)
            before = cls(**found["projector"])
            yield from (
                (f"projector.{name}", part, getattr(before, name))
                for name, part in value.items()
                if getattr(before, name) != part
            )
        elif given and setting.name in saved and saved[setting.name] != value:
            yield setting.name, value, saved[setting.name]


def feed_back(dataset: ConversationDataset, model: MultimodalModel, stage: Stage) -> None:
    """Make media of the assistant inputs of the user's next turn, where a stage takes rows with media on both sides."""
    if "encoder_decoder" in stage.terms:
        reads = {encoder.modality for encoder in model.encoders.values()}
        dataset.samples = [sample.fed_back(reads) for sample in dataset.samples]


def build_dataset(
    sources: list[DataSource], model: MultimodalModel, config: Config, stage: Stage
) -> ConversationDataset:
    """Dataset of all files, whose samples are checked to suit the stage.

    Raises:
        InputError: unreadable files, media without encoder or decoder, or rows without a loss in the stage.
    """
    dataset = ConversationDataset.from_files(sources, on_bad_sample=config.data.on_bad_sample)
    terms = Counter(term_of(sample, model, stage) for sample in dataset.samples)
    feed_back(dataset, model, stage)
    weights = model.loss_weights
    subs = {term: ("nll", "alignment", "denoising") if "decoder" in term else ("nll",) for term in terms}
    own = weights.encoder or weights.decoder or weights.reconstruction
    if not own and not any(weights.of(f"{t}/{s}") for t in terms for s in subs[t]):
        raise InputError(
            f"every loss of the data's rows ({', '.join(sorted(terms))}) has weight 0, so nothing would train; give "
            "one of them a weight under loss"
        )
    logger.info("%d samples: %s", len(dataset), ", ".join(f"{n} {term}" for term, n in terms.items()))
    if dataset.faults:
        logger.warning("%d rows were left out, the first because: %s", len(dataset.faults), dataset.faults[0])
    return dataset


def term_of(sample: Sample, model: MultimodalModel, stage: Stage) -> str:
    """Loss term of a sample.

    Raises:
        InputError: media without encoder or decoder, or a term that the stage does not train on.
    """
    inputs = {encoder.modality for encoder in model.encoders.values()}
    outputs = {decoder.modality for decoder in model.decoders.values()}
    found: dict[str, set[str]] = {"user": set(), "assistant": set()}
    for role, part in sample.media():
        found["assistant" if role == "assistant" else "user"].add(part.type)
    for kinds, known, what in (
        (found["user"], inputs, "an encoder"),
        (found["assistant"], outputs, "a decoder"),
    ):
        if kinds - known:
            raise InputError(
                f"{sample.source} (sample {sample.id!r}) needs {what} for {', '.join(sorted(kinds - known))}, but "
                f"the model has {what} for {', '.join(sorted(known)) or 'nothing'}; add it under model, or leave "
                "such rows out"
            )
    term = {(0, 0): "llm", (1, 0): "encoder_llm", (0, 1): "llm_decoder", (1, 1): "encoder_decoder"}[
        bool(found["user"]), bool(found["assistant"])
    ]
    if term not in stage.terms:
        raise InputError(
            f"{sample.source} (sample {sample.id!r}) is a row of the kind {term}, which {stage.name} does not "
            f"train on; it takes {', '.join(stage.terms)}"
        )
    return term


def build_data(
    model: MultimodalModel, processor: MultimodalProcessor, config: Config, stage: Stage
) -> tuple[ConversationDataset, ConversationDataset | None, Collator]:
    """Training dataset, evaluation dataset (or None), and collator."""
    data = config.data
    dataset = build_dataset(data.train, model, config, stage)
    held_out = build_dataset(data.eval, model, config, stage) if data.eval else None
    for rows in filter(None, (dataset, held_out)):
        use_frames_of(rows, processor)
        rows.decode_targets = model.loss_weights.wants_media
        rows.in_memory = data.in_memory
    return dataset, held_out, Collator(processor, data.max_length, cut=data.on_long_sample == "cut")


def count_epochs(config: Config, dataset: ConversationDataset, processes: int) -> list[str]:
    """Set `train.max_steps` from `train.num_epochs` if given; returns lines for the log.

    Raises:
        InputError: the warm-up is longer.
    """
    train = config.train
    if train.num_epochs is None:
        return []
    rows = sum(round(length * weight) for length, weight in zip(dataset.lengths, dataset.weights, strict=True))
    update = train.batch_size * train.gradient_accumulation_steps * processes
    train.max_steps = math.ceil(train.num_epochs * rows / update)
    check_values(config)
    return [f"{train.num_epochs:g} epochs of {rows} rows, {update} an update: {train.max_steps} updates"]


def init_projectors(
    model: MultimodalModel, dataset: ConversationDataset, collator: Collator, config: Config, accelerator: Accelerator
) -> list[str]:
    """Initialize new output projectors by `train.projector_init`; returns lines for the log."""
    before = set() if config.model.init_from is None else set(read_config(Path(config.model.init_from)).decoders)
    new = [key for key in model.decoder_keys if key not in before]
    if config.train.projector_init != "ridge" or not new:
        return []
    model.to(accelerator.device)
    strengths = set_by_ridge(model, new, ridge_batches(dataset, collator, config, accelerator))
    return [f"{key} output projector set by ridge regression, λ = {value:.3g}" for key, value in strengths.items()]


def check_metrics(config: Config, model: MultimodalModel) -> None:
    """Check that `train.keep_best` and `train.abort_above` name metrics of this run."""
    train, names = config.train, ["loss", "gradient_norm", *model.loss_names()]
    evaluated = [f"eval/{name}" for name in names if name != "gradient_norm"]
    best = (train.keep_best or "loss").removeprefix(MAX)
    wanted = {"train.abort_above": list(train.abort_above), "train.keep_best": [best]}
    if train.eval_suite:
        suite = read_suite(train.eval_suite)
        of_suite = tuple(f"{suite.name}/{spec.name or spec.metric}" for spec in suite.metrics)
        evaluated += [name for chosen in wanted.values() for name in chosen if name.startswith(of_suite)]  # bleu_1, …
    for setting, chosen in wanted.items():
        for name in chosen:
            if name in evaluated and not train.eval_steps:
                raise InputError(f"{setting} names {name}, but there is no evaluation; give train.eval_steps")
            if name not in names + evaluated:
                near = difflib.get_close_matches(name, names + evaluated, n=1, cutoff=0.0)[0]
                raise InputError(f"{setting} names the metric {name!r}, which there is not; did you mean {near}?")
    if train.keep_best and not train.save_steps:
        raise InputError(f"train.keep_best is {train.keep_best!r}, but there are no checkpoints; give train.save_steps")
    if best in evaluated and train.save_steps % train.eval_steps:
        raise InputError(
            f"train.keep_best is {train.keep_best!r}, so there must be an evaluation at each checkpoint; "
            f"train.save_steps is {train.save_steps}, expected a multiple of train.eval_steps, {train.eval_steps}"
        )
