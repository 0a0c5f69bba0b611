"""Reading of videos and animations: all frames, a number of evenly spaced ones in time, or a frame rate.

If only some are needed and the container states each frame's presentation time, decoding seeks to the keyframe before
each one. Otherwise, and in animations, all frames are decoded in order and the selected ones kept.
"""

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from PIL import Image

from anygpt.errors import InputError
from anygpt.media import files
from anygpt.media.files import DEFAULT_LIMITS, MediaLimits, Place, Video

# Containers whose packets have presentation times; others (such as AVI) have decoding times only.
TIMED = {"mov", "matroska", "mpegts"}
# Since PyAV 17 a frame is converted in one thread per core; starting them takes longer than the conversion.
_IN_ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
# Most pixels of all frames of an animation together: half a minute of decoding.
ANIMATION_PIXELS = 2**32


class Header(NamedTuple):
    """A video before decoding: pixels of a frame, start of each frame and end of the last in seconds; and, where the
    container states them, each frame's time and its keyframe's, in the stream's time base."""

    pixels: int
    starts: Sequence[Fraction]
    end: Fraction
    times: Sequence[int] = ()
    keys: Sequence[int] = ()


class Frame(NamedTuple):
    """A decoded frame, which `to_array` makes uint8 RGB (H, W, 3); its start (or None) and duration in seconds."""

    to_array: Callable[[], np.ndarray]
    start: Fraction | None
    duration: Fraction


def read_video(
    path: str | Place,
    num_frames: int | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    *,
    fps: float | None = None,
    whole: bool = False,
) -> Video:
    """Read a video file, or an animated GIF, WebP, PNG or AVIF, with the file's rotation applied.

    `num_frames` None returns all n frames. k returns exactly k, the nearest to points evenly spaced in time from the
    first frame to the last: at a constant rate, frame round(i · (n − 1) / (k − 1)) for i = 0 … k − 1 (halves up), the
    middle one for k = 1; for k > n, frames repeat. `fps` returns a frame rate instead: the frames shown at 0, 1 / fps,
    2 / fps … seconds, at least one. Only these are kept in memory; with `whole` all are decoded, as a check.

    An `InputError` refuses what is missing, empty, truncated, no video, without a picture stream, or over a limit.
    """
    if num_frames is not None and (num_frames < 1 or fps is not None):
        raise InputError(f"num_frames is {num_frames}, and must be at least 1, or None for all frames or with fps")
    if fps is not None and not 0 < fps < math.inf:
        raise InputError(f"fps is {fps}, and must be a number above 0, or None")
    with files.decoding(path, "a video") as path:
        with path.open("rb") as file:
            animated = re.match(rb"GIF8|\x89PNG|RIFF....WEBP|....ftypavi", file.read(12), re.DOTALL) is not None
        header = (_animation_header if animated else _video_header)(path, limits)
        count = len(header.starts)
        kept_count = num_frames or (0 if fps else count)
        limits.check(path, pixels=header.pixels, frames=count, bytes=kept_count * header.pixels * 3)

        def choose(starts: Sequence[Fraction], end: Fraction) -> Sequence[int]:
            if fps is None:
                return range(len(starts)) if num_frames is None else _evenly_spaced(starts, num_frames)
            times = max(1, math.floor(end * Fraction(fps)))
            limits.check(path, bytes=times * header.pixels * 3)
            return [bisect_right(starts, i / Fraction(fps)) - 1 for i in range(times)]

        seconds, kept = header.end, None
        chosen = choose(header.starts, seconds) if header.starts else []
        if header.times and not whole and (num_frames is not None or fps is not None):
            kept = _seek_frames(path, header, chosen, limits)
        while kept is None or not kept.keys() >= set(chosen):  # decoded again if the header was wrong
            frames = (_animation_frames if animated else _video_frames)(path, limits)
            kept, starts, seconds = _in_order(frames, set(chosen), path, limits)
            chosen = choose(starts, seconds)
        rate = float(len(chosen) / seconds if fps is None else fps)
        return Video(frames=np.stack([kept[i] for i in chosen]), fps=rate)


def _evenly_spaced(starts: Sequence[Fraction], k: int) -> list[int]:
    """Indices of the frames nearest to `k` evenly spaced times; a tie takes the later one, or for k = 1 the earlier."""
    first, length = starts[0], starts[-1] - starts[0]
    chosen = []
    for place in [first + length / 2] if k == 1 else [first + length * Fraction(i, k - 1) for i in range(k)]:
        before = bisect_right(starts, place) - 1
        after = min(before + 1, len(starts) - 1)
        lead = (place - starts[before]) - (starts[after] - place)
        chosen.append(after if lead > 0 or (lead == 0 and k > 1) else before)
    return chosen


def _in_order(
    frames: Iterator[Frame], wanted: set[int], path: Place, limits: MediaLimits
) -> tuple[dict[int, np.ndarray], list[Fraction], Fraction]:
    kept: dict[int, np.ndarray] = {}
    said: list[Fraction | None] = []
    ends: list[Fraction] = []
    size = 0
    for index, frame in enumerate(frames):
        if index in wanted:
            kept[index] = frame.to_array()
            size += kept[index].nbytes
        said.append(frame.start)
        ends.append(frame.duration + (ends[-1] if ends else 0))
        limits.check(path, frames=len(said), bytes=size, seconds=float(ends[-1]))
    if not said:
        raise ValueError("it holds no frames")
    length = ends[-1] - (ends[-2] if len(ends) > 1 else 0)
    if None in said or any(after <= before for before, after in itertools.pairwise(said)):
        said = [Fraction(0), *ends[:-1]]
    starts = [start - said[0] for start in said]
    return kept, starts, starts[-1] + length


