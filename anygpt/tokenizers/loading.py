"""Loading of media tokenizers from a folder or the Hub, also out of a whole model that contains one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SpeechT5HifiGan

from anygpt.decoders.pipelines import load_network_of_pipeline
from anygpt.errors import InputError
from anygpt.parts.networks import load_network
from anygpt.parts.source import Source, TokenizerSettings, load
from anygpt.tokenizers.base import SETTINGS_FILE, MediaTokenizer
from anygpt.tokenizers.families import FAMILIES, WHOLE_MODELS

_OPTIONS = ("size", "num_frames", "frame_rate", "seconds", "codebooks")


def load_media_tokenizer(path: str | Path | Source, modality: str, **options: Any) -> MediaTokenizer:
    """Load a tokenizer; from a whole model (Emu3, Janus, Chameleon) only the tokenizer's tensors are read.

    Args:
        path: folder, Hub id or `zoo:<name>`.
        modality: `image`, `video` or `audio`.
        options: the other fields of `TokenizerSettings`, as in YAML.

    Raises:
        InputError: no such path, no tokenizer of that modality, or files that do not hold exactly its tensors.
    """
    source = Source.of(path, options, kind=TokenizerSettings)

    def build() -> MediaTokenizer:
        saved = source.place.json(SETTINGS_FILE) or {}
        pixels = saved.pop("pixels", None) or source.place.json("preprocessor_config.json")
        vocoder = source.vocoder or saved.pop("vocoder", None)
        settings = saved | {name: value for name in _OPTIONS if (value := getattr(source, name)) is not None}
        return MediaTokenizer(
            _load_network(source),
            modality,
            vocoder=_load_vocoder(source, vocoder) if vocoder else None,
            pixels=pixels,
            **settings,
        )

    return load(source, f"{modality} tokenizer", build, unused=("gguf_file", "quantization_config"))


def _load_network(source: Source) -> nn.Module:
    content = source.place.json("config.json") or {}
    if "_class_name" in content:
        family = FAMILIES.get(content["_class_name"])
        if family is not None:
            return load_network_of_pipeline(family.network_class, source.place, source.torch_dtype or torch.float32)
        name = content["_class_name"]
    else:
        whole = source.config()
        config = whole.vq_config if whole.model_type in WHOLE_MODELS else whole
        family, name = FAMILIES.get(config.model_type), config.model_type
        if family is not None:
            return load_network(
                family.network_class,
                config,
                source.place,
                names=WHOLE_MODELS.get(whole.model_type, {}),
                dtype=source.torch_dtype,
                fallback_dtype=torch.float32,
                **source.model_options(),
            )
    raise InputError(
        f"{name!r} is no tokenizer; expected one of {', '.join(FAMILIES)}, or a whole model with one in it: "
        f"{', '.join(WHOLE_MODELS)}"
    )


def _load_vocoder(source: Source, vocoder: str) -> SpeechT5HifiGan:
    """The vocoder in the tokenizer's own folder (`vocoder`), or in that of a pipeline."""
    place = source.place if vocoder == "vocoder" else Source(vocoder).place
    place = place.inside("vocoder")
    config = SpeechT5HifiGan.config_class.from_dict(place.config())
    return load_network(SpeechT5HifiGan, config, place, dtype=source.torch_dtype or torch.float32)
