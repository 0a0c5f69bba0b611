"""Loading of media tokenizers from a folder or the Hub, also out of a whole model that contains one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SpeechT5HifiGan

from anygpt.decoders.pipelines import load_network_of_pipeline
from anygpt.errors import InputError
from anygpt.parts.files import built_from
from anygpt.parts.networks import load_network
from anygpt.parts.source import Source, TokenizerSettings, load
from anygpt.tokenizers.base import OWN_VOCODER, SETTINGS_FILE, MediaTokenizer
from anygpt.tokenizers.families import FAMILIES, WHOLE_MODELS

_OPTIONS = ("size", "num_frames", "frame_rate", "seconds", "codebooks", "delay")


def load_media_tokenizer(path: str | Path | Source, modality: str, **options: Any) -> MediaTokenizer:
    """Load a tokenizer; from a whole model (Emu3, Janus, Chameleon) only the tokenizer's tensors are read.

    `path` is a folder, Hub id or `zoo:<name>`, and `options` are the other fields of `TokenizerSettings`, as in YAML.
    An `InputError` names a path that does not exist, has no tokenizer of the modality, or does not hold exactly its
    tensors.
    """
    source = Source.of(path, options, kind=TokenizerSettings)

    def build() -> MediaTokenizer:
        saved = source.place.json(SETTINGS_FILE) or {}
        pixels = (
            saved.pop("pixels", None)
            or (source.place.json("processor_config.json") or {}).get("image_processor")  # of transformers 5
            or source.place.json("preprocessor_config.json")
        )
        own = saved.pop("vocoder", None)
        vocoder = source.vocoder or own
        settings = saved | {name: value for name in _OPTIONS if (value := getattr(source, name)) is not None}
        voice = _load_vocoder(source, vocoder) if vocoder else None
        network = _load_network(source)
        with built_from(f"{source.place}/{SETTINGS_FILE}"):
            tokenizer = MediaTokenizer(network, modality, vocoder=voice, pixels=pixels, **settings)
        if vocoder not in (None, OWN_VOCODER):
            tokenizer.settings["vocoder"] = vocoder
        return tokenizer

    return load(source, f"{modality} tokenizer", build, unused=("gguf_file", "quantization_config"))


def _load_network(source: Source) -> nn.Module:
    content = source.place.json("config.json") or {}
    whole = config = None
    name = content.get("_class_name")  # of diffusers
    if name is None:
        whole = source.config()
        config = whole.vq_config if whole.model_type in WHOLE_MODELS else whole
        name = config.model_type
    if name not in FAMILIES:
        raise InputError(
            f"{name!r} is no tokenizer; expected one of {', '.join(FAMILIES)}, or a whole model with one in it: "
            f"{', '.join(WHOLE_MODELS)}"
        )
    cls, dtype = FAMILIES[name].network_class, source.torch_dtype or torch.float32
    if config is None:
        if source.attn_implementation is not None:
            raise InputError(f"attn_implementation is set, but a {name} of diffusers has no choice of it; leave it out")
        return load_network_of_pipeline(cls, source.place, dtype)
    names = WHOLE_MODELS.get(whole.model_type, {})
    return load_network(cls, config, source.place, names=names, dtype=dtype, **source.model_options())


def _load_vocoder(source: Source, vocoder: str) -> SpeechT5HifiGan:
    """The vocoder in the tokenizer's own folder (`vocoder`), or in that of a pipeline."""
    place = source.place if vocoder == OWN_VOCODER else Source(vocoder).place
    place = place.inside(OWN_VOCODER)
    config = SpeechT5HifiGan.config_class.from_dict(place.config())
    return load_network(SpeechT5HifiGan, config, place, dtype=source.torch_dtype or torch.float32)
