"""What media files claim and what is there: tails that are missing, tables and canvases that lie, odd tags."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio.fifo import AudioFifo
from PIL import Image

from anygpt.data import read_media
from anygpt.errors import InputError, warn_once
from anygpt.media.files import Audio, MediaLimits, open_container
from anygpt.media.writing import write_video

SOUNDS = {
    "a.opus": "libopus",
    "c.avi": "mp3",
    "a.mp3": "mp3",
    "a.aiff": "pcm_s16be",
    "a.au": "pcm_s16be",
    "a.w64": "pcm_s16le",
    "a.caf": "pcm_s16le",
    "b.mkv": "flac",
    "a.mp2": "mp2",
    "b.flv": "aac",
    "a.aac": "aac",
    "a.mpg": "mp2",
}
UNTOLD = ("a.mp2", "a.mpg", "b.mpg", "a.vob", "a.wmv", "a.ts", "a.m2ts")
CLIPS = {
    "a.mkv": "libx264",
    "a.webm": "libvpx-vp9",
    "a.avi": "mpeg4",
    "a.flv": "flv1",
    "a.wmv": "mpeg4",
    "a.ts": "libx264",
    "a.m2ts": "libx264",
    "b.mpg": "mpeg2video",
    "a.vob": "mpeg2video",
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def encode_clip(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in noise(20, 64, 64, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def encode_sound(
    path: Path, codec: str, rate: int = 48_000, bit_rate: int = 64_000, seconds: int = 1, **options: str
) -> None:
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(
            np.sin(np.arange(seconds * rate)[None] * 0.1, dtype=np.float32), "fltp", "mono"
        )
        frame.rate, frame.pts = rate, 0
        fifo = AudioFifo()
        for piece in av.AudioResampler(format=stream.format.name, layout="mono", rate=rate).resample(frame):
            fifo.write(piece)
        while (piece := fifo.read(stream.codec_context.frame_size or 1024, partial=True)) is not None:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("name", [*SOUNDS, *CLIPS, "a.gif"])
def test_a_missing_tail_is_an_error(tmp_path, name):
    """FFmpeg and Pillow would give what there is, but they tell: by an error, a corrupt packet or frame, a stated
    length. Of some streams nothing tells when they are cut between two packets; these give less."""
    path = tmp_path / name
    kind = "audio" if name in SOUNDS else "video"
    if name == "a.gif":
        pictures = [Image.fromarray(frame) for frame in noise(20, 64, 64, 3)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:])
    else:
        encode_sound(path, SOUNDS[name], seconds=3) if kind == "audio" else encode_clip(path, CLIPS[name])
    all_there = length(read_media(kind, path))
    content = path.read_bytes()
    for share in (0.3, 0.5, 0.8):
        path.write_bytes(content[: int(len(content) * share) + 10])  # MPEG-TS shows it only within a packet
        if name in UNTOLD:
            with contextlib.suppress(InputError):
                assert length(read_media(kind, path)) < (share + 0.15) * all_there
        else:
            with pytest.raises(InputError, match=f"{name} cannot be read as"):
                read_media(kind, path)


def length(medium) -> int:
    return medium.waveform.shape[1] if isinstance(medium, Audio) else len(medium.frames)


def test_what_only_looks_cut_off(tmp_path):
    """Padding behind, bytes lost midway, lengths that a writer got wrong, an index that was not sent, other files."""
    for name in ("a.ts", "a.m2ts", "a.flv", "a.wmv"):
        encode_clip(tmp_path / name, CLIPS[name])
    packets = (tmp_path / "a.ts").read_bytes()
    variants = {"padded.ts": packets + bytes(100), "lost.ts": packets[: 188 * 50] + packets[188 * 50 + 60 :]}
    variants["padded.m2ts"] = (tmp_path / "a.m2ts").read_bytes() + b"\xff" * 100
    tags = (tmp_path / "a.flv").read_bytes()
    variants |= {"padded.flv": tags + bytes(100), "open.flv": tags[:-4], "wrong.flv": tags[:-4] + struct.pack(">I", 9)}
    whole = (tmp_path / "a.wmv").read_bytes()
    start = struct.unpack("<Q", whole[16:24])[0]
    variants["no_index.wmv"] = whole[: start + struct.unpack("<Q", whole[start + 16 : start + 24])[0]]
    assert len(variants["no_index.wmv"]) < len(whole)
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        assert len(read_media("video", tmp_path / name).frames) >= 19, name
    encode_clip(tmp_path / "a.mpg", "mpeg2video")
    packs = (tmp_path / "a.mpg").read_bytes()
    for name, behind in {"open.mpg": b"", "ended.mpg": b"\0\0\1\xb9", "padded.mpg": bytes(100)}.items():
        (tmp_path / name).write_bytes(packs + behind)
        assert len(read_media("video", tmp_path / name).frames) == 20, name
    encode_sound(tmp_path / "a.mp3", "mp3", write_xing="0", id3v2_version="0")
    frames = (tmp_path / "a.mp3").read_bytes()
    for name, behind in {"v1": b"TAG" + b"a" * 125, "ape": b"APETAGEX" + bytes(24)}.items():
        (tmp_path / f"{name}.mp3").write_bytes(frames + behind)
        assert read_media("audio", tmp_path / f"{name}.mp3").waveform.shape[1] >= 48_000, name
    Image.new("RGB", (1440, 1080), (71, 71, 71)).save(tmp_path / "a.bmp")
    assert read_media("image", tmp_path / "a.bmp").size == (1440, 1080)


def test_limits_above_those_of_ffmpeg(tmp_path):
    """Its option has an end; beyond, it would not look at the streams, and the header's check would find nothing."""
    encode_sound(tmp_path / "a.aac", "aac")
    for pixels in (2**31, math.inf):
        with open_container(tmp_path / "a.aac", MediaLimits(max_pixels=pixels)) as (container, _):
            assert container.streams.audio[0].sample_rate == 48_000


