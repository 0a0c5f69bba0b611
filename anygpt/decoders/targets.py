"""Conversion of raw media to inputs of a decoder's VAE, without weights, so that data workers can do it.

Shapes: `B` batch, `F` frames, `H` height, `W` width (pixels), `N` waveform samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from anygpt.errors import InputError, refusing
from anygpt.media.audio import resample, to_mono
from anygpt.media.files import to_mode

LOG_FLOOR = 1e-5
"""Mel magnitudes are clipped to this before the logarithm (HiFi-GAN's dynamic range compression)."""
PEAK = 0.5
"""Peak of a normalised waveform, as in AudioLDM's loader."""


class TargetProcessor(ABC):
    """A converter of raw media to a float32 batch; subclasses are frozen dataclasses of JSON-able settings."""

    modality: ClassVar[str]
    editable: ClassVar[bool] = False
    """Whether generation passes on the conversation's last medium of this type, to edit it or start from it."""
    reference: bool = False
    """Whether the decoder trains with references, media that it edits."""

    def __call__(self, media: list) -> Tensor:
        """Convert `B` media to `(B, …)` float32.

        Raises:
            InputError: no media, or one of the wrong kind or shape; names its row.
        """
        if not isinstance(media, (list, tuple)) or not media:
            raise InputError(f"{type(self).__name__} needs a list of at least one {self.modality}, not {media!r:.80}")
        return torch.stack([torch.from_numpy(self.one(item, row)) for row, item in enumerate(media)])

    def or_zeros(self, media: list) -> Tensor:
        """Convert `B` media, of which some but not all may be None: they become zeros, which no 8-bit picture is."""
        given = torch.tensor([medium is not None for medium in media])
        made = self([medium for medium in media if medium is not None])
        return made.new_zeros(len(media), *made.shape[1:]).index_copy(0, given.nonzero()[:, 0], made)

    @abstractmethod
    def one(self, item: Any, row: int) -> np.ndarray:
        """Convert one medium to a float32 array; `row` is used in messages."""

    @property
    @abstractmethod
    def note(self) -> str:
        """A description of the portion of a target that is used."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON-able dict for `target_processor_from_dict`."""
        return {"type": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]  # subclasses are data classes


def target_processor_from_dict(config: dict[str, Any]) -> TargetProcessor:
    """The inverse of `to_dict`; an `InputError` for an unknown type or setting."""
    kinds = {kind.__name__: kind for kind in TargetProcessor.__subclasses__()}
    with refusing(f"cannot make targets of {config}; the types are {', '.join(kinds)}", (KeyError, TypeError)):
        return kinds[config["type"]](**{name: value for name, value in config.items() if name != "type"})


@dataclass(frozen=True)
class ImageTargets(TargetProcessor):
    """PIL images of any mode and size -> `(B, channels, H, W)` in [-1, 1].

    Images are converted to 8-bit RGB or, for one channel, 16-bit grey, scaled (Lanczos) to cover `height` × `width`,
    and centre-cropped; the value range is that of diffusers' `VaeImageProcessor`.
    """

    modality: ClassVar[str] = "image"
    editable: ClassVar[bool] = True
    height: int
    width: int
    channels: int = 3
    reference: bool = False

    @property
    def note(self) -> str:
        return f"{self.width} × {self.height} pixels from the centre of each target"

    def one(self, item: Image.Image, row: int) -> np.ndarray:
        if not isinstance(item, Image.Image):
            raise InputError(f"image {row} is a {type(item).__name__}, expected a PIL image")
        try:
            item = to_mode(item, "I;16" if self.channels == 1 else "RGB")
        except ValueError as error:
            raise InputError(f"image {row} cannot be used: {error}") from error
        if self.channels == 1:
            item = Image.fromarray(np.asarray(item, dtype=np.float32) / 257)  # to the 8-bit range: 65535 -> 255
        return _pixels(item, self.height, self.width)


@dataclass(frozen=True)
class VideoTargets(TargetProcessor):
    """uint8 arrays `(F, H, W, 3)` of any length and size -> `(B, 3, num_frames, H, W)` in [-1, 1].

    Frames are sampled evenly from first to last, repeated if there are too few, and scaled and cropped as in
    `ImageTargets`.
    """

    modality: ClassVar[str] = "video"
    height: int
    width: int
    num_frames: int

    @property
    def note(self) -> str:
        return f"{self.num_frames} frames, {self.width} × {self.height} pixels from the centre of each target"

    def one(self, item: np.ndarray, row: int) -> np.ndarray:
        shape: tuple[int, ...] = getattr(item, "shape", ())
        dtype = getattr(item, "dtype", type(item).__name__)
        if len(shape) != 4 or shape[0] == 0 or shape[-1] != 3 or dtype != np.uint8:
            raise InputError(
                f"video {row} is {dtype} {tuple(shape)}, expected a uint8 array (frames, height, width, 3)"
            )
        chosen = np.linspace(0, len(item) - 1, self.num_frames).round().astype(int)
        frames = [_pixels(Image.fromarray(frame), self.height, self.width) for frame in item[chosen]]
        return np.stack(frames, axis=1)


def _checked_waveform(item: Any, row: int) -> tuple[np.ndarray, int]:
    """The item, if it is a pair of finite floating-point samples and a rate."""
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], np.ndarray):
        raise InputError(f"audio {row} is a {type(item).__name__}, expected a (waveform array, sampling rate) pair")
    waveform, rate = item
    if waveform.size == 0 or not np.issubdtype(waveform.dtype, np.floating) or not np.isfinite(waveform).all():
        raise InputError(
            f"audio {row} is {waveform.dtype} {waveform.shape}, expected finite floating-point samples in [-1, 1]"
        )
    return waveform, rate


