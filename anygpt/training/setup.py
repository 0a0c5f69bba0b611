"""Construction of a model, its processor and its data from settings."""

import difflib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from anygpt.data.collation import Collator
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.data.lengths import refuse_sources
from anygpt.data.schema import Sample
from anygpt.decoders.base import load_decoder
from anygpt.decoders.module import ModalDecoderModule
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.encoders.loading import load_encoder, load_encoder_processor
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.errors import InputError, reading, refusing
from anygpt.evaluation.suite import read_suite
from anygpt.losses.formulas import TERMS
from anygpt.losses.terms import is_read
from anygpt.model.configuration import OF_DECODERS
from anygpt.model.language_models import load_language_model, load_tokenizer
from anygpt.model.loading import read_config
from anygpt.model.multimodal import MultimodalModel
from anygpt.parts.source import MEMORY, PartSettings, Source
from anygpt.processing.processor import MultimodalProcessor
from anygpt.tokenizers.base import load_media_tokenizer
from anygpt.tokenizers.module import ModalTokenizerModule
from anygpt.training.config import Config, DecoderConfig, EncoderConfig, TrainConfig
from anygpt.training.folder import GIB, MAX
from anygpt.training.loading import ridge_batches, use_frames_of
from anygpt.training.ridge import set_by_ridge
from anygpt.training.stages import Stage

logger = logging.getLogger(__name__)

MAX_LAYERS = 1000


def source(part: PartSettings, mixed_precision: str) -> Source:
    """Source of a part; with `bf16`, its dtype is bfloat16 unless the config sets one."""
    settings = {f.name: getattr(part, f.name) for f in fields(Source) if hasattr(part, f.name)}
    if part.dtype is None and mixed_precision == "bf16":
        settings["dtype"] = "bfloat16"
    return Source(**settings)


def build(config: Config) -> tuple[MultimodalModel, MultimodalProcessor]:
    """Build the composition of a config, starting from `model.init_from` if given."""
    made = compose(config, lambda where: nullcontext())
    assert made is not None  # faults were raised
    return made


def compose(
    config: Config, collected: Callable[[str], AbstractContextManager[None]]
) -> tuple[MultimodalModel, MultimodalProcessor] | None:
    """See `build`. Each part is loaded within `collected(<setting>)`; None if that has recorded a fault."""
    check_parts_by_key(config)
    wanted = config.model
    precision, ridge = config.train.mixed_precision, config.train.projector_init == "ridge"
    encoders, decoders, tokenizers, processors = {}, {}, {}, {}
    language_model = tokenizer = start = None
    fit: dict[str, str | None] = {}
    if wanted.init_from is not None:
        folder = Path(wanted.init_from)
        with reading(folder):
            check_same_parts(folder, config)
            start = MultimodalModel.from_pretrained(folder)
            before = MultimodalProcessor.from_pretrained(folder)
        encoders, decoders, tokenizers = start.encoders, start.decoders, start.tokenizers
        language_model = start.language_model
        processors, tokenizer, fit = before.encoder_processors, before.llm_tokenizer, before.fit
    part = wanted.language_model
    if language_model is None and part is not None:
        with collected("model.language_model"):
            language_model = load_language_model(source(part, precision))
        with collected("model.language_model"):
            tokenizer = load_tokenizer(source(part, precision))
    width = head = 8  # if the language model is faulty, so that the other parts are still checked
    if language_model is not None and tokenizer is not None:
        rows, width = language_model.get_input_embeddings().weight.shape
        head = language_model.get_output_embeddings().weight.shape[1]
        if start is None and part is not None and len(tokenizer) > rows:
            raise InputError(
                f"the tokenizer in {part.path!r} has {len(tokenizer)} tokens, but the language model there only "
                f"{rows} embeddings; it is another model's"
            )
    for key, encoder in wanted.encoders.items():
        if key not in encoders:
            with collected(f"model.encoders.{key}"):
                encoders[key], processors[key] = new_encoder(key, encoder, width, precision)
    for key, entry in wanted.tokenizers.items():
        with collected(f"model.tokenizers.{key}"):
            if key not in tokenizers:
                part = load_media_tokenizer(source(entry, "no"), entry.modality or key)
                tokenizers[key] = ModalTokenizerModule(part, entry.row_ends)
            tokenizers[key].defaults = entry.defaults or tokenizers[key].defaults
    for key, decoder in wanted.decoders.items():
        with collected(f"model.decoders.{key}"):
            if key not in decoders:
                decoders[key] = new_decoder(key, decoder, head, precision, ridge, tokenizers.get(key))
            decoders[key].defaults = decoder.defaults or decoders[key].defaults
            given = {name: getattr(decoder, name) for name in MEMORY}
            decoders[key].module.save_memory(**{name: value for name, value in given.items() if value is not None})
    kinds = ((wanted.encoders, encoders), (wanted.decoders, decoders), (wanted.tokenizers, tokenizers))
    complete = all(set(asked) <= set(found) for asked, found in kinds)
    if language_model is None or tokenizer is None or not complete:
        return None
    if unknown := sorted(set(config.loss.by_modality) - set(decoders)):
        raise InputError(
            f"loss.by_modality names {', '.join(unknown)}; the decoders are {', '.join(decoders) or 'none'}"
        )
    model = MultimodalModel(encoders, language_model, decoders, tokenizers)
    fit |= {key: entry.fit for key, entry in wanted.encoders.items() if entry.fit}
    processor = MultimodalProcessor(processors, tokenizer, model=model, fit=fit)
    if start is not None:
        load_start(model, start, wanted.init_from)
    model.loss_weights = config.loss
    return model, processor