def test_samples_that_are_counted_as_if_they_were_not_compressed(tmp_path):
    """QuickTime's own ADPCM: 64 samples in 34 bytes, each said to be one."""
    path = tmp_path / "a.mov"
    encode_sound(path, "adpcm_ima_qt")
    content = bytearray(path.read_bytes())
    for table, behind, values in ((b"stsz", 8, (1, 48_000)), (b"stts", 12, (48_000, 1)), (b"stsc", 16, (48_000,))):
        place = content.index(table) + behind
        content[place : place + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    path.write_bytes(content)
    assert len(content) < 48_000
    assert read_media("audio", path).waveform.shape == (1, 48_000)


def test_lengths_that_are_not_known_are_no_fault(tmp_path, caplog):
    """As in files that were written as a stream; a warning says that cuts are not noticed."""
    warn_once.cache_clear()
    encode_clip(tmp_path / "a.mkv", "libx264")
    content = (tmp_path / "a.mkv").read_bytes()
    place = content.index(b"\x18\x53\x80\x67") + 4
    (tmp_path / "a.mkv").write_bytes(content[:place] + b"\x01" + b"\xff" * 7 + content[place + 8 :])
    assert len(read_media("video", tmp_path / "a.mkv").frames) == 20
    encode_sound(tmp_path / "a.au", "pcm_s16be")
    content = (tmp_path / "a.au").read_bytes()
    (tmp_path / "a.au").write_bytes(content[:8] + b"\xff" * 4 + content[12:])
    assert read_media("audio", tmp_path / "a.au").waveform.shape == (1, 48_000)
    assert "in au files that state no length, some cuts cannot be noticed" in caplog.text


@pytest.mark.parametrize(("each", "count"), [(1, 85_000_000), (0, 85_000_000), (2**31, 2**31)])
def test_a_table_of_samples_that_are_not_there(tmp_path, each, count):
    """FFmpeg would make room for all of them when it opens the file, 4 GB here."""
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((6, 16, 16, 3), np.uint8), 10)
    content = bytearray(path.read_bytes())
    place = content.index(b"stsz")
    content[place + 8 : place + 16] = struct.pack(">II", each, count)
    path.write_bytes(content)
    for kind in ("video", "audio"):
        with pytest.raises(InputError, match="claims"):
            read_media(kind, path)


@pytest.mark.parametrize("suffix", [".webp", ".png", ".jpg"])
def test_a_hole_behind_a_picture(tmp_path, suffix):
    """A few bytes on disk; some of Pillow's plugins would read all of the file."""
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (16, 16)).save(path)
    os.truncate(path, 2**30)
    with pytest.raises(InputError, match="more than max_bytes"):
        read_media("image", path)


def test_scans_without_end(tmp_path):
    """A progressive JPEG whose last scan comes again and again, each time as much work as the picture."""
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert read_media("image", path).size == (64, 64)
    path.write_bytes(content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 200 + content[-2:])
    with pytest.raises(InputError, match="scans"):
        read_media("image", path)


