"""`MultimodalProcessor` on disk: tokenizer, encoder processors, and `processor_config.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer

from anygpt.decoders.targets import target_processor_from_dict
from anygpt.encoders.fitting import checked_fit
from anygpt.encoders.projector import MultimodalProjectorConfig
from anygpt.encoders.video import VideoFrameProcessor
from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.model.parts import build_callback, callback_dict, import_class

if TYPE_CHECKING:
    from anygpt.model.multimodal import MultimodalModel
    from anygpt.processing.processor import MultimodalProcessor

CONFIG = "processor_config.json"
FeatureCounter = Callable[[dict, dict], "int | list[int] | list[list[int]]"]


class ProcessorFiles:
    """`save_pretrained` and `from_pretrained`, mixed into `MultimodalProcessor`."""

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write tokenizer, encoder processors (under `processors/<key>/`) and `processor_config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.llm_tokenizer.save_pretrained(folder)
        encoders = {}
        for key, processor in self.encoder_processors.items():
            frames = processor.num_frames if isinstance(processor, VideoFrameProcessor) else None
            inner = processor.image_processor if frames else processor
            inner.save_pretrained(folder / "processors" / key)
            config = self.encoder_configs.get(key)
            encoders[key] = {
                "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
                "num_frames": frames,
                "modality": self.modalities[key],
                "token": self.tokens[key],
                "fit": self.fit[key],
                "own_feature_function": key in self.num_feature_funcs,
                "encoder_config": None if config is None else config.to_dict(),
                "projector": None if config is None else self.projector_configs[key].to_diff_dict(),
                "callbacks": callback_dict(self.encoder_callbacks.get(key)),
            }
        decoders = {
            key: {"tokens": self.signal_tokens[key], "targets": targets.to_dict()}
            for key, targets in self.targets.items()
        }
        content = {
            "processor_class": type(self).__name__,
            "injects": self.injects,
            "encoders": encoders,
            "decoders": decoders,
        }
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: MultimodalModel | None = None,
        num_feature_calculation_funcs: Mapping[str, FeatureCounter] | None = None,
        **_: Any,
    ) -> MultimodalProcessor:
        """Give a saved processor back; with `model`, the token ids are registered there.

        Raises:
            InputError: no processor there, or a feature function of your own, which cannot be saved, is not given.
        """
        folder = Path(folder)
        path = folder / CONFIG
        if not path.is_file():
            raise InputError(f"{folder} holds no saved processor: there is no {CONFIG}; expected a run's final/ folder")
        content = json.loads(path.read_text())
        functions = dict(num_feature_calculation_funcs or {})
        lacking = [key for key, e in content["encoders"].items() if e["own_feature_function"] and key not in functions]
        if lacking:
            raise InputError(
                f"the processor in {folder} was saved with feature functions of your own for {lacking}, which cannot "
                "be saved; give them again with num_feature_calculation_funcs="
            )
        processors = {}
        for key, entry in content["encoders"].items():
            inner = import_class(entry["class"]).from_pretrained(folder / "processors" / key)
            frames = entry["num_frames"]
            processors[key] = VideoFrameProcessor(inner, frames) if frames else inner
        self = cls.__new__(cls)
        self.encoder_processors = processors
        self.llm_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.num_feature_funcs = functions
        self.tokens = {key: entry["token"] for key, entry in content["encoders"].items()}
        self.modalities = {key: entry["modality"] for key, entry in content["encoders"].items()}
        self.fit = {
            key: checked_fit(key, MEDIA.get(entry["modality"]), entry.get("fit"))
            for key, entry in content["encoders"].items()
        }
        self.encoder_configs = {
            key: AutoConfig.for_model(**entry["encoder_config"])
            for key, entry in content["encoders"].items()
            if entry["encoder_config"] is not None
        }
        self.encoder_callbacks = {key: build_callback(e["callbacks"]) for key, e in content["encoders"].items()}
        self.projector_configs = {
            key: MultimodalProjectorConfig(**content["encoders"][key]["projector"]) for key in self.encoder_configs
        }
        self.signal_tokens = {key: entry["tokens"] for key, entry in content["decoders"].items()}
        self.targets = {key: target_processor_from_dict(e["targets"]) for key, e in content["decoders"].items()}
        self.injects = content["injects"]
        if model is not None:
            self.register(model)
        return self
