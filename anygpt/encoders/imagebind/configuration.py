"""`ImageBindConfig`, and the number of features of each modality."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from anygpt.errors import InputError

TOWERS = ("vision", "text", "audio", "depth", "thermal", "imu")
MEDIA = {"image": "vision", "video": "vision"}  # media types whose tower has a different name
MAIN_INPUT = "media_values"
IMAGE_SIZE = 224
TEXT_LENGTH = 77
VOCABULARY = 49408
MOTION_CHANNELS, MOTION_LENGTH = 6, 2000


class ImageBindConfig(PreTrainedConfig):
    """Sizes of ImageBind by the original's names; the defaults are those of the published "huge" model.

    Each tower has a width (`vision_embed_dim`), blocks and heads. The other arguments of the original, its drop path
    rates, have no effect. `modalities` are the model's towers, and `feature` is the output of an `ImageBindEncoder` for
    each clip: its `embedding`, or the trunk's `tokens`.
    """

    model_type = "imagebind"

    video_frames: int = 2
    kernel_size: Sequence[int] = (2, 14, 14)
    audio_kernel_size: int = 16
    audio_stride: int = 10
    out_embed_dim: int = 1024
    vision_embed_dim: int = 1280
    vision_num_blocks: int = 32
    vision_num_heads: int = 16
    text_embed_dim: int = 1024
    text_num_blocks: int = 24
    text_num_heads: int = 16
    audio_embed_dim: int = 768
    audio_num_blocks: int = 12
    audio_num_heads: int = 12
    audio_num_mel_bins: int = 128
    audio_target_len: int = 204
    depth_embed_dim: int = 384
    depth_kernel_size: int = 16
    depth_num_blocks: int = 12
    depth_num_heads: int = 8
    thermal_embed_dim: int = 768
    thermal_kernel_size: int = 16
    thermal_num_blocks: int = 12
    thermal_num_heads: int = 12
    imu_embed_dim: int = 512
    imu_kernel_size: int = 8
    imu_num_blocks: int = 6
    imu_num_heads: int = 8
    modalities: Sequence[str] = TOWERS
    feature: str = "embedding"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.kernel_size, self.modalities = list(self.kernel_size), list(self.modalities)
        unknown = sorted(set(self.modalities) - set(TOWERS))
        if unknown or not self.modalities:
            raise InputError(f"ImageBind has no tower for {unknown or 'nothing'}; it has {', '.join(TOWERS)}")
        if self.feature not in ("embedding", "tokens"):
            raise InputError(f"ImageBind's feature is {self.feature!r}; expected embedding or tokens")
        for tower in self.modalities:
            width, heads = self.of(tower, "embed_dim"), self.of(tower, "num_heads")
            if width % heads:
                raise InputError(f"{tower}_embed_dim is {width}, which {tower}_num_heads = {heads} does not divide")

    def of(self, tower: str, name: str) -> Any:
        return getattr(self, f"{tower}_{name}")

    def num_tokens(self, tower: str) -> int:
        """Number of tokens of a clip in the trunk: a class token, which text does not have, and patches."""
        if tower == "text":
            return TEXT_LENGTH
        if tower == "imu":
            return 1 + MOTION_LENGTH // self.imu_kernel_size
        if tower == "vision":
            sizes = (self.video_frames, IMAGE_SIZE, IMAGE_SIZE)
            return 1 + math.prod(size // kernel for size, kernel in zip(sizes, self.kernel_size, strict=True))
        if tower == "audio":
            spectrogram = (self.audio_num_mel_bins, self.audio_target_len)
            return 1 + math.prod((size - self.audio_kernel_size) // self.audio_stride + 1 for size in spectrogram)
        return 1 + (IMAGE_SIZE // self.of(tower, "kernel_size")) ** 2

    def encoder_of(self, modality: str, feature: str | None = None) -> "ImageBindConfig":
        tower = MEDIA.get(modality, modality)
        if tower not in self.modalities or tower == "text":
            known = ", ".join((*MEDIA, *(t for t in self.modalities if t not in ("vision", "text"))))
            raise InputError(f"ImageBind has no encoder of {modality!r}; it has those of {known}")
        return type(self)(**self.to_dict() | {"modalities": [tower], "feature": feature or self.feature})

    def left_out(self) -> dict[str, None]:
        """Name prefixes of tensors in a file that an encoder does not use, such as those of other towers."""
        names = {"modality_postprocessors.": None} | ({} if self.feature == "embedding" else {"modality_heads.": None})
        parts = ("preprocessors", "trunks", "heads")
        return names | {f"modality_{p}.{t}.": None for p in parts for t in TOWERS if t != self.tower}

    @property
    def tower(self) -> str:
        """The only tower of an encoder's config."""
        return self.modalities[0]

    @property
    def hidden_size(self) -> int:
        return self.out_embed_dim if self.feature == "embedding" else self.of(self.tower, "embed_dim")

    @property
    def features_per_clip(self) -> int:
        return 1 if self.feature == "embedding" else self.num_tokens(self.tower)


def count_features(config: ImageBindConfig, inputs: Mapping[str, Any]) -> list[int]:
    """Number of features of each input: those of a clip, times its clips."""
    clips = [item.shape[0] if item.ndim >= 4 else 1 for item in inputs[MAIN_INPUT]]
    return [count * config.features_per_clip for count in clips]


# Lets folders and saved processors be read back by model_type.
AutoConfig.register(ImageBindConfig.model_type, ImageBindConfig)