@dataclass(frozen=True)
class AudioTargets(TargetProcessor):
    """Pairs of a float waveform in [-1, 1], `(N,)` or `(C, N)`, and its rate in Hz -> log-mel `(B, 1, frames, mels)`.

    As in AudioLDM's training: mixed to mono, resampled, truncated to the length, `normalize`d (mean removed, peak
    scaled to 0.5), padded with silence; then reflect padding of `(n_fft - hop_length) / 2` with uncentred frames, Hann
    window, magnitude, Slaney mels, natural logarithm of max(x, 1e-5).

    Frames are `hop_length` samples apart, of `n_fft`; mels lie between `fmin` and `fmax` Hz. With `waveforms`, each
    frame's `hop_length` samples follow its mels: `(B, 1, frames, mels + hop_length)`.
    """

    modality: ClassVar[str] = "audio"
    num_frames: int
    sampling_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 160
    num_mel_bins: int = 64
    fmin: float = 0.0
    fmax: float = 8000.0
    normalize: bool = True
    waveforms: bool = False

    @classmethod
    def of_vocoder(cls, config: Any, num_frames: int, **options: bool) -> AudioTargets:
        """Log-mels as a vocoder (`SpeechT5HifiGan`) of this config takes them."""
        rate, hop_length = config.sampling_rate, math.prod(config.upsample_rates)
        sizes = {"hop_length": hop_length, "num_mel_bins": config.model_in_dim, "fmax": min(cls.fmax, rate / 2)}
        return cls(num_frames, rate, **sizes, **options)

    @property
    def note(self) -> str:
        return f"the first {self.num_frames * self.hop_length / self.sampling_rate:g} s of each target"

    def one(self, item: tuple[np.ndarray, int], row: int) -> np.ndarray:
        waveform, rate = _checked_waveform(item, row)
        length = self.num_frames * self.hop_length
        waveform = resample(to_mono(waveform), rate, self.sampling_rate)[:length].astype(np.float32)
        if self.normalize:
            waveform = waveform - waveform.mean()
            waveform = PEAK * waveform / (np.abs(waveform).max() + 1e-8)
        waveform = np.pad(waveform, (0, length - len(waveform)))
        log_mel = spectrogram(
            np.pad(waveform, (self.n_fft - self.hop_length) // 2, mode="reflect"),
            window_function(self.n_fft, "hann"),
            frame_length=self.n_fft,
            hop_length=self.hop_length,
            power=1.0,
            center=False,
            mel_filters=_mel_filters(self.n_fft, self.num_mel_bins, self.fmin, self.fmax, self.sampling_rate),
            mel_floor=LOG_FLOOR,
            log_mel="log",
        )
        result = log_mel.T.astype(np.float32)
        if self.waveforms:
            result = np.concatenate([result, waveform.reshape(self.num_frames, self.hop_length)], axis=1)
        return result[None]


@dataclass(frozen=True)
class WaveformTargets(TargetProcessor):
    """Pairs of a float waveform in [-1, 1], `(N,)` or `(C, N)`, and its rate in Hz -> `(B, channels, num_samples)`.

    Resampled, cut after `length` samples and padded with silence. Mono becomes all channels; other numbers of channels
    than the decoder's are mixed to mono first.
    """

    modality: ClassVar[str] = "audio"
    num_samples: int
    sampling_rate: int
    channels: int
    length: int

    @property
    def note(self) -> str:
        return f"the first {self.length / self.sampling_rate:g} s of each target"

    def one(self, item: tuple[np.ndarray, int], row: int) -> np.ndarray:
        waveform, rate = _checked_waveform(item, row)
        if waveform.ndim != 2 or len(waveform) != self.channels:
            waveform = np.tile(to_mono(waveform), (self.channels, 1))
        waveform = resample(waveform.astype(np.float32), rate, self.sampling_rate)[:, : self.length]
        return np.pad(waveform, ((0, 0), (0, self.num_samples - waveform.shape[1])))


@cache
def _mel_filters(n_fft: int, num_mel_bins: int, fmin: float, fmax: float, sampling_rate: int) -> np.ndarray:
    return mel_filter_bank(n_fft // 2 + 1, num_mel_bins, fmin, fmax, sampling_rate, norm="slaney", mel_scale="slaney")


def _pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale and crop an image of values up to 255 to float32 `(channels, height, width)` in [-1, 1]."""
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return (np.atleast_3d(np.asarray(image, dtype=np.float32)) / 255.0 * 2.0 - 1.0).transpose(2, 0, 1)
