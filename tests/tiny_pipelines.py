"""Tiny pipelines of the real diffusers and transformers classes, with seeded random weights, made in memory.

No two sizes are alike where they could be mixed up, and none is that of the real models.
"""

from contextlib import contextmanager

import torch
from diffusers import (
    AudioLDMPipeline,
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

CHARACTERS = [chr(code) for code in range(33, 127)]


def stable_diffusion(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """16 × 16 images, conditions (12, 32)."""
    with _seeded():
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        return StableDiffusionPipeline(
            vae=_vae(channels=3),
            text_encoder=_clip_text_encoder(hidden_size=32, length=12),
            tokenizer=_clip_tokenizer(length=12),
            unet=unet.eval(),
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def zeroscope() -> TextToVideoSDPipeline:
    """16 × 16 videos, conditions (10, 24)."""
    with _seeded():
        unet = UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        # The temporal layers start at zero: without this, frames would not see each other.
        for parameter in unet.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        return TextToVideoSDPipeline(
            vae=_vae(channels=3),
            text_encoder=_clip_text_encoder(hidden_size=24, length=10),
            tokenizer=_clip_tokenizer(length=10),
            unet=unet.eval(),
            scheduler=_scheduler("epsilon"),
        )


def audioldm() -> AudioLDMPipeline:
    """0.32 s of sound at 16 kHz (32 frames of 16 mels), conditions (1, 20)."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *CHARACTERS]
    with _seeded():
        text_encoder = ClapTextModelWithProjection(
            ClapTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=40,
                pad_token_id=1,
                projection_dim=20,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=(8, 16),
            attention_head_dim=4,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=20,
            class_embeddings_concat=True,
            norm_num_groups=4,
        )
        vocoder = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=16,
                sampling_rate=16000,
                upsample_initial_channel=32,
                upsample_rates=[5, 4, 2, 2, 2],
                upsample_kernel_sizes=[16, 16, 8, 4, 4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1, 3]],
                normalize_before=False,
            )
        )
        return AudioLDMPipeline(
            vae=_vae(channels=1),
            text_encoder=text_encoder.eval(),
            tokenizer=RobertaTokenizer(vocab=_ids(vocabulary), merges=[], model_max_length=18),
            unet=unet.eval(),
            scheduler=_scheduler("epsilon"),
            vocoder=vocoder.eval(),
        )


@contextmanager
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.37,
    ).eval()


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _clip_text_encoder(hidden_size: int, length: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(CHARACTERS),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def _clip_tokenizer(length: int) -> CLIPTokenizer:
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    return CLIPTokenizer(vocab=_ids(vocabulary), merges=[], model_max_length=length)


def _ids(vocabulary: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(vocabulary)}
