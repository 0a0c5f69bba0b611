"""Media as people have them and encoders of test suites do not make them, written by code."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "I;16", "I;16B")
SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".dib", ".tiff", ".ppm", ".pgm", ".jp2", ".tga", ".ico", ".avif")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def picture(mode: str, width: int = 19, height: int = 11) -> Image.Image:
    """Noise of a mode, all channels of it."""
    if mode == "F":
        return Image.fromarray(noise(height, width).astype(np.float32) / 255)
    if mode.startswith("I"):
        values = noise(height, width).astype(np.uint16) * 257
        return Image.fromarray(
            values.astype(np.int32) if mode == "I" else values.astype("<u2" if mode == "I;16" else ">u2")
        )
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode in ("P", "PA"):
        image = Image.fromarray(noise(height, width)).convert("P")
        image.putpalette(noise(768).tobytes())
        if mode == "PA":
            image = image.convert("PA")
            image.putalpha(Image.fromarray(noise(height, width, seed=1)))
        return image
    if mode == "1":
        return Image.fromarray(noise(height, width)).convert("1")
    return Image.merge(mode, [Image.fromarray(noise(height, width, seed=i)) for i in range(bands)])


def pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    """`(what it is, file)`: every mode in every format that Pillow writes it in, also with a transparent value."""
    for suffix in SUFFIXES:
        for mode in MODES:
            for options in ({}, {"transparency": 7 if mode in ("P", "L", "I;16") else (7, 7, 7)}):
                if options and (suffix not in (".png", ".gif") or mode not in ("P", "L", "RGB", "I;16")):
                    continue
                path = folder / f"{mode.replace(';', '_')}{'-clear' if options else ''}{suffix}"
                image = picture(mode)
                if options and mode == "I;16":
                    options = {"transparency": image.getpixel((0, 0))}
                try:
                    image.save(path, **options)
                except (OSError, KeyError, ValueError, SystemError, TypeError):
                    path.unlink(missing_ok=True)  # the format has no such mode
                    continue
                yield f"{mode} in {suffix}", path


def heic() -> bytes:
    """As an iPhone's picture begins."""
    return struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(500)


def wav(samples: np.ndarray, stated: int, riff: int | None = None) -> bytes:
    """16-bit mono of 16 kHz whose header states so many bytes of data."""
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    riff = stated + 36 if riff is None else riff
    head = b"RIFF" + struct.pack("<I", riff & 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", stated) + samples.astype("<i2").tobytes()


def aiff(samples: np.ndarray, stated: int) -> bytes:
    """The same, big-endian, stating so many samples; sox writes 0x7F000000 bytes' worth to a pipe."""
    rate = struct.pack(">HQ", 16383 + 13, 16_000 << 50)
    common = b"COMM" + struct.pack(">IhIh", 18, 1, stated, 16) + rate
    sound = b"SSND" + struct.pack(">III", 8 + 2 * stated, 0, 0) + samples.astype(">i2").tobytes()
    return b"FORM" + struct.pack(">I", 4 + len(common) + 16 + 2 * stated) + b"AIFF" + common + sound


def opus(seconds: int, ends: bool = True) -> bytes:
    """Ogg/Opus; without an end-of-stream mark on its last page as Android's recorder leaves it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        for i in range(50 * seconds):
            frame = av.AudioFrame.from_ndarray(noise(1, 960, seed=i).astype(np.int16) * 100 - 12_800, "s16", "mono")
            frame.rate, frame.pts = 48_000, 960 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = buffer.getvalue()
    if ends:
        return content
    place = content.rindex(b"OggS")
    page = bytearray(content[place:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", _ogg_checksum(page))
    return content[:place] + bytes(page)


def _ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


def sound(path: Path, channels: np.ndarray, layout: str) -> Path:
    """Float samples `(C, N)` of 16 kHz as a WAV that says which channel is which."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout=layout)
        frame = av.AudioFrame.from_ndarray((channels.T.reshape(1, -1) * 32767).astype(np.int16), "s16", layout)
        frame.rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def clip(
    path: Path, times: Sequence[int], unit: Fraction = Fraction(1, 1000), sar: Fraction | None = None, size=(96, 64)
) -> Path:
    """Frame i is 8 · i grey all over and shown from `times[i]` units on; pixels are `sar` times as wide as high."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "0"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = unit
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 8 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