def test_a_clip_behind_a_picture(tmp_path):
    """Phones append one to a JPEG ("motion photo"); its bytes are no scans."""
    buffer = io.BytesIO()
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 16)).save(thumbnail, "JPEG")
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG", comment=thumbnail.getvalue())
    path = tmp_path / "a.jpg"
    path.write_bytes(buffer.getvalue() + b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 200)
    assert read_media("image", path).size == (64, 64)


def gif(width: int, height: int, frames: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frames + b";"


def gif_frame(x: int, y: int) -> bytes:
    """One pixel."""
    control = b"\x21\xf9\x04" + struct.pack("<BHB", 5, 10, 0) + b"\0"
    return control + b"," + struct.pack("<HHHHB", x, y, 1, 1, 0) + b"\x02\x02\x44\x01\x00"


def test_a_small_animation_on_a_large_canvas(tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes(gif(16, 16, gif_frame(0, 0) * 2))
    assert read_media("video", path).frames.shape == (2, 16, 16, 3)
    path.write_bytes(gif(8192, 8192, gif_frame(0, 0) * 3000))
    with pytest.raises(InputError, match="too much to decode"):
        read_media("video", path, 1)
    path.write_bytes(gif(16, 16, gif_frame(0, 0) + gif_frame(12_999, 12_999)))  # the second frame makes it larger
    with pytest.raises(InputError, match="more than max_pixels"):
        read_media("video", path, 1, whole=True)


def test_frames_that_grow(tmp_path):
    """The header says 16 × 16; what comes later is checked, too."""
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "rgb24"
        for index, side in enumerate((16, 16, 64)):
            buffer = io.BytesIO()
            Image.new("RGB", (side, side)).save(buffer, "PNG")
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, index * 100, index * 100, True
            container.mux(packet)
    for wanted in ({}, {"num_frames": 3}, {"num_frames": 1, "whole": True}):
        with pytest.raises(InputError, match="more than max_pixels"):
            read_media("video", path, limits=MediaLimits(max_pixels=1000), **wanted)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads memory from /proc")
def test_the_cover_of_a_sound_is_not_decoded_beyond_the_limit(tmp_path):
    """FFmpeg decodes it when it opens the file: 100 megapixels here, in some kilobytes of the tag."""
    path = tmp_path / "a.mp3"
    encode_sound(path, "mp3")
    width, height = 10_000, 10_000
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (1 + width)), 1)
    picture = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        picture += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    frame = b"\0image/png\0\x03\0" + picture
    frame = b"APIC" + struct.pack(">I", len(frame)) + b"\0\0" + frame
    length = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + length + frame + path.read_bytes())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_memory()
    assert read_media("audio", path).waveform.shape[1] >= 48_000
    assert peak_memory() < before + 64 * 2**20


def peak_memory() -> int:
    """Of this process, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_odd_tags_beside_the_orientation(tmp_path):
    """A date that is a number: Pillow cannot write such EXIF again, and does not have to."""
    tags = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHIf", 0x132, 11, 1, 1.0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2) + tags + struct.pack("<I", 0)
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_media("image", tmp_path / "a.jpg").size == (4, 8)


ONE = 1 << 16
MATRICES = {  # (a, b, c, d) of x' = a x + c y, y' = b x + d y, and where the white corner goes
    "as it is": ((ONE, 0, 0, ONE), (0, 0)),
    "mirrored": ((-ONE, 0, 0, ONE), (0, 1)),
    "upside down": ((ONE, 0, 0, -ONE), (1, 0)),
    "half a turn": ((-ONE, 0, 0, -ONE), (1, 1)),
    "a quarter turn to the right": ((0, ONE, -ONE, 0), (0, 1)),
    "a quarter turn to the left": ((0, -ONE, ONE, 0), (1, 0)),
    "transposed": ((0, ONE, ONE, 0), (0, 0)),
    "transposed the other way": ((0, -ONE, -ONE, 0), (1, 1)),
    "no matrix at all": ((0, 0, 0, 0), (0, 0)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_clips_are_turned_and_mirrored(tmp_path, name):
    path = tmp_path / "a.mp4"
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :16, :24] = 255
    write_video(path, frames, 10)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    (a, b, c, d), (row, column) = MATRICES[name]
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    for wanted in (None, 2):
        frame = read_media("video", path, wanted).frames[0]
        assert frame.shape == ((48, 32, 3) if a == 0 and b else (32, 48, 3))
        height, width = frame.shape[:2]
        places = [[frame[h * height // 4, w * width // 4].mean() > 128 for w in (1, 3)] for h in (1, 3)]
        assert places == [[(h, w) == (row, column) for w in (0, 1)] for h in (0, 1)]
