"""ImageBind's networks. Shapes: `B` samples, `C` clips of each, `n` tokens, `F` width of a tower, `D` of embeddings."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from anygpt.encoders.imagebind.configuration import (
    MAIN_INPUT,
    MEDIA,
    MOTION_CHANNELS,
    TEXT_LENGTH,
    VOCABULARY,
    ImageBindConfig,
)
from anygpt.errors import InputError, refusing, warn_once

LICENCE = "ImageBind's published weights are under CC BY-NC-SA 4.0: they are for non-commercial use only"
CARD = f"""---
license: cc-by-nc-sa-4.0
library_name: anygpt
---
# ImageBind

The weights of ImageBind (arXiv 2305.05665), with their original tensor names, for anygpt's `ImageBindModel`.
{LICENCE}.
"""
STEMS = {"vision": "rgbt_stem", "audio": "rgbt_stem", "depth": "depth_stem", "thermal": "rgbt_stem", "imu": "imu_stem"}
WITH_BIAS_KV = ("audio", "depth", "thermal", "imu")
SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
"""Factors of the unit embeddings; only that of text is learned, starting from this value and limited to 100."""
MAX_SCALE = 100.0
MASK = "modality_preprocessors.text.mask"  # the original's stored causal mask, which is computed when needed here
EPS = 1e-6


class Stem(nn.Module):
    """Patches of a clip: `(B, channels, …)` to `(B, n, F)`."""

    def __init__(self, config: ImageBindConfig, tower: str):
        super().__init__()
        width = config.of(tower, "embed_dim")
        self.steps = config.imu_kernel_size if tower == "imu" else None
        self.norm_layer = nn.Identity() if tower == "vision" else nn.LayerNorm(width)
        if tower == "vision":
            kernel = tuple(config.kernel_size)
            # as in the original, whose stem is a Sequential with a first entry without weights
            self.proj = nn.Sequential(nn.Identity(), nn.Conv3d(3, width, kernel, kernel, bias=False))
        elif tower == "imu":
            self.proj = nn.Linear(MOTION_CHANNELS * self.steps, width, bias=False)
        else:
            kernel = config.of(tower, "kernel_size")
            stride = config.audio_stride if tower == "audio" else kernel
            self.proj = nn.Conv2d(1, width, kernel, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.steps:
            tokens = self.proj(inputs.unfold(-1, self.steps, self.steps).transpose(1, 2).flatten(2))
        else:
            tokens = self.proj(inputs).flatten(2).transpose(1, 2)
        return self.norm_layer(tokens)


class Tokens(nn.Module):
    """Input of the trunk for a clip: class token, patches, positions."""

    def __init__(self, config: ImageBindConfig, tower: str):
        super().__init__()
        width, self.stem_name = config.of(tower, "embed_dim"), STEMS.get(tower)
        if self.stem_name:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.add_module(self.stem_name, Stem(config, tower))
        else:
            self.token_embedding = nn.Embedding(VOCABULARY, width)
        positions = nn.Parameter(torch.zeros(1, config.num_tokens(tower), width))
        if tower in ("text", "imu"):
            self.pos_embed = positions
        else:  # the original's name has a module between
            self.pos_embedding_helper = nn.ParameterDict({"pos_embed": positions})

    def forward(self, inputs: Tensor) -> Tensor:
        """Single clips `(B, …)` to `(B, n, F)`."""
        if self.stem_name:
            tokens = getattr(self, self.stem_name)(inputs)
            tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        else:
            tokens = self.token_embedding(inputs)
        positions = self.pos_embed if hasattr(self, "pos_embed") else self.pos_embedding_helper["pos_embed"]
        if tokens.shape[1] != positions.shape[1]:
            raise InputError(
                f"ImageBind's positions are for {positions.shape[1]} tokens, but inputs of shape "
                f"{tuple(inputs.shape[1:])} give {tokens.shape[1]}; use its own processors"
            )
        return tokens + positions


class Block(nn.Module):
    """Pre-norm attention and MLP × 4 with exact GELU."""

    def __init__(self, width: int, heads: int, bias_kv: bool):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=EPS)
        self.attn = nn.MultiheadAttention(width, heads, add_bias_kv=bias_kv, batch_first=True)
        self.norm_2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm_1(states)
        states = states + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return states + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm_2(states))))


class Trunk(nn.Module):
    """Blocks of a tower, for vision after a LayerNorm."""

    def __init__(self, config: ImageBindConfig, tower: str):
        super().__init__()
        width = config.of(tower, "embed_dim")
        if tower == "vision":
            self.pre_transformer_layer = nn.Sequential(nn.LayerNorm(width, eps=EPS))
        heads, bias_kv = config.of(tower, "num_heads"), tower in WITH_BIAS_KV
        self.blocks = nn.ModuleList(Block(width, heads, bias_kv) for _ in range(config.of(tower, "num_blocks")))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, n, F)` to `(B, n, F)`; `mask (n, n)` is true where attention is blocked."""
        if hasattr(self, "pre_transformer_layer"):
            states = self.pre_transformer_layer(states)
        for block in self.blocks:
            states = block(states, mask)
        return states


