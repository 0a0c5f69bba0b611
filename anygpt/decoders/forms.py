"""Decoders by the form of what they generate: images, videos, sounds. Sizes default to those of the network."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.conditions import Condition
from anygpt.decoders.options import Rule, check_rate, is_integer, is_number
from anygpt.decoders.targets import ImageTargets, TargetProcessor, VideoTargets
from anygpt.errors import InputError

STRENGTH: Rule = (lambda value: is_number(value) and 0 < value <= 1, "a number above 0, up to 1")


class ImageDecoder(DiffusionDecoder):
    """Conditions -> PIL images of `height` × `width` pixels, which are also the targets' size.

    A pipeline's safety checker, if any, blackens images that it flags. With `strength`, from 0 to 1, sampling starts
    from a reference under that share of the noise (SDEdit, arXiv 2108.01073), in the family's image-to-image pipeline.
    """

    modality = "image"
    size_names: ClassVar[tuple[str, ...]] = ("height", "width")
    pixel_multiple: ClassVar[int] = 8
    """Height and width in pixels must be multiples of this, as the pipeline requires."""

    def __init__(
        self, pipeline: DiffusionPipeline, *, height: int | None = None, width: int | None = None, **settings: Any
    ):
        super().__init__(pipeline, **settings)
        native_height, native_width = self.native_size
        self.height = native_height if height is None else height
        self.width = native_width if width is None else width
        self.check_options({"height": self.height, "width": self.width})

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, pixels: the network's `sample_size` times the VAE's factor."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this: `pixel_multiple`, and the pixels of a patch."""
        names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
        factor = next((getattr(self.pipeline, name) for name in names if hasattr(self.pipeline, name)), 1)
        return math.lcm(self.pixel_multiple, factor * self.patch[-1])

    @property
    def targets(self) -> TargetProcessor:
        return ImageTargets(self.height, self.width, self.vae.config.in_channels, self.takes_reference)

    @property
    def option_rules(self) -> dict[str, Rule]:
        """Also the sizes, and `strength` if diffusers has an image-to-image pipeline of this family."""
        part = self.size_multiple
        side = (lambda value: is_integer(value) and value > 0 and value % part == 0, f"a multiple of {part}")
        starts = hasattr(diffusers, self.pipeline_name.replace("Pipeline", "Img2ImgPipeline"))
        return super().option_rules | {"height": side, "width": side} | ({"strength": STRENGTH} if starts else {})

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Also refuses a `strength` so small that no step is left."""
        super().check_options(options)
        steps = options.get("num_inference_steps") or self.call_default("num_inference_steps")
        if (strength := options.get("strength")) is not None and int(steps * strength) < 1:
            raise InputError(f"strength {strength} of {steps} steps is less than one step: raise one of them")

    def call_pipeline(self, **arguments: Any) -> Any:
        """Call the pipeline; with a reference, its image-to-image variant at this `strength`, unused without one."""
        strength, reference = (arguments.pop(name, None) for name in ("strength", "reference"))
        if reference is None:
            return super().call_pipeline(**arguments)
        pipeline = diffusers.AutoPipelineForImage2Image.from_pipe(self.pipeline)
        pipeline.set_progress_bar_config(disable=True)
        image, taken = self.reference_pixels(reference, **arguments), inspect.signature(pipeline.__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in taken or name not in self.size_names}
        return pipeline(image=image, strength=strength, **arguments)

    def reference_pixels(self, reference: Sequence[Any], height: int, width: int, **_: Any) -> Tensor:
        """References as pipelines take them: `(B, channels, height, width)` in [0, 1]."""
        return ImageTargets(height, width, self.vae.config.in_channels)(list(reference)) / 2 + 0.5

    def collect(self, output: Any) -> list:
        """PIL images: the pipeline's RGB, or 16-bit grey converted from one channel of floats in [0, 1]."""
        if isinstance(output.images, list):
            return output.images
        return [Image.fromarray((image[..., 0] * 65535).round().astype(np.uint16)) for image in output.images]

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        one = {"output_type": "np"} if self.vae.config.get("out_channels") == 1 else {}
        return super().prompt_arguments(condition, negative) | one


class VideoDecoder(ImageDecoder):
    """Conditions -> uint8 videos `(F, H, W, 3)`; latents `(B, C, F, h, w)`.

    `num_frames` and `frame_rate` (frames/s, for writing and timing clips; some models also use it) default to the
    pipeline's own, or to 8 frames/s.
    """

    modality = "video"
    native_rate: ClassVar[float] = 8
    frame_multiple: ClassVar[int] = 1
    """Frames per latent frame after the first, which stands for one."""
    size_names: ClassVar[tuple[str, ...]] = ("height", "width", "num_frames")

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        **settings: Any,
    ):
        super().__init__(pipeline, **settings)
        self.num_frames = self.call_default("num_frames") if num_frames is None else num_frames
        self.check_options({"num_frames": self.num_frames})
        own_rate = self.call_default("frame_rate") or self.native_rate
        self.frame_rate = own_rate if frame_rate is None else check_rate(frame_rate)

    @property
    def native_size(self) -> tuple[int, int]:
        """The pipeline's own defaults, if it has any."""
        height, width = self.call_default("height"), self.call_default("width")
        return super().native_size if height is None else (height, width)

    @property
    def option_rules(self) -> dict[str, Rule]:
        """Also the number of frames, which must be whole latent frames."""
        part = self.frame_multiple
        expected = "a whole number from 1" if part == 1 else f"a multiple of {part}, and one more"
        frames = (lambda value: is_integer(value) and value > 0 and (value - 1) % part == 0, expected)
        return super().option_rules | {"num_frames": frames}

    @property
    def rate(self) -> float:
        return self.frame_rate

    @property
    def targets(self) -> VideoTargets:
        return VideoTargets(self.height, self.width, self.num_frames)

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        return super().prompt_arguments(condition, negative) | {"output_type": "np"}

    def collect(self, output: Any) -> list[np.ndarray]:
        """uint8 videos `(F, H, W, 3)`, from the pipeline's floats in [0, 1]."""
        return [(frames * 255).round().astype(np.uint8) for frames in output.frames]


class AudioDecoder(DiffusionDecoder):
    """Conditions -> float32 waveforms of `audio_length_in_s`, by default the length of the network's `sample_size`."""

    modality = "audio"
    size_names: ClassVar[tuple[str, ...]] = ("audio_length_in_s",)

    def __init__(self, pipeline: DiffusionPipeline, *, audio_length_in_s: float | None = None, **settings: Any):
        super().__init__(pipeline, **settings)
        whole = self.denoiser.config.sample_size * self.seconds_per_latent
        self.audio_length_in_s = whole if audio_length_in_s is None else audio_length_in_s
        self.check_options({"audio_length_in_s": self.audio_length_in_s})

    @property
    @abstractmethod
    def sampling_rate(self) -> int:
        """Hz."""

    @property
    @abstractmethod
    def seconds_per_latent(self) -> float:
        """Seconds of sound per position of the latents, which is the shortest sound."""

    @property
    def rate(self) -> float:
        return self.sampling_rate

    @property
    def option_rules(self) -> dict[str, Rule]:
        """Also the length in seconds, which gives at least one latent."""
        least = self.seconds_per_latent
        length = (lambda value: is_number(value) and value >= least, f"a number of seconds from {least:.4g}")
        return super().option_rules | {"audio_length_in_s": length}

    def collect(self, output: Any) -> list[np.ndarray]:
        """float32 waveforms, cut by the pipeline to the requested length."""
        return list(output.audios)
