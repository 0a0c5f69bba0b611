"""Images, videos and sounds: files to arrays, with Pillow and PyAV only (`media_writing` is the way back).

Nothing here resizes, crops or resamples; each consumer does that for itself. What cannot be decoded in full
is an `InputError` with the path, the reason and what to do. Only plain local files in well-known containers,
and such within shards and tables, are opened: no URLs, no playlists, nothing that makes a decoder open a second file.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from anygpt.data.schema import StoredMedium
from anygpt.errors import InputError

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
# What Pillow and PyAV raise on broken files.
DECODER_ERRORS = (
    av.FFmpegError,
    Image.DecompressionBombError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
)


def read_media(
    media_type: str, path: str | Place, num_frames: int | None = None, limits: MediaLimits = DEFAULT_LIMITS
) -> Image.Image | Video | Audio:
    """Reads an "image", a "video" (with `num_frames`, see `read_video`) or an "audio"."""
    if media_type == "image":
        return read_image(path, limits)
    if media_type == "video":
        return read_video(path, num_frames, limits)
    if media_type == "audio":
        return read_audio(path, limits)
    raise InputError(f"The media type {media_type!r} is not known: it is one of image, video, audio.")


# -- images ----------------------------------------------------------------------------------------------


def read_image(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says; transparency is put on white.

    Of an animation, the first frame. 16-bit grey is scaled to 8 bits; floating-point images must lie in [0, 1].

    Raises:
        InputError: no such file, empty, truncated, not an image, or over a limit.
    """
    with _decoding(path, "an image") as path, _open_image(path, limits) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def _open_image(path: Place, limits: MediaLimits) -> Iterator[Image.Image]:
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    with path.open("rb") as file, Image.open(file, formats=formats) as image:  # reads the header only
        limits.check(path, pixels=image.width * image.height, bytes=image.width * image.height * 3)
        yield image


def _to_rgb(image: Image.Image) -> Image.Image:
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


# -- videos ----------------------------------------------------------------------------------------------

# The frames of a file, in order: how to get one as uint8 RGB (H, W, 3), and how many seconds it is shown.
Frames = Iterator[tuple[Callable[[], np.ndarray], Fraction]]


def read_video(path: str | Place, num_frames: int | None = None, limits: MediaLimits = DEFAULT_LIMITS) -> Video:
    """Reads a video file, or an animated GIF, WebP or PNG.

    Args:
        num_frames: None returns all n frames. k returns exactly k, evenly spaced from the first to the last:
            frame round(i · (n − 1) / (k − 1)) for i = 0 … k − 1 (halves up), the middle one for
            k = 1; where k > n, frames repeat. Only these are kept in memory.

    Returns:
        A `Video`, frames turned as the file's rotation says, times taken as evenly spaced.

    Raises:
        InputError: no such file, empty, truncated, not a video, without a picture stream, or over a limit.
    """
    if num_frames is not None and num_frames < 1:
        raise InputError(f"num_frames is {num_frames}, and must be at least 1, or None for all frames.")
    with _decoding(path, "a video") as path:
        animated = _is_animation(path)
        count, pixels = (_animation_header if animated else _video_header)(path, limits)
        limits.check(path, pixels=pixels, frames=count, bytes=(num_frames or count) * pixels * 3)
        while True:
            indices = range(count) if num_frames is None else _evenly_spaced(count, num_frames)
            frames = (_animation_frames if animated else _video_frames)(path)
            kept, decoded, seconds = _keep(frames, None if num_frames is None else set(indices), path, limits)
            if decoded == 0:
                raise ValueError("it holds no frames")
            if num_frames is None or decoded == count:
                break
            count = decoded  # the header was wrong: now that the number is known, choose again
        chosen = list(kept.values()) if num_frames is None else [kept[i] for i in indices]
        return Video(frames=np.stack(chosen), fps=float(len(chosen) / seconds))


