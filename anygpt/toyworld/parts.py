"""Construction of the zoo's parts: one function per part, which initialises it with random weights and saves it.

The weights come from torch's global generator. The parts differ in size so that code that confuses them fails.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
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
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from anygpt.toyworld.language import caption, plain_caption
from anygpt.toyworld.tokenizers import clip_tokenizer, llm_tokenizer, roberta_tokenizer
from anygpt.toyworld.world import THINGS

_MEL_BINS = 64
"""Mel bins of AudioLDM's VAE, whose input is (frames, 64) log-mel, and of its vocoder."""
_IMAGE_SIZE = 32
"""Width and height of pictures and clips."""
_VAE_FACTOR = 8
_LATENT_CHANNELS = 8
_TEXT_TOKENS = 16
"""Longest caption of the image and video decoders; "a purple triangle moving right" needs 7."""
_EMBEDDING_GAIN = 50.0
"""Factor on the token embeddings of CLIP's text encoders, see `_clip_text`."""
_CLAP_DIM = 32
"""Width of CLAP's projection, AudioLDM's only condition. The pipeline pads its empty negative prompt to this many
tokens (not to the tokenizer's length), so CLAP needs at least that many positions."""

_ATTENTION_GAIN = 3.0
_LEAST_VARIANCE = 0.03
"""For `_whiten`: the factor on the weights of CLAP's attention, and the floor on a direction's variance as a share of
the largest one."""


