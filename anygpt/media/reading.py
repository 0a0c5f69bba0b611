"""Reading of images and audio with Pillow and PyAV (`writing` is the reverse).

Nothing here resizes, crops or resamples; that is up to the caller. A file that cannot be decoded in full
raises an `InputError` with the path, the reason and a remedy.
"""

import av
import numpy as np
from PIL import ExifTags, Image

from anygpt.errors import InputError
from anygpt.media.files import (
    DEFAULT_LIMITS,
    Audio,
    MediaLimits,
    Place,
    codec_of,
    decoded,
    decoding,
    open_container,
    open_image,
    to_mode,
)

# -- images ----------------------------------------------------------------------------------------------

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


BITS_PER_SAMPLE = 258  # TIFF tag


def read_image(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS, mode: str = "RGB") -> Image.Image:
    """Read an image, or the first frame of an animation, and apply its EXIF orientation.

    `mode` is `RGB`, or `I;16` for 16-bit grey; `to_rgb` describes how transparency and bit depths are converted.

    Raises:
        InputError: no such file, empty, truncated, not an image, or over a limit.
    """
    with decoding(path, "an image") as path, open_image(path, limits) as image:
        image.load()  # the TIFF and AVIF plugins apply the orientation here, and remove the tag
        if image.format == "TIFF" and image.mode.startswith("I"):
            image.info["white"] = 2.0 ** min(image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0], 16) - 1
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        return to_mode(image if turn is None else image.transpose(turn), mode)


# -- sounds ----------------------------------------------------------------------------------------------


RANGES = (2.0**15, 2.0**23, 2.0**31)
"""Full scale of 16, 24 and 32-bit integers, which floating-point files may hold unscaled."""


def read_audio(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS) -> Audio:
    """Read an audio file, or the first audio track of a video, at its own rate and with its own channels.

    Integers are scaled to [-1, 1]; `_scale` scales floating-point samples beyond that range.

    Raises:
        InputError: no such file, empty, truncated, no audio stream, samples that are NaN, infinite or in an unknown
            range, or over a limit.
    """
    with decoding(path, "audio") as path, open_container(path, limits) as (container, ending):
        if not container.streams.audio:
            raise InputError(f"{path} has no audio stream: give a file with sound.")
        stream = container.streams.audio[0]
        rate, layout = codec_of(stream).sample_rate, codec_of(stream).layout
        seconds = ending.stated or 0
        limits.check(path, seconds=seconds, bytes=seconds * rate * layout.nb_channels * 4)
        stream.codec_context.thread_count = 1  # data workers already decode in parallel
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
            chunks.append(_to_float(frame, to_packed))
            length += frame.samples
            limits.check(path, seconds=length / rate, bytes=length * channels * 4)
        if length == 0:
            raise ValueError("it holds no samples")
        return Audio(_scale(np.concatenate(chunks, axis=1)), rate, layout.name)


def _scale(waveform: np.ndarray) -> np.ndarray:
    """Scale samples to [-1, 1]: a peak up to 2 (lossy codecs, hot mixes) is divided out; one above 256 means unscaled
    integers, which are divided by the smallest full scale of `RANGES` that holds them.

    Raises:
        ValueError: NaN or infinite samples, or a peak outside these ranges.
    """
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


def _to_float(frame: av.AudioFrame, to_packed: av.AudioResampler) -> np.ndarray:
    """Convert a frame to `(C, n)` float32, with the same values as `av.AudioResampler(format="fltp")`.

    A resampler starts a filter graph with its own threads per file, which dominates the cost of a short one. It is used
    only where PyAV cannot make an array: for 64-bit integers, and for more than seven planes, where it crashes.
    """
    if frame.format.name.startswith("s64") or (frame.format.is_planar and frame.layout.nb_channels > 7):
        return np.concatenate([_to_float(packed, to_packed) for packed in to_packed.resample(frame)], axis=1)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:  # FFmpeg's only unsigned format
        return (samples.astype(np.float32) - 128) / 128
    scale = 1 if samples.dtype.kind == "f" else np.float32(2.0 ** -(8 * samples.itemsize - 1))
    return samples.astype(np.float32) * scale