def _head(config: ImageBindConfig, tower: str) -> nn.Module:
    """LayerNorm and Linear at the original's indices, whose other entries have no weights."""
    width = config.of(tower, "embed_dim")
    norm, linear = nn.LayerNorm(width, eps=EPS), nn.Linear(width, config.out_embed_dim, bias=False)
    if tower == "text":
        return nn.ModuleDict({"proj": nn.Sequential(norm, linear)})
    between = 2 if tower == "imu" else 1
    return nn.Sequential(norm, *(nn.Identity() for _ in range(between)), linear)


class Scale(nn.Module):
    """Factor of embeddings, stored as its logarithm; constant ones are applied directly: 16 bits are 0.4% off."""

    def __init__(self, tower: str):
        super().__init__()
        logarithm = float(np.float32(math.log(SCALES[tower])))
        self.fixed = None if tower == "text" else math.exp(logarithm)
        start = torch.tensor(logarithm)
        if self.fixed is None:
            self.log_logit_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_logit_scale", start)

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings * (self.fixed or self.log_logit_scale.exp().clamp(max=MAX_SCALE))


class ImageBindModel(PreTrainedModel):
    """Joint encoder of images and clips, text, sounds, depth, thermal images and motion (arXiv 2305.05665).

    Inputs of each modality, as returned by its processor:

    ============  ==========================================================================================
    `vision`      images `(B, 3, 224, 224)`, clips of a video `(B, C, 3, 2, 224, 224)`; `image` and `video` mean it too
    `text`        CLIP's token ids `(B, 77)`, padded with 0
    `audio`       spectrograms `(B, 1, 128, 204)`, or `(B, C, 1, 128, 204)` of `C` clips
    `depth`       `(B, 1, 224, 224)`
    `thermal`     `(B, 1, 224, 224)`
    `imu`         `(B, 6, 2000)`
    ============  ==========================================================================================

    With five dimensions or more, the second counts the clips of a sample.
    """

    config_class = ImageBindConfig
    main_input_name = MAIN_INPUT

    def __init__(self, config: ImageBindConfig):
        super().__init__(config)
        towers = config.modalities
        self.modality_preprocessors = nn.ModuleDict({tower: Tokens(config, tower) for tower in towers})
        self.modality_trunks = nn.ModuleDict({tower: Trunk(config, tower) for tower in towers})
        self.modality_heads = nn.ModuleDict({tower: _head(config, tower) for tower in towers})
        self.modality_postprocessors = nn.ModuleDict(
            {tower: nn.Sequential(nn.Identity(), Scale(tower)) for tower in towers if tower in SCALES}
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize class tokens and positions as in ViT; other modules keep their constructors' initialization."""
        if isinstance(module, Tokens):
            for name, parameter in module.named_parameters():
                if name.endswith(("cls_token", "pos_embed")):
                    nn.init.normal_(parameter, std=0.02)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "ImageBindModel":
        warn_once(LICENCE)
        return super().from_pretrained(*args, **kwargs)

    def load_original_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the original's tensors, except the text mask; an `InputError` names those that do not fit."""
        warn_once(LICENCE)
        given = {name: tensor for name, tensor in tensors.items() if name != MASK}
        for tower in WITH_BIAS_KV:
            name = f"modality_postprocessors.{tower}.1.log_logit_scale"
            scale = given[name].item() if name in given else math.log(SCALES[tower])
            if abs(scale - math.log(SCALES[tower])) > 0.02:
                raise InputError(f"{name} is {scale:.4f}; this ImageBind multiplies by {SCALES[tower]:g}")
        with refusing("these are not the tensors of this ImageBind", (RuntimeError,), "; give its config"):
            self.load_state_dict(given, assign=self.device.type == "meta")

    def tower_of(self, modality: str) -> str:
        tower = MEDIA.get(modality, modality)
        if tower not in self.config.modalities:
            known = ", ".join(self.config.modalities)
            raise InputError(f"this ImageBind has no tower for {modality!r}; it has {known}")
        return tower

    def encode(self, modality: str, inputs: Tensor) -> tuple[Tensor, int]:
        """Last states of the trunk `(B · C, n, F)`, and `C`."""
        tower, clips = self.tower_of(modality), 1
        if inputs.ndim >= 5:
            clips, inputs = inputs.shape[1], inputs.flatten(0, 1)
        if tower == "vision" and inputs.ndim == 4:
            inputs = inputs.unsqueeze(2).expand(-1, -1, self.config.video_frames, -1, -1)
        mask = None
        if tower == "text":
            mask = torch.ones(TEXT_LENGTH, TEXT_LENGTH, dtype=torch.bool, device=inputs.device).triu(1)
        else:
            inputs = inputs.to(self.dtype)
        return self.modality_trunks[tower](self.modality_preprocessors[tower](inputs), mask), clips

    def embed_clips(self, modality: str, inputs: Tensor) -> Tensor:
        """Unscaled unit embeddings of each clip, `(B, C, D)`."""
        tower = self.tower_of(modality)
        states, clips = self.encode(modality, inputs)
        if tower == "text":  # the end-of-text token has the largest id
            ends = inputs.flatten(0, inputs.ndim - 2).argmax(dim=-1)
            pooled = self.modality_heads[tower]["proj"](states[torch.arange(len(states)), ends])
        else:
            pooled = self.modality_heads[tower](states[:, 0])
        return F.normalize(pooled, dim=-1).unflatten(0, (-1, clips))

    def embed(self, modality: str, inputs: Tensor) -> Tensor:
        """Embeddings `(B, D)` of one modality, scaled as in the original and averaged over clips."""
        embeddings, tower = self.embed_clips(modality, inputs), self.tower_of(modality)
        if tower in self.modality_postprocessors:
            embeddings = self.modality_postprocessors[tower](embeddings)
        return embeddings.mean(dim=1)


class ImageBindEncoder(ImageBindModel):
    """One tower as a media encoder: returns a unit embedding per clip, or the trunk's tokens (`config.feature`)."""

    def __init__(self, config: ImageBindConfig):
        if len(config.modalities) != 1:
            raise InputError(
                f"an encoder has one tower, but this config names {', '.join(config.modalities)}; name one with "
                "modalities=['vision'], or use ImageBindModel"
            )
        super().__init__(config)
        # remove unused modules, so that they do not train
        self.modality_postprocessors = nn.ModuleDict()
        if config.feature == "tokens":
            self.modality_heads = nn.ModuleDict()

    def forward(self, media_values: Tensor) -> BaseModelOutput:
        """Encode inputs of `ImageBindModel` to `(B, C · n, F)`; for embeddings, `n` is 1 and `F` is `D`."""
        tower = self.config.tower
        if self.config.feature == "embedding":
            return BaseModelOutput(last_hidden_state=self.embed_clips(tower, media_values))
        states, clips = self.encode(tower, media_values)
        return BaseModelOutput(last_hidden_state=states.unflatten(0, (-1, clips)).flatten(1, 2))