def load_start(model: MultimodalModel, start: MultimodalModel, folder: str) -> None:
    """Load the start's signal tokens, the only tensors outside parts; those of new parts stay as they are."""
    signals = [
        {key: one.ids[key][: len(names)] for key, names in one.names.items() if one.ids}
        for one in (start.signal_tokens, model.signal_tokens)
    ]  # without codes, whose ids may change
    for before, after in ((start.token_ids, model.token_ids), signals):
        moved = [key for key, ids in (before or {}).items() if after.get(key) != ids]
        if moved:
            raise InputError(
                f"the tokenizer in {folder} gives the tokens of {', '.join(moved)} other ids than the model there was "
                "trained with; it is another model's"
            )
    with refusing(f"the signal tokens in {folder} do not fit this model", (RuntimeError,)):
        lost = model.signal_tokens.load_state_dict(start.signal_tokens.state_dict(), strict=False).unexpected_keys
    assert not lost, lost  # a start's decoders and tokenizers are kept


def new_encoder(key: str, entry: EncoderConfig, width: int, precision: str) -> tuple[ModalEncoderModule, Any]:
    modality, part = entry.modality or key, source(entry, precision)
    module = ModalEncoderModule(load_encoder(part, modality), modality=modality)
    sizes = module.projector_sizes | {"out_features": width}
    module.projector = build_projector(f"model.encoders.{key}.projector", MultimodalProjector, sizes, entry.projector)
    return module, load_encoder_processor(part, modality)


def new_decoder(
    key: str, entry: DecoderConfig, width: int, precision: str, ridge: bool, codes: ModalTokenizerModule | None
) -> ModalDecoderModule:
    """A decoder with its output projector, which has a linear path if `ridge`; `codes` is the tokenizer of its key."""
    settings = {name: getattr(entry, name) for name in OF_DECODERS}
    module = ModalDecoderModule(load_decoder(source(entry, precision)), **settings)
    if entry.signal == "codes":
        module.read_codes_of(key, codes)
    sizes = module.projector_sizes(width)
    if ridge and entry.projector.get("projection_type", "transformer") == "transformer":
        sizes["linear_path"] = True
    module.projector = build_projector(f"model.decoders.{key}.projector", OutputProjector, sizes, entry.projector)
    return module


def build_projector(where: str, kind: type[PreTrainedModel], sizes: dict[str, Any], given: dict[str, Any]) -> Any:
    """Build a projector; raises `InputError` for unknown settings, or if the machine's memory cannot hold it."""
    check_arguments(where, given, kind.config_class)
    config = kind.config_class(**sizes | given)
    for name, value in config.to_dict().items():
        if "layers" in name and isinstance(value, int) and value > MAX_LAYERS:
            raise InputError(f"{where}.{name} is {value}, expected at most {MAX_LAYERS}")
    with torch.device("meta"):
        size = sum(4 * parameter.numel() for parameter in kind(config).parameters())
    if size > psutil.virtual_memory().total:
        raise InputError(f"{where} would take {size / GIB:,.0f} GiB, more than this machine has; make it smaller")
    return kind(config)


