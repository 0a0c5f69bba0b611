"""Saving and loading of `MultimodalProcessor`: tokenizer, encoder processors, and `processor_config.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from transformers import AutoConfig

from anygpt.composition import Composition
from anygpt.decoders.targets import target_processor_from_dict
from anygpt.encoders import fitting
from anygpt.encoders.projector import MultimodalProjectorConfig
from anygpt.encoders.video import VideoFrameProcessor
from anygpt.errors import InputError
from anygpt.model.language_models import load_tokenizer
from anygpt.model.loading import HUB_ARGUMENTS
from anygpt.model.parts import build_callback, callback_dict, import_class
from anygpt.parts.files import open_composition
from anygpt.parts.manifest import MANIFEST
from anygpt.parts.publishing import push
from anygpt.processing.conversations import ConversationProcessor, FeatureCounter

CONFIG = "processor_config.json"
P = TypeVar("P", bound=ConversationProcessor)


def save_pretrained(
    processor: ConversationProcessor, folder: str | Path, *, push_to_hub: bool = False, **options: Any
) -> None:
    """Write tokenizer, encoder processors (under `processors/<key>/`) and `processor_config.json`.

    With `push_to_hub`, also upload them; `options` are the arguments of that function.
    """
    if options and not push_to_hub:
        raise InputError(f"save_pretrained has no argument {next(iter(options))!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # it describes the previous content
    processor.llm_tokenizer.save_pretrained(folder)
    encoders = {}
    for key, part in processor.encoder_processors.items():
        frames = part.num_frames if isinstance(part, VideoFrameProcessor) else None
        inner = part.image_processor if frames else part
        inner.save_pretrained(folder / "processors" / key)
        config = processor.encoder_configs.get(key)
        encoders[key] = {
            "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
            "num_frames": frames,
            "modality": processor.modalities[key],
            "token": processor.tokens[key],
            "fit": processor.fit[key],
            "own_feature_function": key in processor.num_feature_funcs,
            "encoder_config": None if config is None else config.to_dict(),
            "projector": None if config is None else processor.projector_configs[key].to_diff_dict(),
            "callbacks": callback_dict(processor.encoder_callbacks.get(key)),
        }
    tokens, makes = processor.signal_tokens, processor.makes
    decoders = {
        key: {"tokens": tokens[key], "targets": targets.to_dict(), "modality": makes.get(key)}
        for key, targets in processor.targets.items()
    }
    tokenizers = {
        key: {
            "span": count,
            "modality": processor.modalities[key],
            "tokens": tokens[key],
            "targets": processor.coded[key].to_dict(),
            "makes": makes.get(key),
        }
        for key, count in processor.spans.items()
    }
    name, injects = type(processor).__name__, processor.injects
    content = {"processor_class": name, "injects": injects, "encoders": encoders, "decoders": decoders}
    content["tokenizers"] = tokenizers
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    if push_to_hub:
        push(folder, **{"repo_id": folder.name} | options)


def push_to_hub(processor: ConversationProcessor, repo_id: str, **options: Any) -> str:
    """Upload the processor; options as in `MultimodalModel.push_to_hub`."""
    with TemporaryDirectory() as folder:
        save_pretrained(processor, folder)
        return push(folder, repo_id, **options)


def from_pretrained(
    cls: type[P],
    folder: str | Path,
    model: Composition | None = None,
    num_feature_calculation_funcs: Mapping[str, FeatureCounter] | None = None,
    **hub: Any,
) -> P:
    """Load a saved processor from a folder or hub id; with `model`, register the token ids with it. Feature functions
    of your own, which cannot be saved, must be given again."""
    folder = open_composition(folder, **{name: value for name, value in hub.items() if name in HUB_ARGUMENTS})
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} holds no saved processor: there is no {CONFIG}; expected a run's final/ folder")
    content = json.loads(path.read_text())
    encoders, decoders, tokenizers = content["encoders"], content["decoders"], content.get("tokenizers", {})
    functions = dict(num_feature_calculation_funcs or {})
    lacking = [key for key, entry in encoders.items() if entry["own_feature_function"] and key not in functions]
    if lacking:
        raise InputError(
            f"the processor in {folder} was saved with feature functions of your own for {lacking}, which cannot "
            "be saved; give them again with num_feature_calculation_funcs="
        )
    processor = cls.__new__(cls)
    processor.encoder_processors = {}
    for key, entry in encoders.items():
        inner = import_class(entry["class"]).from_pretrained(folder / "processors" / key)
        frames = entry["num_frames"]
        processor.encoder_processors[key] = VideoFrameProcessor(inner, frames) if frames else inner
    processor.llm_tokenizer = load_tokenizer(folder)
    processor.num_feature_funcs = functions
    processor.modalities = {key: entry["modality"] for key, entry in (encoders | tokenizers).items()}
    fits = {key: entry.get("fit") for key, entry in encoders.items()}
    processor.fit = fitting.checked({key: processor.modalities[key] for key in encoders}, fits)
    known = {key: entry for key, entry in encoders.items() if entry["encoder_config"] is not None}
    processor.encoder_configs = {key: AutoConfig.for_model(**entry["encoder_config"]) for key, entry in known.items()}
    processor.projector_configs = {key: MultimodalProjectorConfig(**e["projector"]) for key, e in known.items()}
    processor.encoder_callbacks = {key: build_callback(entry["callbacks"]) for key, entry in encoders.items()}
    processor.signal_tokens = {key: entry["tokens"] for key, entry in (decoders | tokenizers).items()}
    processor.tokens = {key: entry["token"] for key, entry in encoders.items()}
    processor.tokens |= {key: processor.signal_tokens[key][0] for key in tokenizers}
    processor.targets = {key: target_processor_from_dict(entry["targets"]) for key, entry in decoders.items()}
    makes = {key: entry.get("modality", processor.targets[key].modality) for key, entry in decoders.items()}
    makes |= {key: entry["makes"] for key, entry in tokenizers.items() if entry["makes"] and key not in makes}
    processor.makes = makes
    processor.coded = {key: target_processor_from_dict(entry["targets"]) for key, entry in tokenizers.items()}
    processor.spans = {key: entry["span"] for key, entry in tokenizers.items()}
    processor.injects = content["injects"]
    if model is not None:
        processor.register(model)
    return processor
