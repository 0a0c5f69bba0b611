"""The table of media types: everything the rest of the code needs to know about images, videos, audio and other media.

A new medium is an entry of `MEDIA`, which may be added at run time: a picture, clip or sound with its own name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anygpt.errors import InputError
from anygpt.media.audio import resample, to_mono
from anygpt.media.files import DEFAULT_LIMITS, Audio, MediaLimits, Place, Video, read_audio, read_image, to_rgb
from anygpt.media.videos import read_video
from anygpt.media.writing import write_audio, write_image, write_video

SIDE, FRAMES, RATE = 32, 8, 16_000  # pixels, frames and Hz of blank media


@dataclass(frozen=True)
class MediaType:
    """One row of the table; subclasses define the form of the medium in memory and how it is handled.

    Subclasses add `read(place, num_frames, limits, whole)` (see `read_media`).

    Attributes:
        plural: key of such media in decoder targets, the processor's arguments and answers.
        suffixes: file suffixes in lower case; files are written with the first.
        mime: MIME type of written files.
        prefix, signal_tokens: name of its signal tokens (`IMG` gives `[IMG0]`), and their default number in a span.
        content_part: its content part in OpenAI's chat completions; a `…_url` holds a URL, any other base64.
        timed: whether reading samples a number of frames.
        heard: whether its encoders have a feature extractor rather than an image processor.
    """

    name: str
    plural: str
    suffixes: tuple[str, ...]
    mime: str
    prefix: str
    signal_tokens: int
    content_part: str

    timed = False
    heard = False

    def to_input(self, medium: Any, processor: Any) -> Any:
        """Convert a medium to the input of an encoder's `processor`."""
        return medium

    def to_target(self, medium: Any) -> Any:
        return medium

    def write(self, path: Path, content: Any, rate: float | None) -> None:
        """Write a decoder's output to a file, at `rate` frames or samples per second."""
        raise NotImplementedError

    def blank(self, num_frames: int | None = None) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Picture(MediaType):
    """A `PIL.Image` of one mode: `RGB`, or `I;16` for one channel of 16 bits."""

    mode: str = "RGB"

    def read(self, place: str | Place, num_frames: int | None, limits: MediaLimits, whole: bool) -> Image.Image:
        return read_image(place, limits, self.mode)

    def write(self, path: Path, content: Image.Image, rate: float | None) -> None:
        write_image(path, content)

    def blank(self, num_frames: int | None = None) -> Image.Image:
        return Image.new(self.mode, (SIDE, SIDE))

    def to_input(self, medium: Any, processor: Any) -> Any:
        """Convert to 8-bit RGB, unless the processor's `channels` say that it takes the image's own mode."""
        deep = self.mode != "RGB" and getattr(processor, "channels", 3) == 3
        return to_rgb(medium) if deep and isinstance(medium, Image.Image) else medium


@dataclass(frozen=True)
class Clip(MediaType):
    """A `Video`; decoders return and encoders take its frames alone, uint8 `(F, H, W, 3)`."""

    timed = True

    def read(self, place: str | Place, num_frames: int | None, limits: MediaLimits, whole: bool) -> Video:
        return read_video(place, num_frames, limits, whole=whole)

    def write(self, path: Path, content: np.ndarray, rate: float) -> None:
        write_video(path, content, rate)

    def blank(self, num_frames: int | None = None) -> Video:
        return Video(np.zeros((num_frames or FRAMES, SIDE, SIDE, 3), np.uint8), float(FRAMES))

    def to_input(self, medium: Video | np.ndarray, processor: Any) -> Video | np.ndarray:
        """The frames alone, unless the processor samples by time (`reads_times`)."""
        reads_times = getattr(processor, "reads_times", False)
        return medium.frames if isinstance(medium, Video) and not reads_times else medium

    def to_target(self, medium: Video | np.ndarray) -> np.ndarray:
        return medium.frames if isinstance(medium, Video) else medium


@dataclass(frozen=True)
class Sound(MediaType):
    """An `Audio`, or a waveform with its rate; encoders take mono at their feature extractor's rate."""

    heard = True

    def read(self, place: str | Place, num_frames: int | None, limits: MediaLimits, whole: bool) -> Audio:
        return read_audio(place, limits)

    def write(self, path: Path, content: np.ndarray, rate: float) -> None:
        write_audio(path, content, int(rate))

    def blank(self, num_frames: int | None = None) -> Audio:
        return Audio(np.zeros((1, RATE), np.float32), RATE)

    def to_input(self, medium: Audio | tuple[np.ndarray, int] | np.ndarray, processor: Any) -> np.ndarray:
        medium = (medium.mono(), medium.sampling_rate) if isinstance(medium, Audio) else medium
        # as in transformers' processors, a waveform without a rate is taken to have the encoder's own
        waveform, rate = medium if isinstance(medium, tuple) else (medium, processor.sampling_rate)
        return resample(to_mono(waveform), rate, processor.sampling_rate)

    def to_target(self, medium: Audio | tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
        """The waveform, `(2, N)` if stereo, else mixed to `(N,)`, and its rate."""
        if isinstance(medium, tuple):
            return medium
        return medium.waveform if len(medium.waveform) == 2 else medium.mono(), medium.sampling_rate


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
CLIPS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".aif")
# Signal tokens: the paper's names and counts (NExT-GPT, arXiv 2309.05519, §4.2).
IMAGE = Picture("image", "images", PICTURES, "image/png", "IMG", 4, "image_url")
VIDEO = Clip("video", "videos", CLIPS, "video/mp4", "VID", 24, "video_url")
AUDIO = Sound("audio", "audios", SOUNDS, "audio/wav", "AUD", 8, "input_audio")
MEDIA: dict[str, MediaType] = {kind.name: kind for kind in (IMAGE, VIDEO, AUDIO)}  # all media types, by name


def media_type(name: str) -> MediaType:
    """The media type called `name`; raises `InputError` if there is none."""
    if name not in MEDIA:
        raise InputError(f"the media type {name!r} is not known: it is one of {', '.join(MEDIA)}")
    return MEDIA[name]


def media_type_of(path: str | Path) -> MediaType | None:
    """The media type of a file by its longest known suffix (`.depth.png` before `.png`), or None."""
    name = Path(path).name.lower()
    fits = [(len(suffix), kind) for kind in MEDIA.values() for suffix in kind.suffixes if name.endswith(suffix)]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def read_media(
    name: str,
    place: str | Place,
    num_frames: int | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    *,
    whole: bool = False,
) -> Any:
    """Read a medium of the type `name`; `num_frames` and `whole` apply to clips (see `read_video`)."""
    return media_type(name).read(place, num_frames, limits, whole)


def is_timed(name: str) -> bool:
    return name in MEDIA and MEDIA[name].timed


def is_heard(name: str) -> bool:
    return name in MEDIA and MEDIA[name].heard
