"""Media in memory, their size limits, and reading of images and sounds with Pillow and PyAV (`writing` is the reverse).

Nothing here resizes, crops or resamples. Only local files in well-known containers, or such files inside shards and
tables, are opened: no URLs, no playlists, nothing that makes a decoder open a second file.
"""

import abc
import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from anygpt.errors import InputError
from anygpt.media.audio import to_mono
from anygpt.media.endings import TAIL, Ending, check_tables


class StoredMedium(abc.ABC):
    """The location of a medium inside a shard or a table; `str()` names it in messages.

    It never holds the bytes themselves: millions of instances are in memory at once.
    """

    name: str

    @abc.abstractmethod
    def open(self, mode: str = "rb") -> BinaryIO:
        """A seekable stream of the medium's bytes, with the interface of `Path.open`."""


Place = Path | StoredMedium  # both have `open`


@dataclass
class Video:
    """`frames`: uint8 RGB, (F, H, W, 3). `fps`: rate of *these* frames, so F / fps is the clip's length in seconds."""

    frames: np.ndarray
    fps: float

    @property
    def size(self) -> tuple[int, int]:  # as of a `PIL.Image`
        return self.frames.shape[2], self.frames.shape[1]


@dataclass
class Audio:
    """`waveform`: float32 in [-1, 1], (C, N). `sampling_rate`: in Hz. `layout`: see `to_mono`."""

    waveform: np.ndarray
    sampling_rate: int
    layout: str | None = None

    def mono(self) -> np.ndarray:
        return to_mono(self.waveform, self.layout)


@dataclass(frozen=True)
class MediaLimits:
    """Limits on one medium, checked against the file's header first and again while decoding.

    max_pixels: width × height of an image or of a frame (default 8192 × 8192).
    max_frames: frames in a video, kept or not (default one hour at 30 per second).
    max_seconds: length of a video or a sound (default one hour).
    max_bytes: size in memory of the decoded result (default 512 MiB; decoding takes up to three times as much).
    """

    max_pixels: int = 8192 * 8192
    max_frames: int = 30 * 3600
    max_seconds: float = 3600.0
    max_bytes: int = 512 * 1024**2

    def check(self, path: Place, **amounts: float) -> None:
        for name, amount in amounts.items():
            if amount > (limit := getattr(self, f"max_{name}")):
                raise InputError(
                    f"{path} has {amount:,.6g} {name}, more than max_{name} = {limit:,.6g}: "
                    "leave it out, make it smaller, or raise the limit"
                )


DEFAULT_LIMITS = MediaLimits()

