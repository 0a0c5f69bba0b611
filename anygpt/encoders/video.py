"""Video encoding with any image encoder, frame by frame, with temporal positions added."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from anygpt.encoders.families import FAMILIES, UNKNOWN
from anygpt.encoders.projector import hidden_size_of
from anygpt.errors import InputError


class VideoEncoderConfig(PreTrainedConfig):
    """Config of a `VideoEncoder`: the image encoder's config or its dict, and arguments of `VideoEncoder`."""

    model_type = "anygpt_video_encoder"

    image_encoder: Any = None
    num_frames: int = 8
    pool_frames: bool = True
    feature_layer: int | None = None
    drop_cls: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.image_encoder, dict):
            self.image_encoder = AutoConfig.for_model(**self.image_encoder)

    @property
    def hidden_size(self) -> int:
        family = FAMILIES.get(self.image_encoder.model_type, UNKNOWN)
        return (family.feature_size or hidden_size_of)(self.image_encoder)


class VideoEncoder(PreTrainedModel):
    """Runs an image encoder, whose output or what its family selects is `(items, n, features)`, on frames of a clip.

    A frame becomes one feature, the mean of its tokens, or with `pool_frames=False` all of its n tokens, which keep
    spatial detail. The temporal position is the sinusoid of "Attention Is All You Need" (arXiv 1706.03762, §3.5) at the
    frame's index; without it the projector could not tell the frames apart. `feature_layer` is the index of the hidden
    states to read instead of the output, and `drop_cls` drops each frame's class token.
    """

    settings = ("num_frames", "pool_frames", "feature_layer", "drop_cls")
    config_class = VideoEncoderConfig
    main_input_name = "pixel_values_videos"
    base_model_prefix = "image_encoder"

    def __init__(self, image_encoder: PreTrainedModel, num_frames: int = 8, **settings: Any):
        family = FAMILIES.get(image_encoder.config.model_type)
        if family is None:
            raise InputError(f"{image_encoder.config.model_type!r} is no supported encoder family")
        if not isinstance(settings.get("feature_layer", 0), int | None):
            raise InputError(
                f"feature_layer is {settings['feature_layer']!r}; frames are read at one layer, an integer"
            )
        if family.layout != "fixed" or family.main_input != "pixel_values":
            raise InputError(
                f"{image_encoder.config.model_type!r} cannot run frame by frame: it takes no images of one size; use "
                "an image encoder whose inputs all have the same number of features (CLIP, SigLIP, DINOv2, …)"
            )
        super().__init__(VideoEncoderConfig(image_encoder=image_encoder.config, num_frames=num_frames, **settings))
        self.image_encoder = image_encoder
        self.name_or_path = image_encoder.name_or_path
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: only the image encoder, already initialized, has weights."""

    def forward(self, pixel_values_videos: Tensor) -> BaseModelOutput:
        """Encode `(B, frames, 3, height, width)` pixels to `(B, frames, features)` or `(B, frames · n, features)`."""
        clips, frames = pixel_values_videos.shape[:2]
        layer = self.config.feature_layer
        options = {} if layer is None else {"output_hidden_states": True}
        output = self.image_encoder(pixel_values_videos.flatten(0, 1), **options)
        states = output[0] if layer is None else output.hidden_states[layer]
        if layer is None and (select := FAMILIES.get(self.image_encoder.config.model_type, UNKNOWN).select):
            states = select(self.image_encoder.config, output)
        states = states[:, 1:] if self.config.drop_cls else states
        if self.config.pool_frames:
            states = states.mean(dim=1, keepdim=True)
        states = states.unflatten(0, (clips, frames))
        states = states + _sinusoid(frames, states.shape[-1]).to(states)[:, None]
        return BaseModelOutput(last_hidden_state=states.flatten(1, 2))


# Lets a saved processor read the config back by its model_type.
AutoConfig.register(VideoEncoderConfig.model_type, VideoEncoderConfig)


class VideoFrameProcessor:
    """Applies an image processor, or one of clips like VideoMAE's, to `num_frames` evenly spaced frames."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, image_processor: Any, num_frames: int = 8):
        self.image_processor = image_processor
        self.num_frames = num_frames

    @property
    def reads(self) -> str:
        return f"{self.num_frames} frames are read of each"

    @property
    def valid_kwargs(self) -> Any:
        return getattr(self.image_processor, "valid_kwargs", None)

    def __call__(
        self, videos: list[np.ndarray] | np.ndarray, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """`pixel_values_videos (B, n, 3, h, w)` of one or a list of videos, uint8 `(frames, height, width, 3)`."""
        videos = [videos] if isinstance(videos, np.ndarray) and videos.ndim == 4 else videos
        clips = []
        for video in videos:
            if video.ndim != 4 or video.shape[-1] != 3 or not len(video):
                raise InputError(f"a video has shape {video.shape}; expected (frames, height, width, 3)")
            frames = video[np.linspace(0, len(video) - 1, self.num_frames).round().astype(int)]
            pixels = self.image_processor(images=list(frames), return_tensors="pt", **kwargs)["pixel_values"]
            clips.append(pixels.flatten(0, -4))  # (1, frames, …) from a processor of clips
        return BatchFeature({"pixel_values_videos": torch.stack(clips)}, tensor_type=return_tensors)


def _sinusoid(length: int, size: int) -> Tensor:
    position = torch.arange(length)[:, None]
    frequency = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    table = torch.zeros(length, size)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: size // 2])
    return table
