"""The table of media types: all that anything else asks about an image, a video, a sound, or another medium.

A new medium is an entry of `MEDIA`: a picture, a clip or a sound of another name, suffix and signal. Who reads the
table reads it when it is used, so that an entry added at run time counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anygpt.errors import InputError
from anygpt.media.audio import resample, to_mono
from anygpt.media.files import DEFAULT_LIMITS, Audio, MediaLimits, Place, Video, to_rgb
from anygpt.media.reading import read_audio, read_image
from anygpt.media.videos import read_video
from anygpt.media.writing import write_audio, write_image, write_video

SIDE, FRAMES, RATE = 32, 8, 16_000
"""Of blank media: pixels, frames, Hz."""


@dataclass(frozen=True)
class MediaType:
    """One row of the table; the subclasses say what such a medium is in memory and how it is handled.

    Beside what is below they have `read(place, num_frames, limits, whole)` (see `read_media`), `write(path, content,
    rate)` of what a decoder made at `rate` frames or samples a second, and `blank(num_frames)`, a medium that stands
    for any other where only its shape matters.

    Attributes:
        name: in data files, configs and messages.
        plural: under which decoder targets, the processor and answers list them.
        suffixes: of its files, in lower case; the first is what is written.
        mime: the MIME type of what is written.
        prefix, signal_tokens: names of its signal tokens (`IMG` gives `[IMG0]`), and how many a span has by default.
        content_part: its content part in OpenAI's chat completions; a `…_url` holds a URL, any other base64.
        timed: whether a medium is sampled to a number of frames when it is read.
        heard: whether its encoders have a feature extractor in place of an image processor.
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

    def size(self, medium: Any) -> tuple[int, int] | None:
        """Width and height in pixels; None for what has none."""
        return None

    def to_input(self, medium: Any, processor: Any) -> Any:
        """A medium as the `processor` of an encoder takes it."""
        return medium

    def to_target(self, medium: Any) -> Any:
        """A medium as a decoder's `TargetProcessor` takes it."""
        return medium

    def to_part(self, content: Any, rate: float | None) -> Any:
        """What a decoder made as a content part of a message holds it."""
        return content

    def write(self, path: Path, content: Any, rate: float | None) -> None:
        """Write what a decoder made to a file."""
        raise NotImplementedError

    def blank(self, num_frames: int | None = None) -> Any:
        """One that shows nothing."""
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

    def size(self, medium: Image.Image) -> tuple[int, int]:
        return medium.size

    def to_input(self, medium: Any, processor: Any) -> Any:
        """Three channels of 8 bits for processors that take no others; those of one `channels` get it as it is."""
        deep = self.mode != "RGB" and getattr(processor, "channels", 3) == 3
        return to_rgb(medium) if deep and isinstance(medium, Image.Image) else medium


@dataclass(frozen=True)
class Clip(MediaType):
    """A `Video`; what decoders make and encoders take are its frames, uint8 `(F, H, W, 3)`."""

    timed = True

    def read(self, place: str | Place, num_frames: int | None, limits: MediaLimits, whole: bool) -> Video:
        return read_video(place, num_frames, limits, whole=whole)

    def write(self, path: Path, content: np.ndarray, rate: float) -> None:
        write_video(path, content, rate)

    def blank(self, num_frames: int | None = None) -> Video:
        return Video(np.zeros((num_frames or FRAMES, SIDE, SIDE, 3), np.uint8), float(FRAMES))

    def size(self, medium: Video) -> tuple[int, int]:
        return medium.frames.shape[2], medium.frames.shape[1]

    def to_input(self, medium: Video | np.ndarray, processor: Any) -> Video | np.ndarray:
        """Frames alone, but for processors that choose by time, which set `reads_times`."""
        reads_times = getattr(processor, "reads_times", False)
        return medium.frames if isinstance(medium, Video) and not reads_times else medium

    def to_target(self, medium: Video) -> np.ndarray:
        return medium.frames


@dataclass(frozen=True)
class Sound(MediaType):
    """An `Audio`, or a waveform with its rate; encoders take it mixed to mono, at the rate of their extractor."""

    heard = True

    def read(self, place: str | Place, num_frames: int | None, limits: MediaLimits, whole: bool) -> Audio:
        return read_audio(place, limits)

    def write(self, path: Path, content: np.ndarray, rate: float) -> None:
        write_audio(path, content, int(rate))

    def blank(self, num_frames: int | None = None) -> Audio:
        return Audio(np.zeros((1, RATE), np.float32), RATE)

    def to_input(self, medium: Audio | tuple[np.ndarray, int] | np.ndarray, processor: Any) -> np.ndarray:
        medium = self.to_target(medium) if isinstance(medium, Audio) else medium
        # a waveform without a rate has the encoder's own, as transformers' processors take it
        waveform, rate = medium if isinstance(medium, tuple) else (medium, processor.sampling_rate)
        return resample(to_mono(waveform), rate, processor.sampling_rate)

    def to_target(self, medium: Audio) -> tuple[np.ndarray, int]:
        return medium.mono(), medium.sampling_rate

    def to_part(self, content: np.ndarray, rate: float) -> tuple[np.ndarray, int]:
        return content, int(rate)


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
CLIPS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
# Signal tokens: the paper's names and counts (NExT-GPT, arXiv 2309.05519, §4.2).
IMAGE = Picture("image", "images", PICTURES, "image/png", "IMG", 4, "image_url")
VIDEO = Clip("video", "videos", CLIPS, "video/mp4", "VID", 24, "video_url")
AUDIO = Sound("audio", "audios", SOUNDS, "audio/wav", "AUD", 8, "input_audio")
MEDIA: dict[str, MediaType] = {kind.name: kind for kind in (IMAGE, VIDEO, AUDIO)}
"""All media types by name."""


def media_type(name: str) -> MediaType:
    """The row of a media type.

    Raises:
        InputError: there is none of this name.
    """
    if name not in MEDIA:
        raise InputError(f"The media type {name!r} is not known: it is one of {', '.join(MEDIA)}.")
    return MEDIA[name]


def media_type_of(path: str | Path) -> MediaType | None:
    """The media type of a file by its suffix, the longest that fits (`.depth.png` before `.png`); None if none does."""
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
    """Reads a medium of the type `name`; `num_frames` and `whole` are for clips (see `read_video`)."""
    return media_type(name).read(place, num_frames, limits, whole)


def is_timed(name: str) -> bool:
    """Whether `name` is a media type of clips."""
    return name in MEDIA and MEDIA[name].timed


def is_heard(name: str) -> bool:
    """Whether `name` is a media type of sounds."""
    return name in MEDIA and MEDIA[name].heard
