"""Whole models of the real classes at tiny sizes, saved in the layouts of their repositories on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_parts import ENCODERS, TEXT, VISION

TINY = {e.label: e for e in ENCODERS}
SMALL_TEXT = TEXT | {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SMALL_TEXT |= {"num_key_value_heads": 2}
CLIP_TEXT = {**VISION, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {f"decoder_{k}": v for k, v in VISION.items() if k.endswith(("size", "layers", "heads"))}
DECODER = {k: v for k, v in DECODER.items() if "image" not in k and "patch" not in k}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


@dataclass(frozen=True)
class WholeModel:
    """A model around an encoder.

    Attributes:
        label, modality: for the test's name, and what its encoder reads.
        build: makes it.
        encoder: the encoder's prefix in the model's own state dict.
        hub: `(pattern, replacement)` that turn today's names into those of the repositories on the hub.
        text: the language model's prefix and head in the model's own state dict, where it has one to take out.
    """

    label: str
    modality: str
    build: Callable[[], torch.nn.Module]
    encoder: str
    hub: tuple[tuple[str, str], ...] = ()
    text: str | None = None

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What the files at the hub hold, by their names there."""
        return {self.hub_name(name): tensor for name, tensor in model.state_dict().items()}

    def hub_name(self, name: str) -> str:
        for pattern, replacement in self.hub:
            name, count = re.subn(pattern, replacement, name)
            if count:
                return name
        return name

    def save(self, model: torch.nn.Module, folder: Path, layout: str) -> Path:
        model.save_pretrained(folder)
        if layout == "hub":
            rewrite(folder, lambda _: {n: t.clone() for n, t in self.tensors(model).items()})
        return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def _of(cls: str, config: str, **values: Any) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(transformers, cls)(getattr(transformers, config)(**values))


def _vlm(cls: str, config: str, tower: str, text: str = "LlamaConfig", **values: Any) -> Callable:
    def build() -> torch.nn.Module:
        made = getattr(transformers, config)(
            vision_config=TINY[tower].config(),
            text_config=getattr(transformers, text)(**SMALL_TEXT),
            tie_word_embeddings=False,
            **values,
        )
        return getattr(transformers, cls)(made)

    return build


def _audio(cls: str, config: str, tower: str, text: Callable, **values: Any) -> Callable:
    return lambda: getattr(transformers, cls)(
        getattr(transformers, config)(
            audio_config=TINY[tower].config(), text_config=text(), tie_word_embeddings=False, **values
        )
    )


WHISPER_DECODER = {
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 32, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0, "max_target_positions": 16,
}  # fmt: skip


def _whisper(cls: str) -> Callable:
    return lambda: getattr(transformers, cls)(
        transformers.WhisperConfig(**{**TINY["Whisper"].config().to_dict(), **WHISPER_DECODER})
    )


def _phi4() -> torch.nn.Module:
    audio = TINY["Phi-4 audio"].config()
    return transformers.Phi4MultimodalForCausalLM(
        transformers.Phi4MultimodalConfig(
            **SMALL_TEXT,
            original_max_position_embeddings=64,
            vision_config={**VISION, "image_size": 32, "crop_size": 32, "feature_layer": -2},
            audio_config={**audio.to_dict()},
        )
    )


def _qwen_vl(cls: str, config: str, tower: str) -> Callable:
    def build() -> torch.nn.Module:
        vision = TINY[tower].config().to_dict()
        vision["hidden_size" if cls.startswith("Qwen2VL") else "out_hidden_size"] = SMALL_TEXT["hidden_size"]
        return getattr(transformers, cls)(
            getattr(transformers, config)(text_config=SMALL_TEXT | MROPE, vision_config=vision)
        )

    return build


