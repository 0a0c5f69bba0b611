"""Causal language models and tokenizers from a folder or the hub."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from anygpt.errors import InputError
from anygpt.model.vlm.qwen2_vl import Qwen2VLForCausalLM
from anygpt.parts.networks import load_network
from anygpt.parts.source import Source, load

# Prefixes of tensor names in whole models' files, and what replaces them in the language model; None for tensors of
# other parts. As in `anygpt.encoders.whole_models`.
_REST = ("model.multi_modal_projector.", "model.vision_tower.", "model.audio_tower.", "model.image_newline")
_BESIDE = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    **dict.fromkeys(_REST),
    **dict.fromkeys(name.removeprefix("model.") for name in _REST),
}
_QWEN2_VL = {"model.language_model.": "model.", "model.visual.": None, "visual.": None}
WHOLE_MODELS: dict[str, dict[str, str | None]] = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "internvl", "mistral3", "qwen2_audio"), _BESIDE),
    "qwen2_vl": _QWEN2_VL,
}


def load_language_model(path: str | Path | Source, **options: Any) -> nn.Module:
    """A causal language model with its head, loaded strictly.

    From a whole multimodal model (LLaVA, Qwen2-VL, …: `WHOLE_MODELS`) only the language model's tensors are read.

    Args:
        path: folder, hub id or `zoo:<name>`.
        options: other fields of `Source`, as in a YAML.

    Raises:
        InputError: nothing at `path`, not a causal language model, or missing or unexpected tensors.
    """
    source = Source.of(path, options)

    def build() -> nn.Module:
        if source.gguf_file is not None:
            return AutoModelForCausalLM.from_pretrained(
                source.folder,
                gguf_file=source.gguf_file,
                dtype=source.torch_dtype or "auto",
                **source.where,
                **source.model_options(),
            )
        source.place.config()
        config = AutoConfig.from_pretrained(source.folder, **source.where)
        names = WHOLE_MODELS.get(config.model_type, {})
        own = config
        if names:
            own = copy.deepcopy(config.get_text_config())
            own.tie_word_embeddings = config.tie_word_embeddings  # only the whole model's setting is reliable
        ours = {Qwen2VLForCausalLM.config_class: Qwen2VLForCausalLM}
        if type(own) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(own) not in ours:
            raise InputError(f"a {config.model_type!r} model is no causal language model")
        return load_network(
            ours.get(type(own)) or MODEL_FOR_CAUSAL_LM_MAPPING[type(own)],
            own,
            source.place,
            names=names,
            dtype=source.torch_dtype,
            fallback_dtype=config.dtype,
            **source.model_options(),
        )

    return load(source, "language model", build)


def load_tokenizer(path: str | Path | Source, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub id or `zoo:` part; options as in `load_language_model`."""
    source = Source.of(path, options)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    return load(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source.folder, **source.where, **gguf))
