"""Writing of images, videos and audio, with Pillow, PyAV and the standard library's WAV writer.

Every file is written under a temporary name first, so that an interrupted run leaves no partial file.
"""

import contextlib
import math
import os
import secrets
import shutil
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from anygpt.errors import InputError


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write an image in the format of the path's suffix; an `InputError` if Pillow writes none with it."""
    Image.init()
    image_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if image_format not in Image.SAVE:
        raise InputError(f"{path}: the suffix {Path(path).suffix!r} names no image format: use .png or .jpg")
    with replacing(path) as temporary:
        image.save(temporary, format=image_format)


def write_video(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write frames, uint8 (F, H, W, 3), as H.264 (yuv420p) in an MP4 file, at `fps` frames per second.

    The codec needs even sizes: the last row or column of an odd height or width is repeated.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"{path}: frames must be uint8 (F, H, W, 3), and are {frames.dtype} {frames.shape}")
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"{path}: fps is {fps}, and must be a positive number of frames a second")
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        # On tiny frames x264's macroblock tree reads out of bounds, which made the output nondeterministic.
        options = {"x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_audio(path: str | Path, waveform: np.ndarray, sampling_rate: int) -> None:
    """Write float samples in [-1, 1], (N,) or (C, N), as a 16-bit PCM WAV file; values beyond are clipped."""
    waveform = np.atleast_2d(waveform)
    if waveform.ndim != 2 or waveform.size == 0 or not np.isfinite(waveform).all():
        raise InputError(f"{path}: the waveform must be finite and (N,) or (C, N), and is {waveform.shape}")
    samples = np.clip(np.round(waveform * 32768.0), -32768, 32767).astype("<i2")
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(samples.T.tobytes())


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of a file or a folder, which replaces it at the end of the block."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write(path: str | Path, content: bytes) -> None:
    """Write a file atomically, by renaming."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
