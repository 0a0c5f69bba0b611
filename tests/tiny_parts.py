"""Every encoder family and language model that we support, at a tiny size with random weights.

The tests of coverage and the table in the README (written by `tests/support_matrix.py`) come from these lists.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from anygpt.encoders import FAMILIES, VideoEncoder, VideoFrameProcessor
from anygpt.encoders.imagebind import ImageBindConfig, processor_for

SIZE = 16  # pixels a side
PATCH = 8
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class TinyEncoder:
    """An encoder at a tiny size.

    Attributes:
        label: as the README's table calls it.
        modality: what it reads.
        config: makes its config.
        processor: makes its processor.
        num_frames: set where it runs on the frames of a clip, or on a clip of so many.
    """

    label: str
    modality: str
    config: Callable[[], Any]
    processor: Callable[[], Any]
    num_frames: int | None = None

    def build(self) -> torch.nn.Module:
        config = self.config()
        encoder = FAMILIES[config.model_type].load_class()
        encoder = encoder.from_config(config) if encoder is transformers.AutoModel else encoder(config)
        is_image = FAMILIES[config.model_type].main_input == "pixel_values"
        return VideoEncoder(encoder, self.num_frames) if self.modality == "video" and is_image else encoder

    def build_processor(self) -> Any:
        return VideoFrameProcessor(self.processor(), self.num_frames) if self.num_frames else self.processor()

    def media(self, seed: int) -> Any:
        """A medium, different for each seed, in the form that the processor takes."""
        random = np.random.default_rng(seed)
        if self.modality == "image":
            height, width = random.integers(20, 60, 2)
            return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if self.modality == "video":
            return random.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
        return (0.1 * random.standard_normal(1600 + 3000 * seed)).astype(np.float32)


def _config(name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**values)


def _from(module: str, name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(f"transformers.models.{module}"), name)(**values)


def _pil(module: str, name: str, **values: Any) -> Callable[[], Any]:
    """An image processor's PIL version: the default one needs torchvision."""
    return _from(f"{module}.image_processing_pil_{module}", f"{name}Pil", **values)


_SQUARE = {"height": SIZE, "width": SIZE}
_clip_processor = _pil("clip", "CLIPImageProcessor", size={"shortest_edge": SIZE}, crop_size=_SQUARE)
_vit_processor = _pil("vit", "ViTImageProcessor", size=_SQUARE)
_siglip_processor = _pil("siglip", "SiglipImageProcessor", size=_SQUARE)
_qwen_processor = _pil(
    "qwen2_vl",
    "Qwen2VLImageProcessor",
    patch_size=4,
    min_pixels=64,
    max_pixels=1024,
    merge_size=2,
    temporal_patch_size=2,
)
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}

IMAGEBIND = {
    "kernel_size": [2, 56, 56],
    "audio_kernel_size": 32,
    "audio_stride": 32,
    "out_embed_dim": 24,
    **{
        f"{tower}_{name}": size
        for tower in ("vision", "text", "audio", "depth", "thermal", "imu")
        for name, size in (("embed_dim", 16), ("num_blocks", 2), ("num_heads", 2))
    },
}


def _imagebind(modality: str) -> TinyEncoder:
    return TinyEncoder(
        "ImageBind",
        modality,
        lambda: ImageBindConfig(**IMAGEBIND).encoder_of(modality),
        lambda: processor_for(modality),
    )


