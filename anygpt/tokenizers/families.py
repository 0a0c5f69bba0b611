"""Table of media tokenizers, by the `_class_name` of a diffusers config or the `model_type` of a transformers one.

Shapes: `K` media, `C` channels, `H` × `W` pixels (or frames × mels of a sound), `F` frames of a clip, `N` samples; a
grid of codes is `(K, rows, columns)`, `(K, frames, rows, columns)`, or `(K, Q, T)` for `Q` codebooks and `T` frames.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import VQModel
from torch import Tensor, nn
from transformers import Emu3VQVAE, EncodecModel, JanusVQVAE, MimiModel


@dataclass(frozen=True)
class TokenizerFamily:
    """A class of networks.

    Attributes:
        network: its name in diffusers or transformers.
        encode: `(network, input)` -> codes by the library's own encoder.
        decode: `(network, codes)` -> the input's form by the library's own decoder; None if it has none.
        codebooks: codebooks of a network, `(codes, dim)` each.
        factor: pixels per row and column of codes; None for waveforms.
        size: height and width of a network's input in pixels; None if it has none of its own.
        any_size: whether it takes other sizes.
        clip_factor: frames per frame of codes, of a network that takes clips `(K, C, F, H, W)`; None for others, which
            are given single frames.
        hop: samples per frame of codes; None for images and clips.
    """

    network: str
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor] | None
    codebooks: Callable[[Any], list[Tensor]]
    factor: Callable[[Any], int] | None = None
    size: Callable[[Any], int | tuple[int, int] | None] = lambda config: None
    any_size: bool = True
    clip_factor: Callable[[Any], int] | None = None
    hop: Callable[[Any], int] | None = None

    @property
    def network_class(self) -> type[nn.Module]:
        return getattr(diffusers if self.network == VQModel.__name__ else transformers, self.network)


def _encode_vq(network: VQModel, pixels: Tensor) -> Tensor:
    latents = network.encode(pixels).latents
    return network.quantize(latents)[2][2].view(len(pixels), *latents.shape[2:])


def _decode_vq(network: VQModel, codes: Tensor) -> Tensor:
    shape = (*codes.shape, network.quantize.vq_embed_dim)
    if not network.config.lookup_from_codebook:
        codes = network.quantize.get_codebook_entry(codes, shape)
    return network.decode(codes, force_not_quantize=True, shape=shape).sample


def _encode_emu3(network: Emu3VQVAE, pixels: Tensor) -> Tensor:
    pixels = pixels if pixels.dim() == 4 else pixels.transpose(1, 2)
    whole = torch.full((len(pixels), 2), 2**20)  # it crops each grid to its image's size
    return torch.stack(network.encode(pixels, whole).image_tokens)


def _decode_emu3(network: Emu3VQVAE, codes: Tensor) -> Tensor:
    pixels = network.decode(codes)
    return pixels if pixels.dim() == 4 else pixels.transpose(1, 2)


def _encode_gan(network: JanusVQVAE, pixels: Tensor) -> Tensor:
    side = [size // 2 ** (len(network.config.channel_multiplier) - 1) for size in pixels.shape[2:]]
    return network.encode(pixels).image_tokens.view(len(pixels), *side)


def _encode_encodec(network: EncodecModel, waveforms: Tensor) -> Tensor:
    return network.encode(waveforms, bandwidth=network.config.target_bandwidths[-1]).audio_codes[0]


def _mimi_codebooks(network: MimiModel) -> list[Tensor]:
    halves = network.quantizer.semantic_residual_vector_quantizer, network.quantizer.acoustic_residual_vector_quantizer
    return [layer.codebook.embed for half in halves for layer in half.layers]


def _only_codebook(network: Any) -> list[Tensor]:
    return [network.quantize.embedding.weight]


def _halvings(config: Any) -> int:
    return 2 ** (len(config.channel_multiplier) - 1)


FAMILIES: dict[str, TokenizerFamily] = {
    "VQModel": TokenizerFamily(
        "VQModel",
        _encode_vq,
        _decode_vq,
        _only_codebook,
        factor=lambda config: 2 ** (len(config.block_out_channels) - 1),
        size=lambda config: config.sample_size,
    ),
    "emu3_vqgan": TokenizerFamily(
        "Emu3VQVAE",
        _encode_emu3,
        _decode_emu3,
        _only_codebook,
        factor=_halvings,
        clip_factor=lambda config: config.temporal_downsample_factor,
    ),
    "janus_vqgan": TokenizerFamily(
        "JanusVQVAE",
        _encode_gan,
        lambda network, codes: network.decode(codes.flatten(1)),
        _only_codebook,
        factor=_halvings,
        size=lambda config: config.num_patches * _halvings(config),
        any_size=False,
    ),
    "chameleon_vqgan": TokenizerFamily(
        "ChameleonVQVAE", _encode_gan, None, _only_codebook, factor=_halvings, size=lambda config: config.resolution
    ),
    "encodec": TokenizerFamily(
        "EncodecModel",
        _encode_encodec,
        lambda network, codes: network.decode(codes[None], [None]).audio_values,
        lambda network: [layer.codebook.embed for layer in network.quantizer.layers[: network.config.num_quantizers]],
        hop=lambda config: config.hop_length,
    ),
    "dac": TokenizerFamily(
        "DacModel",
        lambda network, waveforms: network.encode(waveforms).audio_codes,
        lambda network, codes: network.decode(audio_codes=codes).audio_values[:, None],
        lambda network: [layer.codebook.weight for layer in network.quantizer.quantizers],
        hop=lambda config: config.hop_length,
    ),
    "mimi": TokenizerFamily(
        "MimiModel",
        lambda network, waveforms: network.encode(waveforms).audio_codes,
        lambda network, codes: network.decode(codes).audio_values,
        _mimi_codebooks,
        hop=lambda config: round(config.sampling_rate / config.frame_rate),
    ),
}

_IN_WHOLE = {"model.vqmodel.": "", "vqmodel.": "", "model.": None, "text_model.": None, "lm_head.": None}
WHOLE_MODELS: dict[str, Mapping[str, str | None]] = {"emu3": _IN_WHOLE, "janus": _IN_WHOLE, "chameleon": _IN_WHOLE}
"""Tensor name prefixes of whole models with a tokenizer in them (`vq_config`), as in `encoders.loading`."""
