"""The decoder families added after the first five: what their pipelines do, written out apart from our code.

`velocity` and `unscale` repeat lines of diffusers' pipelines and training examples, for one family each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny_pipelines
import torch
from tiny_pipelines import TOKENS
from torch import Tensor

from anygpt.decoders import (
    AudioLDM2Decoder,
    Condition,
    DiffusionDecoder,
    FluxDecoder,
    LTXDecoder,
    SanaDecoder,
    StableAudioDecoder,
    WanDecoder,
)

CAPTIONS = ["a red ring", "two dogs, and rather more words than fit", ""]


@dataclass
class Family:
    """One family.

    Attributes:
        label: in the README's table.
        make: its tiny pipeline.
        shape, pooled_dim, latents: `(T, D)`, `P` and a sample's latents, of the tiny one with `settings`.
        encode: `(pipeline, captions)` to the pipeline's own encoding.
        predict: `(pipeline, noisy, timestep, condition)` of one sample to the network's prediction.
        unscale: `(pipeline, latents)` to what the pipeline would give the VAE.
        settings: of the decoder.
        call: of the pipeline, for every sampling.
        guidance: the names under which this pipeline takes a scale, and those with a negative prompt.
    """

    label: str
    kind: type[DiffusionDecoder]
    make: Callable[[], Any]
    shape: tuple[int, int]
    pooled_dim: int | None
    latents: tuple[int, ...]
    encode: Callable[[Any, list[str]], Condition]
    predict: Callable[[Any, Tensor, Tensor, Condition], Tensor]
    unscale: Callable[[Any, Tensor], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    guidance: str | None = "guidance_scale"
    negative: str | None = "guidance_scale"

    def decoder(self) -> DiffusionDecoder:
        return self.kind(self.make(), **self.settings)


def _sana_encode(pipeline: Any, captions: list[str]) -> Condition:
    instruction = pipeline.__call__.__wrapped__.__defaults__[-1]  # the last parameter of the call
    embeds, mask, _, _ = pipeline.encode_prompt(
        captions, False, max_sequence_length=TOKENS, complex_human_instruction=instruction
    )
    return Condition(embeds, mask=mask)


def _sana_predict(pipeline: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    mask = condition.mask.to(noisy.dtype)
    return pipeline.transformer(
        noisy, encoder_hidden_states=condition.embeds, encoder_attention_mask=mask, timestep=t
    ).sample


def _flux_predict(pipeline: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    _, channels, height, width = noisy.shape
    blocks = noisy.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # B C h 2 w 2
    packed = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    places = torch.stack(torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij"), dim=-1)
    ids = torch.cat([torch.zeros(height // 2, width // 2, 1), places], dim=-1).flatten(0, 1).to(noisy)
    guidance = torch.tensor([3.5], dtype=noisy.dtype) if pipeline.transformer.config.guidance_embeds else None
    made = pipeline.transformer(
        packed,
        timestep=t / 1000,
        guidance=guidance,
        pooled_projections=condition.pooled,
        encoder_hidden_states=condition.embeds,
        txt_ids=torch.zeros(condition.embeds.shape[1], 3, dtype=noisy.dtype),
        img_ids=ids,
    ).sample
    blocks = made.unflatten(1, (height // 2, width // 2)).unflatten(3, (channels, 2, 2))  # B h w C 2 2
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _flux_encode(pipeline: Any, captions: list[str]) -> Condition:
    return Condition(*pipeline.encode_prompt(captions, max_sequence_length=TOKENS)[:2])


def _ltx_encode(pipeline: Any, captions: list[str]) -> Condition:
    embeds, mask, _, _ = pipeline.encode_prompt(captions, None, False, max_sequence_length=TOKENS)
    return Condition(embeds, mask=mask)


def _ltx_predict(pipeline: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    frames, height, width = noisy.shape[2:]
    made = pipeline.transformer(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=condition.embeds,
        timestep=t,
        encoder_attention_mask=condition.mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(2 / 12, 8, 8),
    ).sample
    return made.transpose(1, 2).unflatten(2, (frames, height, width))


def _wan_encode(pipeline: Any, captions: list[str]) -> Condition:
    embeds, _ = pipeline.encode_prompt(captions, None, False, max_sequence_length=TOKENS)
    return Condition(embeds, mask=_token_mask(pipeline.tokenizer, captions))


def _token_mask(tokenizer: Any, captions: list[str]) -> Tensor:
    tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return tokens.attention_mask


def _stable_audio_encode(pipeline: Any, captions: list[str]) -> Condition:
    embeds = pipeline.encode_prompt(captions, torch.device("cpu"), False)
    return Condition(embeds, mask=_token_mask(pipeline.tokenizer, captions))


def _stable_audio_predict(pipeline: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    start, end = (
        conditioner(torch.tensor([seconds], dtype=noisy.dtype))
        for conditioner, seconds in (
            (pipeline.projection_model.start_number_conditioner, 0.0),
            (pipeline.projection_model.end_number_conditioner, 0.03),
        )
    )
    angles = torch.outer(torch.arange(21.0), 10000 ** -(torch.arange(0, 2, 2) / 2.0))  # rotary of width 2
    angles = torch.cat([angles, angles], dim=1)
    return pipeline.transformer(
        noisy,
        t,
        encoder_hidden_states=torch.cat([condition.embeds, start, end], dim=1),
        global_hidden_states=torch.cat([start, end], dim=2),
        rotary_embedding=(angles.cos(), angles.sin()),
    ).sample


def _audioldm2_encode(pipeline: Any, captions: list[str]) -> Condition:
    states, mask, generated = pipeline.encode_prompt(captions, torch.device("cpu"), 1, False)
    embeds, real = torch.zeros(len(captions), 3 + TOKENS, 24), torch.zeros(len(captions), 3 + TOKENS)
    embeds[:, :3, :16], embeds[:, 3 : 3 + states.shape[1]] = generated, states
    real[:, :3], real[:, 3 : 3 + states.shape[1]] = 1, mask
    return Condition(embeds, mask=real)


def _audioldm2_predict(pipeline: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return pipeline.unet(
        noisy,
        t,
        encoder_hidden_states=condition.embeds[:, :3, :16],
        encoder_hidden_states_1=condition.embeds[:, 3:],
        encoder_attention_mask_1=condition.mask[:, 3:].long(),
    ).sample


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


_FLUX = {
    "kind": FluxDecoder,
    "shape": (TOKENS, 40),
    "pooled_dim": 32,
    "latents": (4, 8, 8),
    "encode": _flux_encode,
    "predict": _flux_predict,
    "unscale": lambda pipeline, latents: latents / 0.37 + 0.2,
    "settings": {"max_sequence_length": TOKENS},
    "call": {"max_sequence_length": TOKENS},
}
FAMILIES = {
    "sana": Family(
        "SANA",
        SanaDecoder,
        tiny_pipelines.sana,
        (TOKENS, 24),
        None,
        (4, 16, 16),
        _sana_encode,
        _sana_predict,
        lambda pipeline, latents: latents / 0.37,
        settings={"max_sequence_length": TOKENS},
        call={"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": TOKENS},
    ),
    "ltx": Family(
        "LTX-Video",
        LTXDecoder,
        tiny_pipelines.ltx,
        (TOKENS, 32),
        None,
        (6, 3, 4, 8),
        _ltx_encode,
        _ltx_predict,
        lambda pipeline, latents: pipeline._denormalize_latents(
            latents, torch.linspace(-0.3, 0.4, 6), torch.linspace(0.5, 1.5, 6), 1.0
        ),
        settings={"max_sequence_length": TOKENS, "height": 32, "width": 64, "num_frames": 5, "frame_rate": 12},
        call={"height": 32, "width": 64, "num_frames": 5, "frame_rate": 12, "max_sequence_length": TOKENS}
        | {"output_type": "np"},
    ),
    "wan": Family(
        "Wan 2.1",
        WanDecoder,
        tiny_pipelines.wan,
        (TOKENS, 24),
        None,
        (4, 2, 4, 2),
        _wan_encode,
        lambda pipeline, noisy, t, condition: pipeline.transformer(noisy, t, condition.embeds).sample,
        lambda pipeline, latents: latents * _column([0.5, 1.0, 1.5, 2.0]) + _column([-0.3, 0.1, 0.0, 0.4]),
        settings={"max_sequence_length": TOKENS, "height": 32, "width": 16, "num_frames": 5},
        call={"height": 32, "width": 16, "num_frames": 5, "max_sequence_length": TOKENS},
    ),
    "stable-audio": Family(
        "Stable Audio Open",
        StableAudioDecoder,
        tiny_pipelines.stable_audio,
        (TOKENS, 12),
        None,
        (5, 20),
        _stable_audio_encode,
        _stable_audio_predict,
        lambda pipeline, latents: latents,
        settings={"audio_length_in_s": 0.03},
        call={"audio_end_in_s": 0.03},
    ),
    "audioldm2": Family(
        "AudioLDM 2",
        AudioLDM2Decoder,
        tiny_pipelines.audioldm2,
        (3 + TOKENS, 24),
        None,
        (4, 16, 8),
        _audioldm2_encode,
        _audioldm2_predict,
        lambda pipeline, latents: latents / 0.37,
    ),
    "flux-dev": Family("FLUX.1 (guidance-distilled)", make=tiny_pipelines.flux, negative="true_cfg_scale", **_FLUX),
    "flux": Family(
        "FLUX.1 (without embedded guidance)",
        make=lambda: tiny_pipelines.flux(guidance_embeds=False),
        guidance=None,
        negative="true_cfg_scale",
        **_FLUX,
    ),
}