OLD_LLAVA = (
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector", "multi_modal_projector"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.image_newline", "image_newline"),
    (r"^lm_head", "language_model.lm_head"),
)
PLAIN_TOWER = ((r"^model\.vision_tower\.", "vision_tower."), *OLD_LLAVA[1:])
OLD_QWEN = ((r"^model\.visual", "visual"), (r"^model\.language_model", "model"))
OLD_VIT = (
    (r"layers\.(\d+)\.attention\.q_proj", r"encoder.layer.\1.attention.attention.query"),
    (r"layers\.(\d+)\.attention\.k_proj", r"encoder.layer.\1.attention.attention.key"),
    (r"layers\.(\d+)\.attention\.v_proj", r"encoder.layer.\1.attention.attention.value"),
    (r"layers\.(\d+)\.attention\.o_proj", r"encoder.layer.\1.attention.output.dense"),
    (r"layers\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"layers\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
    (r"layers\.(\d+)\.layernorm", r"encoder.layer.\1.layernorm"),
)
DUAL = {"vision_config": VISION, "text_config": CLIP_TEXT}

WHOLE_MODELS = [
    WholeModel("CLIP", "image", _of("CLIPModel", "CLIPConfig", **DUAL), "vision_model."),
    WholeModel(
        "CLIP with a projection",
        "image",
        _of("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VISION),
        "vision_model.",
    ),
    WholeModel(
        "CLIP as a classifier", "image", _of("CLIPForImageClassification", "CLIPConfig", **DUAL), "vision_model."
    ),
    WholeModel(
        "CLIP alone", "image", _of("CLIPVisionModel", "CLIPVisionConfig", **VISION), "", ((r"^", "vision_model."),)
    ),
    WholeModel("SigLIP", "image", _of("SiglipModel", "SiglipConfig", **DUAL), "vision_model."),
    WholeModel(
        "SigLIP2",
        "image",
        _of("Siglip2Model", "Siglip2Config", vision_config=TINY["SigLIP2"].config().to_dict(), text_config=CLIP_TEXT),
        "vision_model.",
    ),
    WholeModel("ViT with a pooler", "image", _of("ViTModel", "ViTConfig", **VISION), "", OLD_VIT),
    WholeModel(
        "ViT as a classifier", "image", _of("ViTForImageClassification", "ViTConfig", **VISION), "vit.", OLD_VIT
    ),
    WholeModel(
        "ViT, masked",
        "image",
        _of("ViTForMaskedImageModeling", "ViTConfig", **VISION, encoder_stride=8),
        "vit.",
        OLD_VIT,
    ),
    WholeModel(
        "ViT-MAE",
        "image",
        _of("ViTMAEForPreTraining", "ViTMAEConfig", **VISION, **DECODER),
        "vit.",
        tuple((rf"^vit\.{a}", rf"vit.{b}") for a, b in OLD_VIT),
    ),
    WholeModel("DINOv2", "image", TINY["DINOv2"].build, ""),
    WholeModel(
        "DINOv2 as a classifier", "image", _of("Dinov2ForImageClassification", "Dinov2Config", **VISION), "dinov2."
    ),
    WholeModel(
        "DINOv2 with registers as a classifier",
        "image",
        _of("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **VISION, num_register_tokens=3),
        "dinov2_with_registers.",
    ),
    WholeModel("DINOv3 ViT", "image", TINY["DINOv3 ViT"].build, ""),
    WholeModel("DINOv3 ConvNeXt", "image", TINY["DINOv3 ConvNeXt"].build, ""),
    WholeModel(
        "EfficientNet as a classifier",
        "image",
        lambda: transformers.EfficientNetForImageClassification(TINY["EfficientNet"].config()),
        "efficientnet.",
    ),
    WholeModel("InternViT", "image", TINY["InternViT"].build, ""),
    WholeModel("Pixtral", "image", TINY["Pixtral"].build, ""),
    WholeModel("Qwen2-VL vision", "image", TINY["Qwen2-VL vision"].build, ""),
    WholeModel("Qwen2.5-VL vision", "image", TINY["Qwen2.5-VL vision"].build, ""),
    WholeModel(
        "LLaVA",
        "image",
        _vlm("LlavaForConditionalGeneration", "LlavaConfig", "CLIP"),
        "model.vision_tower.",
        OLD_LLAVA,
        "model.language_model.",
    ),
    WholeModel(
        "LLaVA around SigLIP",
        "image",
        _vlm("LlavaForConditionalGeneration", "LlavaConfig", "SigLIP"),
        "model.vision_tower.",
        OLD_LLAVA,
        "model.language_model.",
    ),
    WholeModel(
        "LLaVA around Pixtral",
        "image",
        _vlm("LlavaForConditionalGeneration", "LlavaConfig", "Pixtral"),
        "model.vision_tower.",
        PLAIN_TOWER,
        "model.language_model.",
    ),
    WholeModel(
        "LLaVA-NeXT",
        "image",
        _vlm("LlavaNextForConditionalGeneration", "LlavaNextConfig", "CLIP"),
        "model.vision_tower.",
        OLD_LLAVA,
        "model.language_model.",
    ),
    WholeModel(
        "InternVL",
        "image",
        _vlm("InternVLForConditionalGeneration", "InternVLConfig", "InternViT", "Qwen2Config"),
        "model.vision_tower.",
        PLAIN_TOWER,
        "model.language_model.",
    ),
    WholeModel(
        "Gemma 3",
        "image",
        _vlm("Gemma3ForConditionalGeneration", "Gemma3Config", "SigLIP", "Gemma3TextConfig", mm_tokens_per_image=4),
        "model.vision_tower.",
        OLD_LLAVA,
        "model.language_model.",
    ),
    WholeModel(
        "Qwen2-VL",
        "image",
        _qwen_vl("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", "Qwen2-VL vision"),
        "model.visual.",
        OLD_QWEN,
        "model.language_model.",
    ),
    WholeModel(
        "Qwen2.5-VL",
        "image",
        _qwen_vl("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "Qwen2.5-VL vision"),
        "model.visual.",
        OLD_QWEN,
    ),
    WholeModel("Whisper", "audio", _whisper("WhisperForConditionalGeneration"), "model.encoder."),
    WholeModel("Whisper without a head", "audio", _whisper("WhisperModel"), "encoder."),
    WholeModel("Whisper as a classifier", "audio", _whisper("WhisperForAudioClassification"), "encoder."),
    WholeModel("Whisper's encoder", "audio", TINY["Whisper"].build, ""),
    WholeModel(
        "CLAP",
        "audio",
        _audio(
            "ClapModel",
            "ClapConfig",
            "CLAP",
            lambda: transformers.ClapTextConfig(
                vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            ),
        ),
        "audio_model.",
    ),
    WholeModel(
        "CLAP with a projection",
        "audio",
        lambda: transformers.ClapAudioModelWithProjection(TINY["CLAP"].config()),
        "audio_model.",
    ),
    WholeModel(
        "Qwen2-Audio",
        "audio",
        _audio(
            "Qwen2AudioForConditionalGeneration",
            "Qwen2AudioConfig",
            "Qwen2-Audio",
            lambda: transformers.Qwen2Config(**SMALL_TEXT),
        ),
        "model.audio_tower.",
        ((r"^model\.audio_tower", "audio_tower"), *OLD_LLAVA[1:]),
        "model.language_model.",
    ),
    WholeModel("Qwen2-Audio's encoder", "audio", TINY["Qwen2-Audio"].build, ""),
    WholeModel("Phi-4", "audio", _phi4, "model.embed_tokens_extend.audio_embed.encoder."),
    WholeModel("Phi-4's encoder", "audio", TINY["Phi-4 audio"].build, ""),
    WholeModel(
        "VideoMAE",
        "video",
        _of("VideoMAEForPreTraining", "VideoMAEConfig", **VISION, **DECODER, num_frames=4, tubelet_size=2),
        "videomae.",
    ),
    WholeModel(
        "VideoMAE as a classifier",
        "video",
        _of("VideoMAEForVideoClassification", "VideoMAEConfig", **VISION, num_frames=4, tubelet_size=2),
        "videomae.",
    ),
    *(
        WholeModel(f"ImageBind's {e.modality} encoder", e.modality, e.build, "")
        for e in ENCODERS
        if e.label == "ImageBind"
    ),
]