# Formats that Pillow decodes without starting another program (as the EPS plugin does).
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a segment, or the image's end
MAX_SCANS = 100
"""Per JPEG. Progressive ones have about ten; a scan of a few bytes can cost as much as decoding the whole image."""
# Common formats that are not supported: first bytes, name, and how to convert them.
UNREAD = (
    (rb"....ftyp(hei|hev|mif1|msf1)", "HEIC", "pillow-heif or heif-convert converts it"),
    (rb"\xff\x0a|....JXL ", "JPEG XL", "pillow-jxl-plugin or djxl reads it"),
    (rb"\s*(<\?xml[^<]*)?(<!--.*?-->\s*)?<svg", "SVG", "cairosvg draws it"),
    (rb"%PDF", "PDF", "pdftoppm draws it"),
    (rb"MThd", "MIDI", "fluidsynth plays it"),
    (rb"\.RMF|\.ra\xfd", "RealMedia", "ffmpeg converts it"),
    (rb"\x0bw", "AC-3", "ffmpeg converts it"),
    (rb"nut/multimedia container", "NUT", "ffmpeg converts it"),
    (rb"#EXTM3U|ffconcat|\[playlist\]", "a playlist", "give the files that it names"),
    (rb"\s*(<!doctype html|<html)", "an HTML page", "the download failed: fetch the file again"),
    (rb"version https://git-lfs", "a Git LFS pointer", "run git lfs pull"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive", "unpack it"),
)
# Containers that hold their own data; playlists and `concat` scripts would open other files and URLs.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,wav,w64,flac,mp3,aac,ogg,aiff,au,caf,amr,wv,tta"


@contextlib.contextmanager
def open_image(path: Place, limits: MediaLimits) -> Iterator[Image.Image]:
    """Open an image, reading only its header; Pillow detects the format."""
    if limits.max_pixels > (Image.MAX_IMAGE_PIXELS or limits.max_pixels):  # Pillow would refuse what is allowed here
        Image.MAX_IMAGE_PIXELS = limits.max_pixels
    with path.open("rb") as file:
        limits.check(path, bytes=file.seek(0, os.SEEK_END))  # some of Pillow's plugins read the whole file
        file.seek(0)
        with Image.open(file) as image:
            if image.format not in IMAGE_FORMATS:
                name = image.format_description or image.format
                raise InputError(f"{path} is {name}, which is not read here: convert it to PNG or JPEG")
            if image.format in ("JPEG", "MPO"):
                _check_scans(path)
            limits.check(path, pixels=image.width * image.height, bytes=image.width * image.height * 3)
            yield image


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `RGB` (see `to_rgb`), or grey to `I;16`: 16 bits are kept, 8 are scaled; others are a `ValueError`."""
    if mode != "I;16":
        return to_rgb(image)
    if image.mode not in ("I;16", "I;16B", "I", "L"):
        raise ValueError(f"it is {image.mode}; expected one channel of grey")
    values = np.asarray(image).astype(np.int64) * (257 if image.mode == "L" else 1)
    if not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError("it has values beyond 16 bits")
    return Image.fromarray(values.astype(np.uint16))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB as Pillow does, with transparency composited on white.

    Where Pillow clips grey beyond 8 bits, 16-bit grey is scaled from 65535 here (from its own white level in a TIFF of
    fewer bits); floating-point values must lie in [0, 1]. An unknown white level is a `ValueError`.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        top = 1.0 if image.mode == "F" else image.info.get("white", 65535.0)
        if not (values.min() >= 0 and values.max() <= top):  # also false for NaN
            raise ValueError(f"its {image.mode} values are not in [0, {top:g}], so that white is not known; scale them")
        grey = Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))
        if (clear := image.info.get("transparency")) is not None:
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        image = grey
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_scans(path: Place) -> None:
    """Raise a `ValueError` if a JPEG has more than `MAX_SCANS` up to its end; phones append a clip to it."""
    with path.open("rb") as file:
        content = file.read()
    scans, at = 0, 2
    while scans <= MAX_SCANS and (found := _MARKER.search(content, at)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        # The segment's length follows, so that a thumbnail's markers in it are passed over.
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    if scans > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")


@contextlib.contextmanager
def open_container(path: Place, limits: MediaLimits) -> Iterator[tuple[av.container.InputContainer, Ending]]:
    """Open a container, with an `Ending` that checks whether it is complete."""
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "file",
        # FFmpeg decodes an audio file's cover art to probe it; the option's maximum is 2^31 - 1.
        "max_pixels": str(min(limits.max_pixels, 2**31 - 1)),
    }
    with path.open("rb") as file:
        head = file.read(8192)
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        tail = file.read()
        file.seek(0)
        # With "file:", a colon in the name is not taken for a protocol.
        with av.open(file if isinstance(path, StoredMedium) else f"file:{path}", options=options) as container:
            yield container, Ending(container, head, tail, str(path))


def decoded(
    container: av.container.InputContainer, stream: av.stream.Stream, ending: Ending
) -> Iterator[av.frame.Frame]:
    """Yield all frames of a stream in order; a `ValueError` follows the last one if the file is truncated."""
    tail: deque[bool] = deque(maxlen=3)
    for packet in container.demux():
        ending.see(packet)
        if packet.stream.index == stream.index:
            for frame in packet.decode():
                tail.append(frame.is_corrupt)
                yield frame
    if any(tail):
        raise ValueError("it is truncated: its last frames are not whole")
    ending.check()


def codec_of(stream: av.stream.Stream) -> av.CodecContext:
    if stream.codec_context is None:
        raise ValueError("its codec is not known to FFmpeg")
    return stream.codec_context


@contextlib.contextmanager
def decoding(path: str | Place, what: str) -> Iterator[Place]:
    """Check that the file exists, and turn a decoder's exceptions inside the block into `InputError`."""
    path = Path(path) if isinstance(path, str) else path
    if isinstance(path, Path) and not os.path.isfile(path):  # nor are folders, pipes and devices accepted
        raise InputError(f"{path} {'is not a file' if os.path.exists(path) else 'does not exist'}: check the path")
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(512)
            if not head:
                raise ValueError("it is empty")
            check_tables(file, head)
        yield path
    except InputError:
        raise
    except Exception as error:  # on broken files Pillow and PyAV raise many kinds of exceptions
        for begins, name, advice in UNREAD:
            if re.match(begins, head, re.DOTALL | re.IGNORECASE):
                raise InputError(f"{path} is {name}, which is not read here: {advice}") from error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError | av.ArgumentError):  # a repr of the file, and "Invalid argument"
            reason = "its format is not known"
        raise InputError(f"{path} cannot be read as {what}: {reason}: fetch the file again, or leave it out") from error


