"""Causal language models and tokenizers from a folder or the hub."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    utils,
)

from anygpt.composition import evaluating
from anygpt.errors import InputError
from anygpt.model.vlm import Qwen2VLForCausalLM
from anygpt.parts.files import Weights, built_from
from anygpt.parts.networks import check_report, load_network
from anygpt.parts.source import Source, check_vocabulary, load

GgufConfig = getattr(utils.quantization_config, "GgufConfig", None)  # not in older releases, which always dequantize
WHOLE_MODELS = ("gemma3", "llava", "llava_next", "llava_onevision", "internvl", "mistral3", "qwen2_audio", "qwen2_vl")
_OTHERS = ("multi_modal_projector.", "vision_tower.", "audio_tower.", "image_newline", "visual.")
# Prefixes of tensor names in their files, and what replaces them, as in `anygpt.encoders.loading`.
_NAMES: dict[str, str | None] = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    **{prefix + name: None for prefix in ("model.", "") for name in _OTHERS},
}


def load_language_model(path: str | Path | Source, **options: Any) -> nn.Module:
    """A causal language model with its head, loaded strictly: missing or unexpected tensors are an `InputError`.

    From a whole multimodal model (`WHOLE_MODELS`) only the language model's tensors are read. `path` is a folder, hub
    id or `zoo:<name>`, and `options` are other fields of `Source`, as in a YAML.
    """
    source = Source.of(path, options)

    def build() -> nn.Module:
        given = source.model_options()
        if source.gguf_file is not None:
            if source.place.file(source.gguf_file) is None:
                raise InputError(f"{source.place} has no file {source.gguf_file}")
            source.place.check_no_adapter()
            given |= {"gguf_file": source.gguf_file, "dtype": source.torch_dtype or "auto", **source.auto}
            if GgufConfig is not None:  # packed weights could neither train adapters nor be saved
                given["quantization_config"] = GgufConfig(dequantize=True)
            with built_from(f"{source.place}/{source.gguf_file}"):
                model, info = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True, **given)
            faults = {"lacks": info["missing_keys"], "has left over": info["unexpected_keys"]}
            check_report(Weights(Path(source.path, source.gguf_file), {}), type(model), faults)
            return model
        config = own = source.config()
        whole = config.model_type in WHOLE_MODELS
        if whole:
            own = copy.deepcopy(config.get_text_config())
            # Only the whole model's setting is reliable; Qwen2-Audio has none.
            own.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        is_qwen2_vl = type(own) is Qwen2VLForCausalLM.config_class
        cls = Qwen2VLForCausalLM if is_qwen2_vl else MODEL_FOR_CAUSAL_LM_MAPPING.get(type(own), None)
        if cls is None or cls.__name__.endswith("ForConditionalGeneration"):
            raise InputError(
                f"a {config.model_type!r} model is no causal language model, or has encoders of its own; expected "
                f"a language model alone, or one of {', '.join(WHOLE_MODELS)}, whose language model is read"
            )
        given |= {"dtype": source.torch_dtype, "fallback_dtype": config.dtype}
        return load_network(cls, own, source.place, names=_NAMES if whole else {}, **given)

    return load(source, "language model", build)


def check_causal(language_model: nn.Module) -> None:
    """Raise `InputError` if tokens attend to later ones, as in BERT or XLNet: labels would leak to the predictions."""
    weight = language_model.get_input_embeddings().weight
    if weight.is_meta or any(getattr(module, "is_causal", False) for module in language_model.modules()):
        return
    with evaluating(language_model), torch.enable_grad():
        embeds = weight[None, :4].detach().clone().requires_grad_()
        logits = language_model(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
        (gradient,) = torch.autograd.grad(logits[:, 0].float().square().sum(), embeds)
    if gradient[:, 1:].any():
        raise InputError(
            f"the {type(language_model).__name__} attends to later tokens, so it is no causal language model; "
            "expected a decoder such as Llama or GPT-2"
        )


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself; without a padding token (Llama, Mistral, GPT-2) it pads with its end token, which the
    attention mask hides."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer(path: str | Path | Source, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub id or `zoo:` part; options as in `load_language_model`."""
    source = Source.of(path, options)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}

    def build() -> PreTrainedTokenizerBase:
        try:
            with built_from(f"{source.place}/tokenizer_config.json or tokenizer.json"):
                tokenizer = AutoTokenizer.from_pretrained(source.folder, **source.auto, **gguf)
        except ValueError as error:
            if "backend tokenizer" in str(error):
                raise InputError("it has no tokenizer.json, tokenizer.model or other file of a tokenizer") from error
            if "tiktoken" in str(error):  # tried on any tokenizer.model that sentencepiece cannot read
                raise InputError(
                    f"{source.place}/tokenizer.model is no sentencepiece model: download it again"
                ) from error
            raise
        check_vocabulary(tokenizer, source.place)
        for name in ("chat_template.json", "processor_config.json"):  # of a processor, in older repositories
            if tokenizer.chat_template is None:
                tokenizer.chat_template = (source.place.json(name) or {}).get("chat_template")
        return with_padding(tokenizer)

    return load(source, "tokenizer", build)
