"""What media are in memory, how large they may be, and how their files are opened.

Only plain local files in well-known containers, and such within shards and tables, are opened: no URLs, no playlists,
nothing that makes a decoder open a second file.
"""

import abc
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image

from anygpt.errors import InputError
from anygpt.media.containers import check_whole


class StoredMedium(abc.ABC):
    """A medium that is no file of its own, but lies inside a shard or a table.

    It holds where the bytes are, never the bytes: millions of them are in memory at once. `str()` of it is how
    messages name it.
    """

    name: str

    @abc.abstractmethod
    def open(self, mode: str = "rb") -> BinaryIO:
        """A seekable stream of the medium's bytes; like `Path.open`, so that callers need not tell them apart."""


Place = Path | StoredMedium  # both have `open`


@dataclass
class Video:
    """`frames`: uint8 RGB, (F, H, W, 3). `fps`: how many of *these* a second, so that F / fps is the clip's length."""

    frames: np.ndarray
    fps: float


@dataclass
class Audio:
    """`waveform`: float32 in [-1, 1], (C, N). `sampling_rate`: samples a second, in Hz."""

    waveform: np.ndarray
    sampling_rate: int


@dataclass(frozen=True)
class MediaLimits:
    """What one medium may ask for. Checked against the file's header first, and again while decoding.

    max_pixels: width × height of an image or of a frame (default 8192 × 8192).
    max_frames: frames in a video, kept or not (default one hour at 30 a second).
    max_seconds: length of a video or a sound (default one hour).
    max_bytes: decoded size in memory of what is returned (default 512 MiB; decoding takes up to three times as much).
    """

    max_pixels: int = 8192 * 8192
    max_frames: int = 30 * 3600
    max_seconds: float = 3600.0
    max_bytes: int = 512 * 1024**2

    def check(self, path: Place, **amounts: float) -> None:
        """Raises `InputError` where an amount (`pixels`, `frames`, `seconds`, `bytes`) is over its limit."""
        for name, amount in amounts.items():
            if amount > (limit := getattr(self, f"max_{name}")):
                raise InputError(
                    f"{path} has {amount:,.6g} {name}, more than max_{name} = {limit:,.6g}: "
                    "leave it out, make it smaller, or raise the limit."
                )


DEFAULT_LIMITS = MediaLimits()

# Formats that Pillow decodes by itself (its EPS plugin, for one, starts another program).
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
# Containers that hold their own data; playlists and `concat` scripts would open other files and addresses.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,wav,w64,flac,mp3,aac,ogg,aiff,au,caf,amr"


@contextlib.contextmanager
def open_image(path: Place, limits: MediaLimits) -> Iterator[Image.Image]:
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    with path.open("rb") as file:
        limits.check(path, bytes=file.seek(0, os.SEEK_END))  # some of Pillow's plugins read all of it
        file.seek(0)
        with Image.open(file, formats=formats) as image:  # reads the header only
            limits.check(path, pixels=image.width * image.height, bytes=image.width * image.height * 3)
            yield image


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """`RGB` as by `to_rgb`; `I;16` from 16 bits as they are, from 8 bits stretched to 16.

    Raises:
        ValueError: another mode than grey where `I;16` is wanted.
    """
    if mode != "I;16":
        return to_rgb(image)
    if image.mode not in ("I;16", "I;16B", "I", "L"):
        raise ValueError(f"it is {image.mode}; expected one channel of grey")
    values = np.asarray(image).astype(np.int64) * (257 if image.mode == "L" else 1)
    if not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError("it has values beyond 16 bits")
    return Image.fromarray(values.astype(np.uint16))


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel, on white; 16-bit grey is scaled, floating-point values must lie in [0, 1]."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        top = 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= top):  # also false for NaN
            raise ValueError(f"its {image.mode} values are not in [0, {top:g}], so that white is not known")
        image = Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextlib.contextmanager
def open_container(path: Place, limits: MediaLimits) -> Iterator[av.container.InputContainer]:
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "file",
        # FFmpeg decodes a sound's cover to find out what it is; the option ends at 2^31 - 1.
        "max_pixels": str(min(limits.max_pixels, 2**31 - 1)),
    }
    if isinstance(path, StoredMedium):
        with path.open() as file, av.open(file, options=options) as container:
            yield container
    else:
        # "file:" keeps a colon in the name from being taken for a protocol.
        with av.open(f"file:{path}", options=options) as container:
            yield container


def codec_of(stream: av.stream.Stream) -> av.CodecContext:
    if stream.codec_context is None:
        raise ValueError("its codec is not known to FFmpeg")
    return stream.codec_context


@contextlib.contextmanager
def decoding(path: str | Place, what: str) -> Iterator[Place]:
    """Checks that the file is there and whole; turns what a decoder raises within into an `InputError`."""
    path = Path(path) if isinstance(path, str) else path
    if isinstance(path, Path) and not os.path.isfile(path):  # a folder, a pipe or a device will not do either
        raise InputError(f"{path} {'is not a file' if os.path.exists(path) else 'does not exist'}: check the path.")
    try:
        with path.open("rb") as file:
            check_whole(file)
        yield path
    except InputError:
        raise
    except Exception as error:  # on broken files Pillow and PyAV raise whatever their parsers stumble over
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"{path} cannot be read as {what}: {reason}: fetch the file again, or leave it out."
        ) from error