# Transposition by EXIF orientation. `ImageOps.exif_transpose` also rewrites the other tags, and fails on odd ones.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS, mode: str = "RGB") -> Image.Image:
    """Read an image, or the first frame of an animation, and apply its EXIF orientation.

    `mode` is `RGB`, or `I;16` for 16-bit grey; `to_rgb` describes how transparency and bit depths are converted. An
    `InputError` refuses what is missing, empty, truncated, no image, or over a limit.
    """
    with decoding(path, "an image") as path, open_image(path, limits) as image:
        image.load()  # the TIFF and AVIF plugins apply the orientation here, and remove the tag
        if image.format == "TIFF" and image.mode.startswith("I"):
            image.info["white"] = 2.0 ** min(image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0], 16) - 1
        return to_mode(upright(image), mode)


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a loaded image."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


RANGES = (2.0**15, 2.0**23, 2.0**31)
"""Full scale of 16, 24 and 32-bit integers, which floating-point files may hold unscaled."""


def read_audio(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS) -> Audio:
    """Read an audio file, or the first audio track of a video, at its own rate and with its own channels.

    Integers are scaled to [-1, 1]; `_scale` scales floating-point samples beyond that range. An `InputError` refuses
    what is missing, empty, truncated, without audio, over a limit, or has samples in an unknown range.
    """
    with decoding(path, "audio") as path, open_container(path, limits) as (container, ending):
        if not container.streams.audio:
            raise InputError(f"{path} has no audio stream: give a file with sound")
        stream = container.streams.audio[0]
        rate, layout = codec_of(stream).sample_rate, codec_of(stream).layout
        seconds = ending.stated or 0
        limits.check(path, seconds=seconds, bytes=seconds * rate * layout.nb_channels * 4)
        stream.codec_context.thread_count = 1  # data workers already decode in parallel
        # Packed, since PyAV makes no array of more than eight planes.
        chunks, length, to_packed = [], 0, av.AudioResampler(format="flt")
        for frame in decoded(container, stream, ending):
            if not chunks:  # the frames may differ from the header
                rate, layout = frame.sample_rate, frame.layout
            channels = layout.nb_channels
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                raise ValueError(
                    f"it changes from {rate} Hz and {channels} channels to {frame.sample_rate} Hz and "
                    f"{frame.layout.nb_channels} channels; convert it to one"
                )
            chunks += [part.to_ndarray().reshape(-1, channels).T for part in to_packed.resample(frame)]
            length += frame.samples
            limits.check(path, seconds=length / rate, bytes=length * channels * 4)
        if length == 0:
            raise ValueError("it holds no samples")
        return Audio(_scale(np.concatenate(chunks, axis=1)), rate, layout.name)


def _scale(waveform: np.ndarray) -> np.ndarray:
    """Scale samples to [-1, 1]: a peak up to 2 (lossy codecs, hot mixes) is divided out; one above 256 means unscaled
    integers, which are divided by the smallest full scale of `RANGES` that holds them."""
    peak = float(np.abs(waveform).max())
    if not np.isfinite(peak):
        raise ValueError("it holds samples that are NaN or infinite")
    if peak <= 1:
        return waveform
    if peak <= 2:
        return waveform / np.float32(peak)
    top = next((top for top in RANGES if peak <= top), None) if peak > 256 else None
    if top is None:
        raise ValueError(f"its samples reach {peak:g}, so their range is not known; scale them to [-1, 1]")
    return waveform / np.float32(top)
