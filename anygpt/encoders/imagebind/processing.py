"""Processors of ImageBind's inputs, with Pillow and NumPy only. `C` is the number of clips of a sample.

All except the text processor are saved and loaded like feature extractors, and return `media_values`.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import ASTFeatureExtractor, BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from anygpt.encoders.imagebind.configuration import IMAGE_SIZE, MAIN_INPUT, MOTION_CHANNELS, MOTION_LENGTH, TEXT_LENGTH
from anygpt.errors import InputError
from anygpt.media.files import Video

CROPS = 3
MEAN, DEVIATION = -4.268, 9.138  # log-mel energies


class ImageBindProcessor(FeatureExtractionMixin):
    """Base of the processors: converts one medium, of `ndim` dimensions as an array, or a list to one tensor.

    Keyword arguments override `defaults`, and are saved with them; they become attributes.
    """

    model_input_names = (MAIN_INPUT,)
    ndim: int
    convert: Callable[[Any], np.ndarray]
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **settings: Any):
        super().__init__(**(self.defaults | settings))

    def batch(self, items: Any, return_tensors: str) -> BatchFeature:
        several = isinstance(items, (list, tuple)) or getattr(items, "ndim", 0) > self.ndim
        values = np.stack([self.convert(item) for item in (items if several else [items])])
        return BatchFeature({MAIN_INPUT: values}, tensor_type=return_tensors)


class ImageBindImageProcessor(ImageBindProcessor):
    """Resizes the shorter side of images to `size` pixels and crops the centre.

    Three `channels` are normalized with CLIP's mean and deviation; one, for depth and thermal images, keeps its values
    (8-bit ones are scaled to 0 to 1).
    """

    ndim, do_center_crop = 3, True
    defaults: ClassVar = {"size": IMAGE_SIZE, "channels": 3}

    @property
    def crop_size(self) -> dict[str, int]:
        return {"width": self.size, "height": self.size}

    def __call__(self, images: Any, return_tensors: str = "pt") -> BatchFeature:
        """`media_values (B, channels, size, size)` of one image or a list, PIL or arrays `(H, W[, 3])`."""
        return self.batch(images, return_tensors)

    def convert(self, image: Any) -> np.ndarray:
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        if self.channels == 3:
            image = image.convert("RGB")
        elif image.mode != "F":
            image = image.convert("F" if image.mode.startswith("I") else "L")
        resized = resize_shorter(image, self.size, Image.Resampling.BICUBIC)
        left, top = (resized.width - self.size) // 2, (resized.height - self.size) // 2
        pixels = np.asarray(resized.crop((left, top, left + self.size, top + self.size)), np.float32)
        if self.channels == 3:
            return normalize(pixels)
        return (pixels if image.mode == "F" else pixels / 255)[None]


class ImageBindVideoProcessor(ImageBindProcessor):
    """Splits videos into `clips` evenly spaced clips of `seconds`, with `frames` frames each, in three crops of `size`.

    `num_frames` are sampled from a video when it is read; clips use those nearest in time.
    """

    ndim, reads_times = 4, True
    defaults: ClassVar = {"size": IMAGE_SIZE, "clips": 5, "seconds": 2.0, "frames": 2, "num_frames": 40}

    @property
    def reads(self) -> str:
        return f"{self.clips} times {self.seconds:g} s are read of each, {self.frames} frames of these"

    def __call__(self, videos: Any, return_tensors: str = "pt") -> BatchFeature:
        """`media_values (B, 3 · clips, 3, frames, size, size)` of `Video`s or uint8 arrays `(n, H, W, 3)`."""
        return self.batch(videos, return_tensors)

    def convert(self, video: Video | np.ndarray) -> np.ndarray:
        frames = video.frames if isinstance(video, Video) else np.asarray(video)
        if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
            raise InputError(f"a video has shape {frames.shape}; expected (frames, height, width, 3)")
        # without a frame rate, the clips are adjacent
        length = len(frames) / video.fps if isinstance(video, Video) else self.clips * self.seconds
        starts = clip_starts(length, self.seconds, self.clips)
        times = np.linspace(starts, starts + min(self.seconds, length), self.frames, axis=1)
        chosen = np.minimum((times / length * len(frames)).astype(int), len(frames) - 1)
        crops = {index: self.crop(frames[index]) for index in np.unique(chosen)}
        return np.stack([np.stack([crops[i][crop] for i in clip], axis=1) for clip in chosen for crop in range(CROPS)])

    def crop(self, frame: np.ndarray) -> list[np.ndarray]:
        """Crops at both ends and in the middle of the longer side, `(3, size, size)` each."""
        image = resize_shorter(Image.fromarray(frame), self.size, Image.Resampling.BILINEAR)
        offsets = np.linspace((0, 0), (image.width - self.size, image.height - self.size), CROPS)
        boxes = [(*map(int, np.ceil(at)), *map(int, np.ceil(at) + self.size)) for at in offsets]
        return [normalize(np.asarray(image.crop(box), np.float32)) for box in boxes]


class ImageBindAudioProcessor(ImageBindProcessor):
    """Converts sounds to log-mel spectrograms (Kaldi's filter banks) of `clips` evenly spaced clips of `seconds`.

    A spectrogram has `num_mel_bins` mels and `target_length` frames, one every 10 ms, with zeros at the end.
    """

    ndim = 1
    defaults: ClassVar = {"sampling_rate": 16000, "num_mel_bins": 128, "target_length": 204, "clips": 3, "seconds": 2.0}

    @property
    def reads(self) -> str:
        return f"{self.clips} times {self.seconds:g} s are read of each"

    def __call__(self, raw_speech: Any, sampling_rate: int | None = None, return_tensors: str = "pt") -> BatchFeature:
        """`media_values (B, C, 1, num_mel_bins, target_length)` of one mono waveform `(N,)`, in Hz, or a list."""
        if sampling_rate not in (None, self.sampling_rate):
            raise InputError(f"ImageBind reads sounds at {self.sampling_rate} Hz, not {sampling_rate}; resample them")
        return self.batch(raw_speech, return_tensors)

    def convert(self, waveform: Any) -> np.ndarray:
        waveform, rate = np.asarray(waveform, np.float32), self.sampling_rate
        if waveform.ndim != 1:
            raise InputError(f"a waveform is (samples,), but this one is {waveform.shape}")
        banks = filter_banks(self.num_mel_bins, rate, self.target_length)
        length, window = int(self.seconds * rate), int(0.025 * rate)
        clips = []
        for start in clip_starts(len(waveform) / rate, self.seconds, self.clips):
            clip = waveform[int(start * rate) :][:length]
            clip = np.pad(clip - clip.mean() if len(clip) else clip, (0, max(0, window - len(clip))))
            clips.append(banks(clip, sampling_rate=rate, return_tensors="np")["input_values"][0].T[None])
        return np.stack(clips)


class ImageBindMotionProcessor(ImageBindProcessor):
    """Truncates or zero-pads readings of an inertial measurement unit, `(6, N)`, to 2,000 steps."""

    ndim = 2

    def __call__(self, motions: Any, return_tensors: str = "pt") -> BatchFeature:
        """`media_values (B, 6, 2000)` of one reading or a list."""
        return self.batch(motions, return_tensors)

    def convert(self, motion: Any) -> np.ndarray:
        motion = np.asarray(motion, np.float32)
        if motion.ndim != 2 or len(motion) != MOTION_CHANNELS:
            raise InputError(f"readings have shape {motion.shape}; expected ({MOTION_CHANNELS}, steps)")
        motion = motion[:, :MOTION_LENGTH]
        return np.pad(motion, ((0, 0), (0, MOTION_LENGTH - motion.shape[1])))


class ImageBindTextProcessor:
    """Tokenizes texts to ids `(B, 77)` with a CLIP tokenizer, padded with 0; truncation keeps the end-of-text token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        rows = self.tokenizer([texts] if isinstance(texts, str) else texts, truncation=True, max_length=TEXT_LENGTH)
        padded = [[*row, *[0] * (TEXT_LENGTH - len(row))] for row in rows["input_ids"]]
        return torch.tensor(padded, dtype=torch.long)


PROCESSORS: dict[str, Callable[[], ImageBindProcessor]] = {
    "image": ImageBindImageProcessor,
    "video": ImageBindVideoProcessor,
    "audio": ImageBindAudioProcessor,
    "depth": lambda: ImageBindImageProcessor(channels=1),
    "thermal": lambda: ImageBindImageProcessor(channels=1),
    "imu": ImageBindMotionProcessor,
}


def processor_for(modality: str) -> ImageBindProcessor:
    """Processor of a media type (`image`, `video`, `audio`, `depth`, `thermal`, `imu`)."""
    if modality not in PROCESSORS:
        raise InputError(f"ImageBind reads no {modality!r}; it reads {', '.join(PROCESSORS)}")
    return PROCESSORS[modality]()


@functools.cache
def filter_banks(num_mel_bins: int, sampling_rate: int, length: int) -> ASTFeatureExtractor:
    """Kaldi's filter banks, without the library's warning that the lowest of 128 mels are narrower than an FFT bin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        std = DEVIATION / 2  # the library divides by 2 · std
        return ASTFeatureExtractor(1, sampling_rate, num_mel_bins, length, mean=MEAN, std=std)


def clip_starts(length: float, seconds: float, count: int) -> np.ndarray:
    """Start times of clips: the first at 0, the last ending with the medium; all at 0 if the medium is shorter."""
    return np.linspace(0, max(0.0, length - seconds), count)


def resize_shorter(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    shorter = min(image.size)
    return image.resize(tuple(max(size, int(size * side / shorter)) for side in image.size), resampling)


def normalize(pixels: np.ndarray) -> np.ndarray:
    """Normalize `(H, W, 3)` values of 0 to 255 to `(3, H, W)` with CLIP's mean and deviation."""
    return ((pixels / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD).transpose(2, 0, 1).astype(np.float32)