def check_parts_by_key(config: Config) -> None:
    """Check that keys are names and that no modality has a second encoder, which would get no input."""
    for section in ("encoders", "decoders", "tokenizers"):
        for key in getattr(config.model, section):
            if not key.isidentifier():
                raise InputError(f"model.{section} has the key {key!r}; expected a name of letters, digits and _")
    modalities = Counter(entry.modality or key for key, entry in config.model.encoders.items())
    for modality, count in modalities.items():
        if count > 1:
            raise InputError(
                f"model.encoders has several encoders for {modality!r}, of which only the first would get media; "
                "name one, or compose the model in Python"
            )


def check_arguments(where: str, given: dict[str, Any], cls: type) -> None:
    """Reject unknown arguments, which transformers' configs would accept and ignore."""
    known = [name for name in inspect.signature(cls).parameters if name != "kwargs"]
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"{where} has the unknown settings {', '.join(unknown)}; known are {', '.join(known)}")


def check_same_parts(folder: Path, config: Config) -> None:
    """Check that parts named by both the config and `init_from` agree in all settings that the config gives."""
    saved, model = read_config(folder), config.model
    pairs: list[tuple[str, Any, Any]] = [("language_model", model.language_model, saved.language_model)]
    pairs += [(f"encoders.{key}", entry, saved.encoders.get(key)) for key, entry in model.encoders.items()]
    pairs += [(f"decoders.{key}", entry, saved.decoders.get(key)) for key, entry in model.decoders.items()]
    pairs += [(f"tokenizers.{key}", entry, saved.tokenizers.get(key)) for key, entry in model.tokenizers.items()]
    for name, wanted, found in pairs:
        for setting, value, before in differences(wanted, found) if wanted and found else ():
            raise InputError(
                f"model.{name}.{setting} is {value!r}, but {folder} was trained with {before!r}; name the same part, "
                "leave it out, or start from other weights with model.init_from"
            )