def _animation_header(path: Place, limits: MediaLimits) -> Header:
    with files.open_image(path, limits) as image:
        count = getattr(image, "n_frames", 1)
        if count == 1 and image.format != "GIF":
            raise ValueError("it is a still image")
        if image.width * image.height * count > ANIMATION_PIXELS:  # each frame is composited on the whole canvas
            raise ValueError(f"its {count:,} frames of {image.width} × {image.height} pixels are too much to decode")
        return Header(image.width * image.height, [Fraction(i, 10) for i in range(count)], Fraction(count, 10))


def _animation_frames(path: Place, limits: MediaLimits) -> Iterator[Frame]:
    with path.open("rb") as file, Image.open(file, formats=["GIF", "WEBP", "PNG", "AVIF"]) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            limits.check(path, pixels=image.width * image.height)  # a later frame may be larger
            image.load()
            milliseconds = image.info.get("duration") or 100  # the default of browsers
            yield Frame(lambda: np.asarray(files.to_rgb(files.upright(image))), None, Fraction(milliseconds) / 1000)


def _picture_stream(container: av.container.InputContainer, path: Place) -> av.VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # cover art is no video
            # Data workers already decode in parallel, and starting threads takes longer than decoding a few frames.
            files.codec_of(stream).thread_count = 1
            return stream
    raise InputError(f"{path} has no video stream: use it as audio, or give a file with pictures")


def _video_frames(path: Place, limits: MediaLimits) -> Iterator[Frame]:
    with files.open_container(path, limits) as (container, ending):
        stream = _picture_stream(container, path)
        unit, rate = Fraction(stream.time_base), _rate(stream)
        for frame in files.decoded(container, stream, ending):
            limits.check(path, pixels=_square_width(frame.width, stream) * frame.height)  # a later frame may be larger
            start = None if frame.pts is None else frame.pts * unit
            length = (frame.duration or 0) * unit or 1 / rate
            yield Frame(lambda frame=frame: _to_array(frame, stream), start, length)


def _rate(stream: av.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError("it does not say how many frames it shows a second")
    return Fraction(rate)


def _square_width(width: int, stream: av.VideoStream) -> int:
    return max(1, round(width * (stream.sample_aspect_ratio or 1)))


def _to_array(frame: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
    """Convert to RGB and apply the display matrix (a, b; c, d): x' = a x + c y, y' = b x + d y."""
    array = frame.to_ndarray(format="rgb24", width=_square_width(frame.width, stream), **_IN_ONE_THREAD)
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return array
    a, b, _, c, d = np.frombuffer(matrix, np.int32, count=5)
    if abs(a) + abs(d) < abs(b) + abs(c):
        array, a, d = array.swapaxes(0, 1), c, b
    return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _video_header(path: Place, limits: MediaLimits) -> Header:
    with files.open_container(path, limits) as (container, ending):
        stream = _picture_stream(container, path)
        limits.check(path, seconds=ending.stated or 0)
        codec, rate, unit = files.codec_of(stream), _rate(stream), Fraction(stream.time_base)
        pixels = _square_width(codec.width, stream) * codec.height
        shown: list[tuple[int | None, int | None]] = []
        keys: list[int | None] = []
        for packet in container.demux():
            ending.see(packet)
            if packet.stream.index == stream.index and packet.size and not packet.is_discard:
                shown.append((packet.pts, packet.duration))
                limits.check(path, frames=len(shown))
                if packet.is_keyframe:
                    keys.append(packet.pts)
        ending.check()
        timed = not TIMED.isdisjoint(container.format.name.split(",")) and all(time is not None for time, _ in shown)
        if not timed or len({time for time, _ in shown}) < len(shown) or min(keys, default=math.inf) > min(shown)[0]:
            return Header(pixels, [i / rate for i in range(len(shown))], len(shown) / rate)
        shown.sort()
        times, keys = [time for time, _ in shown], sorted(keys)
        starts = [(time - times[0]) * unit for time in times]
        end = starts[-1] + ((shown[-1][1] or 0) * unit or 1 / rate)
        return Header(pixels, starts, end, times, [keys[bisect_right(keys, time) - 1] for time in times])


def _seek_frames(
    path: Place, header: Header, chosen: Sequence[int], limits: MediaLimits
) -> dict[int, np.ndarray] | None:
    """Decode only the chosen frames, by index; None if frames contradict packets."""
    kept: dict[int, np.ndarray] = {}
    size = 0
    try:
        with files.open_container(path, limits) as (container, _):
            stream = _picture_stream(container, path)
            for key, indices in itertools.groupby(sorted(set(chosen)), lambda i: header.keys[i]):
                left = {header.times[i]: i for i in indices}
                container.seek(key, stream=stream)
                for frame in _frames_from_keyframe(container, stream):
                    limits.check(path, pixels=_square_width(frame.width, stream) * frame.height)
                    if frame.is_corrupt or frame.pts is None or frame.pts > max(left):
                        return None
                    if frame.pts in left:
                        array = kept[left.pop(frame.pts)] = _to_array(frame, stream)
                        size += array.nbytes
                        limits.check(path, bytes=size)
                    if not left:
                        break
                if left:
                    return None
    except av.FFmpegError:
        return None  # decoding in order reports the error
    return kept


def _frames_from_keyframe(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decode from the container's position, skipping packets before a keyframe, which would give broken frames."""
    for packet in itertools.dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream)):
        yield from packet.decode()
