"""Images and sounds: files to arrays, with Pillow and PyAV only (`writing` is the way back).

Nothing here resizes, crops or resamples; each consumer does that for itself. What cannot be decoded in full
is an `InputError` with the path, the reason and what to do.
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

# What an EXIF orientation asks for. Not by `ImageOps.exif_transpose`, which writes the other tags anew, and fails where
# one of them is odd.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


BITS_PER_SAMPLE = 258  # TIFF's tag


def read_image(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS, mode: str = "RGB") -> Image.Image:
    """An image of a mode (`RGB`, or `I;16` for 16-bit grey), turned as its EXIF orientation says.

    Of an animation, the first frame; for what becomes of transparency and bit depths see `to_rgb`.

    Raises:
        InputError: no such file, empty, truncated, not an image, or over a limit.
    """
    with decoding(path, "an image") as path, open_image(path, limits) as image:
        image.load()  # TIFF's and AVIF's plugins turn it here, and take the orientation out
        if image.format == "TIFF" and image.mode.startswith("I"):
            image.info["white"] = 2.0 ** min(image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0], 16) - 1
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        return to_mode(image if turn is None else image.transpose(turn), mode)


# -- sounds ----------------------------------------------------------------------------------------------


RANGES = (2.0**15, 2.0**23, 2.0**31)
"""Of 16, 24 and 32 bits, from which floating-point samples may come unscaled."""


def read_audio(path: str | Place, limits: MediaLimits = DEFAULT_LIMITS) -> Audio:
    """Reads a sound file, or the first sound track of a video, at its own rate and with its own channels.

    Integers are scaled to [-1, 1], floating-point samples beyond it by `_scale`.

    Raises:
        InputError: no such file, empty, truncated, no sound in it, samples that are NaN, infinite or in no range that
            is known, or over a limit.
    """
    with decoding(path, "audio") as path, open_container(path, limits) as (container, ending):
        if not container.streams.audio:
            raise InputError(f"{path} has no audio stream: give a file with sound.")
        stream = container.streams.audio[0]
        rate, layout = codec_of(stream).sample_rate, codec_of(stream).layout
        seconds = ending.stated or 0
        limits.check(path, seconds=seconds, bytes=seconds * rate * layout.nb_channels * 4)
        stream.codec_context.thread_count = 1  # as of videos
        chunks, length, to_packed = [], 0, av.AudioResampler(format="flt")
        for frame in decoded(container, stream, ending):
            if not chunks:  # a header may say otherwise
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
    """Samples within [-1, 1], by their evident range: a little beyond, as of lossy codecs and hot mixes, are divided by
    their peak; in the hundreds or more, by 2 to the power of 15, 23 or 31.

    Raises:
        ValueError: NaN or infinite samples, or a peak between these ranges or above.
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
    """`(C, n)` float32, as `av.AudioResampler(format="fltp")` gives it.

    A resampler starts a filter graph with threads of its own for each file, which costs more than all else of a short
    one, so it is for what PyAV makes no arrays of: 64-bit integers, and eight planes or more, past which it crashes.
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
