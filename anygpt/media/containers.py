"""What media files claim of themselves, read before a decoder sees them.

Decoders pass over a missing tail without a word, and would give a shorter sound or clip; and they make room for
whatever a header says that there is. What ends within a packet is found by `anygpt.media.packets`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from anygpt.media.packets import cut_within, id3_end, read_at

MAX_SCANS = 100
"""Of a JPEG. Progressive ones have about ten; each is as much work as the whole picture, and may be a few bytes."""
MAX_SAMPLES = 10**7
"""Of a picture track, 46 hours at 60 a second; FFmpeg makes room for all of them when it opens the file."""
SOUND_PACKING = 8
"""Samples a byte of the sounds that QuickTime counts so: at most six, of MACE 6:1."""
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")


def check_whole(file: BinaryIO) -> None:
    """Compares what a file claims with what is there.

    Args:
        file: open for reading.

    Raises:
        ValueError: it is empty or truncated, or claims what it cannot hold.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError("it is empty")
    file.seek(0)
    head = file.read(512)
    if head[4:8] == b"ftyp":
        _check_samples(file, size)
    if head.startswith(b"\xff\xd8\xff"):
        file.seek(0)
        chunks = iter(lambda: file.read(2**20), b"")
        if (scans := sum(chunk.count(b"\xff\xda") for chunk in chunks)) > MAX_SCANS:
            raise ValueError(f"it has {scans:,} scans, more than {MAX_SCANS}")
    if (unit := cut_within(file, head, size)) is not None:
        raise ValueError(f"it is truncated, and ends within {unit}")
    if (stated := _stated_size(file, head, size)) > size:
        raise ValueError(f"it is truncated, {size:,} bytes of {stated:,}")


def _stated_size(file: BinaryIO, head: bytes, size: int) -> int:
    """How many bytes the outermost parts of a file claim; `size` where they do not say."""
    if head.startswith(b"RIFF") and len(head) >= 12:  # WAV, AVI, WebP
        stated = int.from_bytes(head[4:8], "little")
        # Streamed files do not know their length; some writers count the header of 8 bytes twice.
        return size if stated in (0, 0xFFFFFFFF) else stated
    if head[4:8] == b"ftyp":
        return max((end for _, _, end in _boxes(file, 0, size)), default=size)
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska_size(head, size)
    if head.startswith(b"FORM"):  # AIFF
        return int.from_bytes(head[4:8], "big") + 8
    if head.startswith(b".snd") and len(head) >= 12:
        start, length = struct.unpack(">II", head[4:12])
        return size if length == 0xFFFFFFFF else start + length
    if head.startswith(_W64) and len(head) >= 24:
        return int.from_bytes(head[16:24], "little")
    if head.startswith(b"caff"):
        return _caf_size(file, size)
    if head.startswith(_ASF):
        return _asf_size(file, head, size)
    if head.startswith((b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")):
        return _mp3_size(file, head, size)
    return size


def _matroska_size(head: bytes, size: int) -> int:
    """Of the EBML header and the segment that follows (RFC 8794)."""
    length, start = _variable_length(head, 4)
    if length is None or head[start + length : start + length + 4] != b"\x18\x53\x80\x67":
        return size
    segment, begin = _variable_length(head, start + length + 4)
    return size if segment is None else begin + segment


def _variable_length(head: bytes, position: int) -> tuple[int | None, int]:
    """An EBML number and where it ends; None where it is not known or not there."""
    width = 9 - head[position].bit_length() if position < len(head) else 9
    if width > 8 or position + width > len(head):
        return None, position
    value = int.from_bytes(head[position : position + width], "big") & (1 << 7 * width) - 1
    return (None if value == (1 << 7 * width) - 1 else value), position + width


def _asf_size(file: BinaryIO, head: bytes, size: int) -> int:
    """Up to the end of the data, without the index behind; files that were written as a stream do not know it."""
    properties = head[head.find(_ASF_FILE) :]
    start = int.from_bytes(head[16:24], "little")
    data = read_at(file, min(start, size), 24)
    if not properties.startswith(_ASF_FILE) or len(properties) < 92 or properties[88] & 1 or data[:16] != _ASF_DATA:
        return size
    return start + int.from_bytes(data[16:24], "little")


def _caf_size(file: BinaryIO, size: int) -> int:
    position = 8
    while position + 12 <= size:
        file.seek(position + 4)
        length = int.from_bytes(file.read(8), "big", signed=True)
        if length < 0:  # the last one, of unknown length
            return size
        position += 12 + length
    return position


def _mp3_size(file: BinaryIO, head: bytes, size: int) -> int:
    """What the Xing or Info header in the first frame says, where there is one."""
    start = id3_end(head)
    frame = read_at(file, start, 200)
    found = max(frame.find(b"Xing"), frame.find(b"Info"))
    if not frame.startswith(b"\xff") or not 0 < found <= 40:
        return size
    flags = int.from_bytes(frame[found + 4 : found + 8], "big")
    place = found + 8 + (4 if flags & 1 else 0)  # behind the number of frames
    return start + int.from_bytes(frame[place : place + 4], "big") if flags & 2 else size


# -- MP4 and MOV -----------------------------------------------------------------------------------------


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, start of the content and end of each box from `start` on; the last one may claim to end beyond `end`."""
    while start + 8 <= end:
        file.seek(start)
        box = file.read(16)
        length, content = int.from_bytes(box[:4], "big"), start + 8
        if length == 1:  # the length follows in 64 bits
            length, content = int.from_bytes(box[8:16], "big"), start + 16
        if length < content - start:  # 0: up to the end
            return
        yield box[4:8], content, start + length
        start += length


def _check_samples(file: BinaryIO, size: int) -> None:
    """The tables of samples, for whose entries FFmpeg makes room at once.

    Raises:
        ValueError: more samples than the file has bytes, or than a picture track may have.
    """
    for _, start, end in _inside(file, [b"moov", b"trak", b"mdia"], 0, size):
        pictures = any(
            kind == b"hdlr" and read_at(file, content + 8, 4) == b"vide"
            for kind, content, _ in _boxes(file, start, end)
        )
        for kind, content, _ in _inside(file, [b"minf", b"stbl", b"stsz"], start, end):
            each, count = struct.unpack(">II", read_at(file, content + 4, 8).ljust(8, b"\0"))
            # QuickTime counts the samples of sounds as if they were not compressed, a byte each.
            if each * count > (size if pictures else SOUND_PACKING * size) or (pictures and count > MAX_SAMPLES):
                raise ValueError(f"its {kind.decode()} claims {count:,} samples of {each:,} bytes")


def _inside(file: BinaryIO, path: list[bytes], start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """All boxes at a path of types."""
    for kind, content, until in _boxes(file, start, end):
        if kind == path[0]:
            if len(path) == 1:
                yield kind, content, min(until, end)
            else:
                yield from _inside(file, path[1:], content, min(until, end))