def save_image_encoder(folder: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=_IMAGE_SIZE,
        patch_size=8,
        projection_dim=96,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    # The default backend needs torchvision.
    CLIPImageProcessorPil(
        size={"shortest_edge": _IMAGE_SIZE}, crop_size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    ).save_pretrained(folder)


def save_audio_encoder(folder: Path) -> None:
    config = WhisperConfig(
        vocab_size=1,  # unused by the encoder, as are the token ids below
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        num_mel_bins=80,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        max_source_positions=50,  # 1 s: 100 mel frames, halved by the second convolution
    )
    WhisperEncoder(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, sampling_rate=16_000, chunk_length=1).save_pretrained(folder)


def save_language_model(folder: Path) -> None:
    tokenizer = llm_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_image_decoder(folder: Path) -> None:
    text_encoder, tokenizer = _clip_text(hidden_size=64)
    unet = UNet2DConditionModel(
        sample_size=_IMAGE_SIZE // _VAE_FACTOR,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=_vae(channels=3, sample_size=_IMAGE_SIZE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def save_video_decoder(folder: Path) -> None:
    text_encoder, tokenizer = _clip_text(hidden_size=48)
    unet = UNet3DConditionModel(
        sample_size=_IMAGE_SIZE // _VAE_FACTOR,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=48,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    TextToVideoSDPipeline(
        vae=_vae(channels=3, sample_size=_IMAGE_SIZE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        # Stronger noise, ending at zero signal (arXiv 2301.11093 and 2305.08891): over many frames the mean latent,
        # which holds the colour, shows through noise that would hide it in a picture. A denoiser that reads it there
        # does not learn to take it from the caption, and in sampling reads it from pure noise.
        scheduler=_scheduler(beta_end=0.03, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ).save_pretrained(folder)


def save_audio_decoder(folder: Path) -> None:
    tokenizer = roberta_tokenizer(model_max_length=24)
    text_encoder = ClapTextModelWithProjection(
        ClapTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_factor=0.5,  # see `_whiten`
            max_position_embeddings=_CLAP_DIM + 2,  # RoBERTa's positions start at the padding id (1) plus one
            projection_dim=_CLAP_DIM,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    _whiten(text_encoder, tokenizer)
    channels = (32, 64)
    unet = UNet2DConditionModel(
        sample_size=_MEL_BINS // _VAE_FACTOR,  # in latent frames: 8 · 8 mel frames · 10 ms = 0.64 s
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # As in AudioLDM: without text states the "cross" attention, with the blocks' own widths, falls back to
        # self-attention, and the condition is a class embedding.
        cross_attention_dim=channels,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=_CLAP_DIM,
        class_embeddings_concat=True,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=_MEL_BINS,
            sampling_rate=16_000,
            upsample_initial_channel=128,
            # Two layers at the spectrogram's rate, then one upsampling by the hop (160 samples): a learned inverse
            # transform with a kernel of two frames. With AudioLDM's factors 5, 4, 4 and 2, so few channels learn tones
            # far more slowly.
            upsample_rates=[1, 1, 160],
            upsample_kernel_sizes=[3, 3, 320],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            initializer_range=0.06,  # with the usual 0.01 random weights give silence
            normalize_before=True,
        )
    )
    vocoder.mean.fill_(-5.0)  # approximate statistics of log-mels, which lie between log(1e-5) and 1
    vocoder.scale.fill_(4.0)
    AudioLDMPipeline(
        vae=_vae(channels=1, sample_size=_MEL_BINS),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        vocoder=vocoder,
    ).save_pretrained(folder)


def _clip_text(hidden_size: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A text encoder, which is never trained, and its tokenizer.

    Its token embeddings are so large that positions and attention add little to them. Each state is then close to its
    own word's embedding, and an unseen pair of shape and colour is encoded as a sum of what its shape and its colour
    contribute elsewhere, with an error of 4 to 10% (15 to 37% at the usual size).
    """
    tokenizer = clip_tokenizer(model_max_length=_TEXT_TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_TEXT_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    text_encoder = CLIPTextModel(config)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.mul_(_EMBEDDING_GAIN)
    return text_encoder, tokenizer


@torch.no_grad()
def _whiten(text_encoder: ClapTextModelWithProjection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set CLAP's last layer so that its caption embeddings have mean 0 and similar variance in all directions.

    AudioLDM's single condition vector must distinguish things, and must generalise to unseen pairs of shape and colour.
    Trained along with the denoiser, it distinguishes only. With small random weights it is nearly a sum over the words,
    which generalises, but nearly the same for all captions until it is whitened (arXiv 2103.15316). Whitening also
    amplifies the rounding error of the large common part: with the usual attention weights captions differ by 1%, too
    little for bfloat16; with weights three times as large, by 11%, and they are still sums over the words.
    """
    for layer in text_encoder.text_model.encoder.layer:
        layer.attention.self.value.weight.mul_(_ATTENTION_GAIN)
        layer.attention.output.dense.weight.mul_(_ATTENTION_GAIN)
    rng = np.random.default_rng(0)
    captions = [plain_caption(thing) for thing in THINGS]
    captions += [caption(thing, rng, modality="audio") for thing in THINGS for _ in range(8)]
    last = text_encoder.text_projection.linear2
    inputs: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    text_encoder.eval()(**tokenizer(captions, padding=True, return_tensors="pt"))
    hook.remove()
    features = inputs[0].double()
    mean = features.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(features.T, correction=0))
    # Directions of little variance are not a sum over the words; the floor keeps them small.
    weight = (variances + _LEAST_VARIANCE * variances.max()).rsqrt()[:, None] * directions.T
    last.weight.copy_(weight)
    last.bias.copy_(-weight @ mean)


def _vae(channels: int, sample_size: int) -> AutoencoderKL:
    """A VAE with four levels, so that latents are downsampled by 8 as in Stable Diffusion; inputs larger than a picture
    get fewer channels at the finest levels, to keep the cost similar."""
    widths = (16, 32, 64, 64) if sample_size <= _IMAGE_SIZE else (8, 16, 32, 64)
    assert 2 ** (len(widths) - 1) == _VAE_FACTOR
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        sample_size=sample_size,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        scaling_factor=1.0,
    )


_scheduler = partial(
    DDIMScheduler,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="v_prediction",
)
"""Stable Diffusion's noise schedule with version 2's v-prediction."""