CLIP = TinyEncoder("CLIP", "image", _config("CLIPVisionConfig", **VISION), _clip_processor)
ENCODERS = [
    CLIP,
    TinyEncoder("SigLIP", "image", _config("SiglipVisionConfig", **VISION), _siglip_processor),
    TinyEncoder(
        "SigLIP2",
        "image",
        _config(
            "Siglip2VisionConfig",
            **{k: v for k, v in VISION.items() if k != "image_size"},
            num_patches=16,
        ),
        _pil("siglip2", "Siglip2ImageProcessor", patch_size=PATCH, max_num_patches=16),
    ),
    TinyEncoder("ViT", "image", _config("ViTConfig", **VISION), _vit_processor),
    TinyEncoder("DINOv2", "image", _config("Dinov2Config", **VISION), _vit_processor),
    TinyEncoder(
        "DINOv2 with registers",
        "image",
        _config("Dinov2WithRegistersConfig", **VISION, num_register_tokens=3),
        _vit_processor,
    ),
    TinyEncoder("DINOv3 ViT", "image", _config("DINOv3ViTConfig", **VISION, num_register_tokens=3), _vit_processor),
    TinyEncoder(
        "DINOv3 ConvNeXt",
        "image",
        _config("DINOv3ConvNextConfig", hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], image_size=64),
        _pil("vit", "ViTImageProcessor", size={"height": 64, "width": 64}),
    ),
    TinyEncoder(
        "EfficientNet",
        "image",
        _config(
            "EfficientNetConfig",
            width_coefficient=0.25,
            depth_coefficient=1.0,
            hidden_dim=320,
            initializer_range=0.5,
            num_block_repeats=[1] * 7,
            depthwise_padding=[5],  # whose input has a side of 5
        ),
        _pil("efficientnet", "EfficientNetImageProcessor", size={"height": 80, "width": 80}),
    ),
    TinyEncoder(
        "InternViT", "image", _config("InternVLVisionConfig", **VISION | {"image_size": [SIZE, SIZE]}), _clip_processor
    ),
    TinyEncoder(
        "Pixtral",
        "image",
        _config("PixtralVisionConfig", **VISION | {"image_size": 64, "hidden_size": 16, "head_dim": 8}),
        _pil("pixtral", "PixtralImageProcessor", size={"longest_edge": 48}, patch_size=PATCH),
    ),
    TinyEncoder(
        "Qwen2-VL vision",
        "image",
        _from(
            "qwen2_vl.configuration_qwen2_vl",
            "Qwen2VLVisionConfig",
            embed_dim=16,
            hidden_size=24,
            mlp_ratio=2,
            **_QWEN_VISION,
        ),
        _qwen_processor,
    ),
    TinyEncoder(
        "Qwen2.5-VL vision",
        "image",
        _from(
            "qwen2_5_vl.configuration_qwen2_5_vl",
            "Qwen2_5_VLVisionConfig",
            hidden_size=16,
            intermediate_size=32,
            out_hidden_size=24,
            window_size=16,
            fullatt_block_indexes=[1],
            **_QWEN_VISION,
        ),
        _qwen_processor,
    ),
    TinyEncoder(
        "Whisper",
        "audio",
        _config(
            "WhisperConfig",
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=50,
        ),
        _config("WhisperFeatureExtractor", feature_size=8, chunk_length=1),
    ),
    TinyEncoder(
        "Qwen2-Audio",
        "audio",
        _config(
            "Qwen2AudioEncoderConfig",
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=50,
        ),
        _config("WhisperFeatureExtractor", feature_size=8, chunk_length=1),
    ),
    TinyEncoder(
        "CLAP",
        "audio",
        _config(
            "ClapAudioConfig",
            spec_size=32,
            num_mel_bins=8,
            patch_size=2,
            patch_stride=[2, 2],
            patch_embeds_hidden_size=8,
            hidden_size=16,
            depths=[1, 1],
            num_attention_heads=[2, 2],
            window_size=4,
            enable_fusion=False,
        ),
        _config(
            "ClapFeatureExtractor",
            feature_size=8,
            sampling_rate=16_000,
            hop_length=160,
            fft_window_size=400,
            max_length_s=1,
            truncation="rand_trunc",
        ),
    ),
    TinyEncoder(
        "Phi-4 audio",
        "audio",
        _from(
            "phi4_multimodal.configuration_phi4_multimodal",
            "Phi4MultimodalAudioConfig",
            hidden_size=16,
            intermediate_size=32,
            num_blocks=2,
            num_attention_heads=2,
            ext_pw_out_channel=16,
            depthwise_separable_out_channel=16,
            nemo_conv_channels=8,
        ),
        _config("Phi4MultimodalFeatureExtractor"),
    ),
    TinyEncoder(
        "VideoMAE",
        "video",
        _config("VideoMAEConfig", **VISION, num_frames=4, tubelet_size=2),
        _pil("videomae", "VideoMAEImageProcessor", size={"shortest_edge": SIZE}, crop_size=_SQUARE),
        num_frames=4,
    ),
    *map(_imagebind, ("image", "video", "audio")),
    TinyEncoder("any image encoder, frame by frame", "video", CLIP.config, _clip_processor, num_frames=3),
]


@dataclass(frozen=True)
class TinyLanguageModel:
    """A causal language model at a tiny size: its label, and what makes its config."""

    label: str
    config: Callable[[], Any]

    def build(self) -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_config(self.config())


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LLAMA = TinyLanguageModel("Llama", _config("LlamaConfig", **TEXT))
LANGUAGE_MODELS = [
    LLAMA,
    TinyLanguageModel("Mistral", _config("MistralConfig", **TEXT)),
    TinyLanguageModel("Mixtral", _config("MixtralConfig", **TEXT, num_local_experts=4)),
    TinyLanguageModel("Qwen2", _config("Qwen2Config", **TEXT)),
    TinyLanguageModel("Qwen3", _config("Qwen3Config", **TEXT, head_dim=8)),
    TinyLanguageModel("Qwen3-MoE", _config("Qwen3MoeConfig", **TEXT, head_dim=8, num_experts=4, **_EXPERTS)),
    TinyLanguageModel("Gemma 2", _config("Gemma2Config", **TEXT, head_dim=8, sliding_window=64)),
    TinyLanguageModel("Gemma 3", _config("Gemma3TextConfig", **TEXT, head_dim=8, sliding_window=64)),
    TinyLanguageModel("Phi-3", _config("Phi3Config", **TEXT)),
    TinyLanguageModel(
        "OPT",
        _config(
            "OPTConfig",
            vocab_size=512,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            dropout=0.0,
        ),
    ),
    TinyLanguageModel(
        "GPT-2",
        _config(
            "GPT2Config",
            vocab_size=512,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    TinyLanguageModel("OLMo 2", _config("Olmo2Config", **TEXT)),
]
