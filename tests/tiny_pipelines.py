"""Tiny pipelines of the real diffusers and transformers classes, with seeded random weights, made in memory.

No two sizes are alike where they could be mixed up, and none is that of the real models.
"""

from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioLDMPipeline,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TOKENS = 24
"""Of the text encoders whose length the tokenizer alone knows."""
CHARACTERS = [chr(code) for code in range(33, 127)]
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]


def stable_diffusion(
    prediction_type: str = "epsilon", vae_levels: int = 2, channels: int = 3
) -> StableDiffusionPipeline:
    """16 × 16 images, conditions (12, 32); with 4 VAE levels 64 × 64, of 8 pixels a latent as the real ones have."""
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
            vae=_vae(channels=channels, levels=vae_levels),
            text_encoder=_clip_text_encoder(hidden_size=32, length=12),
            tokenizer=_clip_tokenizer(length=12),
            unet=unet.eval(),
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def stable_diffusion_xl(force_zeros: bool = True, vae_levels: int = 2) -> StableDiffusionXLPipeline:
    """16 × 16 images, conditions (12, 24 + 32), pooled (20)."""
    with _seeded():
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=56,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=6 * 6 + 20,
            norm_num_groups=4,
        )
        return StableDiffusionXLPipeline(
            vae=_vae(channels=3, levels=vae_levels),
            text_encoder=_clip_text_encoder(hidden_size=24, length=12),
            text_encoder_2=_clip_text_encoder(hidden_size=32, length=12, projection_dim=20),
            tokenizer=_clip_tokenizer(length=12),
            tokenizer_2=_clip_tokenizer(length=12),
            unet=unet.eval(),
            scheduler=_scheduler("epsilon"),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )


def stable_diffusion_3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    """16 × 16 images, conditions (12 + T5's, 64), pooled (20 + 28)."""
    with _seeded():
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_projection_dim=24,
            joint_attention_dim=64,
            pooled_projection_dim=48,
            pos_embed_max_size=14,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(channels=3, shift_factor=0.2),
            text_encoder=_clip_text_encoder(hidden_size=24, length=12, projection_dim=20),
            tokenizer=_clip_tokenizer(length=12),
            text_encoder_2=_clip_text_encoder(hidden_size=32, length=12, projection_dim=28),
            tokenizer_2=_clip_tokenizer(length=12),
            text_encoder_3=_t5(width=64) if with_t5 else None,
            tokenizer_3=_t5_tokenizer() if with_t5 else None,
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
        return AudioLDMPipeline(
            vae=_vae(channels=1),
            text_encoder=text_encoder.eval(),
            tokenizer=RobertaTokenizer(vocab=_ids(vocabulary), merges=[], model_max_length=18),
            unet=unet.eval(),
            scheduler=_scheduler("epsilon"),
            vocoder=_vocoder(),
        )


def sana() -> SanaPipeline:
    """32 × 32 images, conditions (T, 24) with masks."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS]
    with _seeded():
        gemma = Gemma2Config(
            vocab_size=len(words),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
        )
        vae = AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.37,
        )
        transformer = SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=24,
            sample_size=16,
        )
        return SanaPipeline(
            tokenizer=GemmaTokenizer(vocab=_ids(words), merges=[]),
            text_encoder=Gemma2Model(gemma).eval(),
            vae=vae.eval(),
            transformer=transformer.eval(),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )


def instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    """`stable_diffusion` with random weights on the reference's channels too."""
    parts = stable_diffusion().components
    with _seeded():
        parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=8).eval()
    return StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def flux_kontext(guidance_embeds: bool = True) -> FluxKontextPipeline:
    """`flux` in the pipeline that takes a reference."""
    pipeline = FluxKontextPipeline(**flux(guidance_embeds).components)
    pipeline.default_sample_size = 8
    return pipeline


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    """Conditions (T, 40), pooled (32); 8 pixels a latent as the real one's, which reads latents in pairs."""
    with _seeded():
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=40,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        )
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(channels=3, levels=3, shift_factor=0.2),
            text_encoder=_clip_text_encoder(hidden_size=32, length=12),
            tokenizer=_clip_tokenizer(length=12),
            text_encoder_2=_t5(width=40),
            tokenizer_2=_t5_tokenizer(),
            transformer=transformer.eval(),
        )
        pipeline.default_sample_size = 8
        return pipeline