def differences(wanted: PartSettings, found: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, given value, saved value) of settings that differ from those of the saved part."""
    saved = found if found["source"] is None else {f.name: None for f in fields(Source)} | found["source"] | found
    for setting in fields(wanted):
        value: Any = getattr(wanted, setting.name)
        if setting.name == "projector":
            cls = MultimodalProjectorConfig if isinstance(wanted, EncoderConfig) else OutputProjectorConfig
            check_arguments("projector", value, cls)
            before = cls(**found["projector"])
            for name, part in value.items():
                if getattr(before, name) != part:
                    yield f"projector.{name}", part, getattr(before, name)
            continue
        value = Source(value).path if setting.name == "path" else value
        given = setting.name not in ("defaults", *MEMORY) and (setting.default is MISSING or value != setting.default)
        if given and setting.name in saved and saved[setting.name] != value:
            yield setting.name, value, saved[setting.name]


def feed_back(dataset: ConversationDataset, model: MultimodalModel, stage: Stage) -> None:
    """Make the assistant's media inputs of the user's next turn, if the stage takes rows with media on both sides."""
    if "encoder_decoder" in stage.terms:
        reads = {encoder.modality for encoder in model.encoders.values()}
        dataset.samples = [sample.fed_back(reads) for sample in dataset.samples]


def build_dataset(
    sources: list[DataSource], model: MultimodalModel, config: Config, stage: Stage
) -> ConversationDataset:
    """Dataset of all files, whose samples are checked to suit the stage."""
    dataset = ConversationDataset.from_files(sources, on_bad_sample=config.data.on_bad_sample)
    terms = Counter(term_of(sample, model, stage) for sample in dataset.samples)
    feed_back(dataset, model, stage)
    absent = set(TERMS) - set(terms)
    if not any(model.loss_weights.of(name) for name in model.loss_names() if name.split("/")[0] not in absent):
        raise InputError(
            f"every loss of the data's rows ({', '.join(sorted(terms))}) has weight 0, so nothing would train; give "
            "one of them a weight under loss"
        )
    logger.info("%d samples: %s", len(dataset), ", ".join(f"{n} {term}" for term, n in terms.items()))
    if dataset.faults:
        logger.warning("%d rows were left out, the first because: %s", len(dataset.faults), dataset.faults[0])
    return dataset


def term_of(sample: Sample, model: MultimodalModel, stage: Stage) -> str:
    """Loss term of a sample; its media must have encoders and decoders, and the stage must train on the term."""
    has_media = []
    for modules, answered, what in (
        (model.readers, False, "an encoder or tokenizer"),
        (model.makers, True, "a decoder or tokenizer"),
    ):
        known = {module.modality for module in modules.values()}
        kinds = {part.type for role, part in sample.media() if (role == "assistant") == answered}
        if lacking := sorted(kinds - known):
            mute = any(one.modality in lacking and not one.module.can_decode for one in model.tokenizers.values())
            raise InputError(
                f"{sample.name} needs {what} for {', '.join(lacking)}, but the model has "
                f"{what} for {', '.join(sorted(known)) or 'nothing'}; add it under model, or leave such rows out"
                + (" (the tokenizer there only encodes)" if answered and mute else "")
            )
        has_media.append(bool(kinds))
    read, made = has_media
    term = TERMS[read + 2 * made]
    if term not in stage.terms:
        raise InputError(
            f"{sample.name} is a row of the kind {term}, which {stage.name} does not "
            f"train on; it takes {', '.join(stage.terms)}"
        )
    return term


def build_data(
    model: MultimodalModel, processor: MultimodalProcessor, config: Config, stage: Stage
) -> tuple[ConversationDataset, ConversationDataset | None, Collator]:
    data = config.data
    for key, span in model.signal_tokens.spans.items():
        if data.max_length and len(span) > data.max_length:
            raise InputError(
                f"data.max_length is {data.max_length:,}, but one medium of {key} takes {len(span):,} tokens; raise it"
            )
    dataset = build_dataset(data.train, model, config, stage)
    held_out = build_dataset(data.eval, model, config, stage) if data.eval else None
    for rows in filter(None, (dataset, held_out)):
        use_frames_of(rows, processor)
        for sample in rows.samples if data.on_bad_sample == "error" else ():
            refuse_sources(processor, sample)
        rows.decode_targets = bool(model.tokenizer_keys) or is_read("media", model.loss_weights)
        rows.in_memory = data.in_memory
    return dataset, held_out, Collator(processor, data.max_length, cut=data.on_long_sample == "cut")


def init_projectors(
    model: MultimodalModel, dataset: ConversationDataset, collator: Collator, config: Config, accelerator: Accelerator
) -> list[str]:
    """Initialize new output projectors by `train.projector_init`; returns lines for the log."""
    before = set() if config.model.init_from is None else set(read_config(Path(config.model.init_from)).decoders)
    new = [key for key in model.decoder_keys if key not in before]
    if config.train.projector_init != "ridge":
        return []
    if not new:
        return ["train.projector_init=ridge set nothing: no output projector is new"]
    model.to(accelerator.device)
    batches = ridge_batches(dataset, collator, config, accelerator)
    strengths = set_by_ridge(model, new, batches, config.train.ridge_gain)
    said, gain = "output projector set by ridge regression", config.train.ridge_gain
    return [f"{key} {said}, λ = {value:.3g}, gain {gain:g}" for key, value in strengths.items()]


def check_metrics(train: TrainConfig, losses: list[str], found: Collection[str] = ()) -> None:
    """Check that `train.keep_best` and `train.abort_above` name metrics of this run.

    A metric of `train.eval_suite` may give several values (`bleu_1`, …), whose names are only known after an evaluation
    with the values `found`. A metric without answers to score gives no value yet.
    """
    best, of_suite = (train.keep_best or "loss").removeprefix(MAX), []
    if train.eval_suite:
        suite = read_suite(train.eval_suite)
        of_suite = [f"{suite.name}/{spec.name or spec.metric}" for spec in suite.metrics]
    names, evaluated = ["loss", "gradient_norm", *losses], [f"eval/{name}" for name in ("loss", *losses)]
    for setting, name in (*(("train.abort_above", name) for name in train.abort_above), ("train.keep_best", best)):
        begun = tuple(metric for metric in of_suite if name.startswith(metric))
        given = [value for value in found if value.startswith(begun)]
        if given and name not in found:
            raise InputError(f"{setting} names {name!r}, which the suite does not give; it gives {', '.join(given)}")
        if begun or name in evaluated:
            evaluated.append(name)
            if not train.eval_steps:
                raise InputError(f"{setting} names {name}, but there is no evaluation; give train.eval_steps")
        elif name not in names:
            near = difflib.get_close_matches(name, names + evaluated, n=1, cutoff=0.0)[0]
            raise InputError(f"{setting} names the metric {name!r}, which does not exist; did you mean {near}?")
    if best in evaluated and train.save_steps % train.eval_steps:
        raise InputError(
            f"train.keep_best is {train.keep_best!r}, so there must be an evaluation at each checkpoint; "
            f"train.save_steps is {train.save_steps}, expected a multiple of train.eval_steps, {train.eval_steps}"
        )
