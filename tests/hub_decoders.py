"""Newer decoder families in a mirror of the hub: tiny pipelines in the layouts of their repositories, from memory.

Shards and variants, classes under other modules and the names of older transformers, tokenizers in their kinds of
files, files beside the pipeline's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tiny_pipelines
import transformers
from hub_mirror import CHARACTERS, Repository
from torch import nn

MODEL, DIFFUSER = "model", "diffusion_pytorch_model"
WHOLE, SHARDS = "{}.safetensors", "{}-*.safetensors"
BF16 = "{}.bf16.safetensors"


@dataclass(frozen=True)
class Layout:
    """A repository.

    Attributes:
        make: its tiny pipeline.
        version: of diffusers, in `model_index.json`.
        files: of each network, patterns for the stem; one safetensors file by default.
        classes: `[library, class]` in `model_index.json` where they are not the object's own.
        spiece: tokenizers that are a `spiece.model` without `tokenizer.json`.
        beside: other files of weights, which a pipeline does not read.
        variant: in which some network has no other files.
    """

    make: Callable[[], Any]
    version: str
    files: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    spiece: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    variant: str | None = None


def _audioldm2_of_then() -> Any:
    """With the language model's trunk alone, as pipelines took it until transformers 4.52."""
    pipeline = tiny_pipelines.audioldm2()
    config, trunk = pipeline.language_model.config, pipeline.language_model.transformer
    trunk.config = config
    pipeline.register_modules(language_model=trunk)
    return pipeline


T5_FAST = ["transformers", "T5TokenizerFast"]
LAYOUTS = {
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": Layout(
        tiny_pipelines.sana,
        "0.32.0.dev0",
        {"text_encoder": ["{}.bf16-*.safetensors"], "transformer": [BF16], "vae": [WHOLE, BF16]},
        {"tokenizer": ["transformers", "GemmaTokenizerFast"]},
        variant="bf16",
    ),
    "black-forest-labs/FLUX.1-schnell": Layout(
        lambda: tiny_pipelines.flux(guidance_embeds=False),
        "0.30.0.dev0",
        {"text_encoder_2": [SHARDS], "transformer": [SHARDS]},
        {"tokenizer_2": T5_FAST},
        beside=("flux1-schnell.safetensors", "ae.safetensors"),
    ),
    "black-forest-labs/FLUX.1-Kontext-dev": Layout(
        tiny_pipelines.flux_kontext,
        "0.34.0.dev0",
        {"text_encoder_2": [SHARDS], "transformer": [SHARDS]},
        {"tokenizer_2": T5_FAST},
        beside=("flux1-kontext-dev.safetensors", "ae.safetensors"),
    ),
    "timbrooks/instruct-pix2pix": Layout(
        tiny_pipelines.instruct_pix2pix,
        "0.12.0.dev0",
        {"unet": [WHOLE, "{}.fp16.safetensors", "{}.bin"], "vae": [WHOLE, "{}.fp16.safetensors", "{}.bin"]}
        | {"text_encoder": [WHOLE, "{}.fp16.safetensors", "pytorch_{}.bin"]},
        beside=("instruct-pix2pix-00-22000.safetensors",),
    ),
    "Lightricks/LTX-Video": Layout(
        tiny_pipelines.ltx,
        "0.32.0.dev0",
        {"text_encoder": [SHARDS], "transformer": [SHARDS]},
        {"tokenizer": ["transformers", "T5Tokenizer"]},
        spiece=("tokenizer",),
        beside=("ltx-video-2b-v0.9.safetensors",),
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Layout(
        tiny_pipelines.wan,
        "0.33.0.dev0",
        {"text_encoder": [SHARDS], "transformer": [SHARDS]},
        {"tokenizer": T5_FAST},
    ),
    "stabilityai/stable-audio-open-1.0": Layout(
        tiny_pipelines.stable_audio,
        "0.30.0.dev0",
        classes={"tokenizer": T5_FAST, "projection_model": ["stable_audio", "StableAudioProjectionModel"]},
        beside=("model.safetensors", "model.ckpt"),
    ),
    "cvssp/audioldm2-large": Layout(
        _audioldm2_of_then,
        "0.21.0.dev0",
        classes={"tokenizer": ["transformers", "RobertaTokenizerFast"], "tokenizer_2": T5_FAST},
    ),
    "cvssp/audioldm2": Layout(
        tiny_pipelines.audioldm2,
        "0.21.0.dev0",
        {name: [WHOLE, "pytorch_{}.bin"] for name in ("text_encoder", "text_encoder_2", "language_model", "vocoder")}
        | {name: [WHOLE, "{}.bin"] for name in ("unet", "vae", "projection_model")},
        {
            "tokenizer": ["transformers", "RobertaTokenizerFast"],
            "tokenizer_2": T5_FAST,
            "unet": ["audioldm2", "AudioLDM2UNet2DConditionModel"],
            "projection_model": ["audioldm2", "AudioLDM2ProjectionModel"],
        },
    ),
}


def write(cache: Path, name: str) -> Any:
    """Write a repository into a cache as `HF_HUB_CACHE` names one; returns the pipeline that it holds."""
    layout, repository = LAYOUTS[name], Repository(cache, name, real=False, hollow=False)
    pipeline = layout.make()
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__, "_diffusers_version": layout.version}
    for part, component in pipeline.components.items():
        if component is None:
            index[part] = [None, None]
            continue
        kind = type(component)
        own = ["transformers" if kind.__module__.startswith("transformers") else "diffusers", kind.__name__]
        index[part] = layout.classes.get(part, own)
        if isinstance(component, nn.Module):
            stem = MODEL if isinstance(component, transformers.PreTrainedModel) else DIFFUSER
            files = [pattern.format(stem) for pattern in layout.files.get(part, [WHOLE])]
            repository.network(part, component, files)
        elif part in layout.spiece:
            pipeline.register_modules(**{part: spiece_tokenizer(repository, part, component)})
        else:
            component.save_pretrained(repository.folder / part)
            settings = repository.folder / part / "tokenizer_config.json"
            if settings.is_file():
                old = json.loads(settings.read_text()) | {"tokenizer_class": index[part][1]}
                settings.write_text(json.dumps(old))
    repository.json("model_index.json", index)
    for file in layout.beside:
        repository.text(file, "read by other libraries")
    repository.text("README.md", "")
    return pipeline


def spiece_tokenizer(repository: Repository, folder: str, known: Any) -> transformers.T5Tokenizer:
    """`spiece.model` alone; its pieces are as many as the tiny text encoder has embeddings, or fewer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(CHARACTERS), "a red ring and two dogs"] * 20),
        model_writer=model,
        vocab_size=len(known),
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    repository.path(f"{folder}/spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    repository.json(f"{folder}/special_tokens_map.json", special)
    settings = {"extra_ids": 0, "model_max_length": 128, "tokenizer_class": "T5Tokenizer", "legacy": True}
    repository.json(f"{folder}/tokenizer_config.json", special | settings)
    return transformers.T5Tokenizer.from_pretrained(repository.folder / folder)