def ltx() -> LTXPipeline:
    """Conditions (T, 32) with masks; 8 pixels and 2 frames a latent."""
    with _seeded():
        vae = AutoencoderKLLTXVideo(
            latent_channels=6,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, False, False, False),
            decoder_spatio_temporal_scaling=(True, False, False, False),
        )
        vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 6))
        vae.latents_std.copy_(torch.linspace(0.5, 1.5, 6))
        transformer = LTXVideoTransformer3DModel(
            in_channels=6,
            out_channels=6,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=32,
        )
        return LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
            vae=vae.eval(),
            text_encoder=_t5(width=32),
            tokenizer=_t5_tokenizer(),
            transformer=transformer.eval(),
        )


def wan() -> WanPipeline:
    """Conditions (T, 24), padded with zeros; 8 pixels and 4 frames a latent."""
    with _seeded():
        config = UMT5Config(vocab_size=len(PIECES), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[-0.3, 0.1, 0.0, 0.4],
            latents_std=[0.5, 1.0, 1.5, 2.0],
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        )
        return WanPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=UMT5EncoderModel(config).eval(),
            vae=vae.eval(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
            transformer=transformer.eval(),
        )


def stable_audio() -> StableAudioPipeline:
    """0.04 s of stereo at 4 kHz (20 latents of 8 samples), conditions (TOKENS, 12), padded with zeros."""
    with _seeded():
        vae = AutoencoderOobleck(
            encoder_hidden_size=10,
            downsampling_ratios=[2, 4],
            decoder_channels=3,
            decoder_input_channels=5,
            audio_channels=2,
            channel_multiples=[1, 2],
            sampling_rate=4000,
        )
        transformer = StableAudioDiTModel(
            sample_size=20,
            in_channels=5,
            out_channels=5,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=12,
            cross_attention_input_dim=12,
            time_proj_dim=8,
            global_states_input_dim=24,
        )
        return StableAudioPipeline(
            vae=vae.eval(),
            text_encoder=_t5(width=20),
            projection_model=StableAudioProjectionModel(20, 12, min_value=0, max_value=10).eval(),
            tokenizer=_t5_tokenizer(model_max_length=TOKENS),
            transformer=transformer.eval(),
            scheduler=CosineDPMSolverMultistepScheduler(),
        )


def audioldm2() -> AudioLDM2Pipeline:
    """0.32 s of sound as `audioldm`'s, conditions (3 generated + TOKENS of T5, 24)."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *CHARACTERS]
    layer = {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 40}
    audio = {"num_mel_bins": 8, "spec_size": 16, "patch_embeds_hidden_size": 8, "depths": [1], "hidden_size": 8}
    audio |= {"patch_size": 2, "patch_stride": 2, "num_hidden_layers": 1, "num_attention_heads": [2], "window_size": 4}
    with _seeded():
        clap = ClapModel(
            ClapConfig(
                text_config={**text, **layer, "pad_token_id": 1, "projection_dim": 14},
                audio_config={**audio, "projection_dim": 14},
                projection_dim=14,
            )
        )
        language_model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=99, n_positions=99))
        language_model.config.max_new_tokens = 3
        unet = AudioLDM2UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 16, 24), (None, 16, 24)),
            attention_head_dim=4,
            norm_num_groups=4,
        )
        return AudioLDM2Pipeline(
            vae=_vae(channels=1),
            text_encoder=clap.eval(),
            text_encoder_2=_t5(width=24),
            projection_model=AudioLDM2ProjectionModel(14, 24, 16).eval(),
            language_model=language_model.eval(),
            tokenizer=RobertaTokenizer(vocab=_ids(vocabulary), merges=[], model_max_length=18),
            tokenizer_2=_t5_tokenizer(model_max_length=TOKENS),
            feature_extractor=ClapFeatureExtractor(),
            unet=unet.eval(),
            scheduler=_scheduler("epsilon"),
            vocoder=_vocoder(),
        )


@contextmanager
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _vocoder() -> SpeechT5HifiGan:
    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=32,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return SpeechT5HifiGan(config).eval()


def _vae(channels: int, levels: int = 2, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.37,
        shift_factor=shift_factor,
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


def _clip_text_encoder(
    hidden_size: int, length: int, projection_dim: int | None = None
) -> CLIPTextModel | CLIPTextModelWithProjection:
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
        projection_dim=projection_dim,
    )
    return (CLIPTextModel if projection_dim is None else CLIPTextModelWithProjection)(config).eval()


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(PIECES), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def _t5_tokenizer(**options: Any) -> T5Tokenizer:
    return T5Tokenizer(vocab=PIECES, extra_ids=0, additional_special_tokens=[], **options)


def _clip_tokenizer(length: int) -> CLIPTokenizer:
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    return CLIPTokenizer(vocab=_ids(vocabulary), merges=[], model_max_length=length)


def _ids(vocabulary: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(vocabulary)}