def _evenly_spaced(count: int, k: int) -> list[int]:
    if k == 1:
        return [(count - 1) // 2]
    return [(2 * i * (count - 1) + k - 1) // (2 * (k - 1)) for i in range(k)]


def _keep(
    frames: Frames, wanted: set[int] | None, path: Place, limits: MediaLimits
) -> tuple[dict[int, np.ndarray], int, Fraction]:
    """Runs through all frames; returns the wanted ones by index, the number of all, and their length in seconds."""
    kept: dict[int, np.ndarray] = {}
    size, count, seconds = 0, 0, Fraction(0)
    for to_array, shown in frames:
        if wanted is None or count in wanted:
            kept[count] = to_array()
            size += kept[count].nbytes
        count += 1
        seconds += shown
        limits.check(path, frames=count, bytes=size)
    return kept, count, seconds


def _is_animation(path: Place) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head.startswith((b"GIF8", b"\x89PNG")) or (head.startswith(b"RIFF") and head.endswith(b"WEBP"))


def _animation_header(path: Place, limits: MediaLimits) -> tuple[int, int]:
    with _open_image(path, limits) as image:
        count = getattr(image, "n_frames", 1)
        if count == 1 and image.format != "GIF":
            raise ValueError("it is a still image")
        return count, image.width * image.height


def _animation_frames(path: Place) -> Frames:
    with path.open("rb") as file, Image.open(file, formats=["GIF", "WEBP", "PNG"]) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            milliseconds = image.info.get("duration") or 100  # what browsers take an unstated duration for
            yield lambda: np.asarray(_to_rgb(image)), Fraction(milliseconds) / 1000


@contextlib.contextmanager
def _open_container(path: Place) -> Iterator[av.container.InputContainer]:
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    if isinstance(path, StoredMedium):
        with path.open() as file, av.open(file, options=options) as container:
            yield container
    else:
        # "file:" keeps a colon in the name from being taken for a protocol.
        with av.open(f"file:{path}", options=options) as container:
            yield container


def _codec(stream: av.stream.Stream) -> av.CodecContext:
    if stream.codec_context is None:
        raise ValueError("its codec is not known to FFmpeg")
    return stream.codec_context


def _picture_stream(container: av.container.InputContainer, path: Place) -> av.VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # the cover of a song is no video
            return stream
    raise InputError(f"{path} has no video stream: use it as audio, or give a file with pictures.")


def _video_header(path: Place, limits: MediaLimits) -> tuple[int, int]:
    """(frames, pixels a frame). Where the container does not say how many frames it has, packets are counted."""
    with _open_container(path) as container:
        stream = _picture_stream(container, path)
        limits.check(path, seconds=(container.duration or 0) / av.time_base)
        codec = _codec(stream)
        pixels = codec.width * codec.height
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream)), pixels


def _video_frames(path: Place) -> Frames:
    with _open_container(path) as container:
        stream = _picture_stream(container, path)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ValueError("it does not say how many frames it shows a second")
        for frame in container.decode(stream):
            quarter_turns = round(frame.rotation / 90)  # counter-clockwise, as np.rot90 counts them
            yield (
                lambda frame=frame, turns=quarter_turns: np.rot90(frame.to_ndarray(format="rgb24"), turns),
                1 / Fraction(rate),
            )


# -- sounds ----------------------------------------------------------------------------------------------


def read_audio(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS) -> Audio:
    """Reads a sound file, or the first sound track of a video, at its own rate and with its own channels.

    Integers are scaled to [-1, 1]; floating-point samples beyond (lossy codecs overshoot a little) are clipped.

    Raises:
        InputError: no such file, empty, truncated, no sound in it, NaN or infinite samples, or over a limit.
    """
    with _decoding(path, "audio") as path, _open_container(path) as container:
        if not container.streams.audio:
            raise InputError(f"{path} has no audio stream: give a file with sound.")
        stream = container.streams.audio[0]
        rate, channels = _codec(stream).sample_rate, _codec(stream).channels
        seconds = (container.duration or 0) / av.time_base
        limits.check(path, seconds=seconds, bytes=seconds * rate * channels * 4)
        to_float = av.AudioResampler(format="fltp")  # rate and layout: those of the first frame
        chunks, length = [], 0
        for frame in container.decode(stream):
            for converted in to_float.resample(frame):
                chunks.append(converted.to_ndarray())  # (C, n) float32
                length += converted.samples
            limits.check(path, seconds=length / rate, bytes=length * channels * 4)
        if length == 0:
            raise ValueError("it holds no samples")
        waveform = np.concatenate(chunks, axis=1)
        if not np.isfinite(waveform).all():
            raise ValueError("it holds samples that are NaN or infinite")
        return Audio(waveform=np.clip(waveform, -1, 1), sampling_rate=rate)


# -- files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _decoding(path: str | Place, what: str) -> Iterator[Place]:
    """Checks that the file is there and whole; turns what a decoder raises within into an `InputError`."""
    path = Path(path) if isinstance(path, str) else path
    if isinstance(path, Path) and not os.path.isfile(path):  # a folder, a pipe or a device will not do either
        raise InputError(f"{path} {'is not a file' if os.path.exists(path) else 'does not exist'}: check the path.")
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise ValueError("it is empty")
        if (stated := _stated_size(path, size)) > size:
            raise ValueError(f"it is truncated, {size:,} bytes of {stated:,}")
        yield path
    except InputError:
        raise
    except DECODER_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"{path} cannot be read as {what}: {reason}: fetch the file again, or leave it out."
        ) from error


def _stated_size(path: Place, size: int) -> int:
    """How many bytes the outermost chunks of a RIFF (WAV, AVI, WebP) or MP4/MOV file claim; else `size`.

    Decoders pass over a missing tail without a word, and would give a shorter sound or clip.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and len(head) == 12:
            stated = int.from_bytes(head[4:8], "little")
            # Streamed files do not know their length; some writers count the header of 8 bytes twice.
            return size if stated in (0, 0xFFFFFFFF) else stated
        if head[4:8] != b"ftyp":
            return size
        position = 0
        while position + 8 <= size:
            file.seek(position)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1:  # the length follows in 64 bits
                length = int.from_bytes(box[8:16], "big")
            if length < 8:  # 0: up to the end of the file
                return size
            position += length
        return position
