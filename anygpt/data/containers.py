"""What media files claim of themselves, read before a decoder sees them.

Decoders pass over a missing tail without a word, and would give a shorter sound or clip; and they make room for
whatever a header says that there is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

MAX_SCANS = 100
"""Of a JPEG. Progressive ones have about ten; each is as much work as the whole picture, and may be a few bytes."""
MAX_SAMPLES = 10**7
"""Of a picture track, 46 hours at 60 a second; FFmpeg makes room for all of them when it opens the file."""
MAX_TAGS = 10**6
"""Of an FLV, that are walked through to look for a cut: some hours."""
SOUND_PACKING = 8
"""Samples a byte of the sounds that QuickTime counts so: at most six, of MACE 6:1."""
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes, the largest that there are
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_TS_PACKETS = ((188, 0), (192, 4))
"""Of MPEG-TS: their length, and where in them 0x47 stands. Discs have a time of four bytes before each."""
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
    if head.startswith(b"GIF8") and b"\x00\x3b" not in _tail(file, size, 1024):
        raise ValueError("it is truncated, and ends within a frame")
    if head.startswith(b"OggS") and not _ogg_ends(_tail(file, size, _OGG_PAGE)):
        raise ValueError("it is truncated, and does not end with the last page of its stream")
    if head.startswith(b"FLV") and not _flv_ends(file, size):
        raise ValueError("it is truncated, and ends within a tag")
    for length, sync in _TS_PACKETS:
        if _is_transport_stream(head, length, sync) and not _transport_stream_ends(file, size, length, sync):
            raise ValueError("it is truncated, and ends within a packet")
    if (stated := _stated_size(file, head, size)) > size:
        raise ValueError(f"it is truncated, {size:,} bytes of {stated:,}")


def _tail(file: BinaryIO, size: int, count: int) -> bytes:
    file.seek(max(0, size - count))
    return file.read(count)


def _ogg_ends(tail: bytes) -> bool:
    """Whether the last page is whole, and marked as the last of its stream (RFC 3533)."""
    start = tail.rfind(b"OggS")
    page = tail[start:] if start >= 0 else b""
    if len(page) < 27 or not page[5] & 4:
        return False
    lengths = page[27 : 27 + page[26]]
    return len(lengths) == page[26] and 27 + page[26] + sum(lengths) <= len(page)


def _flv_ends(file: BinaryIO, size: int) -> bool:
    """Whether the last tag is whole: by its length, which stands behind it, or else, as not all writers do that right,
    by a walk through all tags."""
    tag = int.from_bytes(_tail(file, size, 4), "big")
    start = size - 4 - tag
    if tag >= 11 and start >= 0 and int.from_bytes(_at(file, start + 1, 3), "big") + 11 == tag:
        return True
    position = int.from_bytes(_at(file, 5, 4), "big") + 4
    for _ in range(MAX_TAGS):
        if position >= size:
            break
        tag_head = _at(file, position, 4)
        if tag_head[0] & 0x1F not in (8, 9, 18):  # no sound, picture or script: something else from here on
            return True
        end = position + 11 + int.from_bytes(tag_head[1:], "big")
        if len(tag_head) < 4 or end > size:
            return False
        position = end + 4
    return True


def _is_transport_stream(head: bytes, length: int, sync: int) -> bool:
    """By the first three packets (ISO/IEC 13818-1): 0x47, and three bytes on a flag that is never 00."""
    heads = [head[start : start + 4] for start in range(sync, sync + 3 * length, length)]
    others = head.startswith((b"GIF", b"BM", b"\xff"))  # may have a grey of 0x47 there
    return not others and all(len(one) == 4 and one[0] == 0x47 and one[3] & 0x30 for one in heads)


def _transport_stream_ends(file: BinaryIO, size: int, length: int, sync: int) -> bool:
    """Whether the last packet is whole, or something else follows it: padding, or packets that lie otherwise."""
    rest = size % length
    last, before = (_at(file, start + sync, 1) for start in (size - rest, size - rest - length))
    return not (rest > sync and last == before == b"G")


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
    data = _at(file, min(start, size), 24)
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
    start = 0
    if head.startswith(b"ID3") and len(head) >= 10:
        start = 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
    file.seek(start)
    frame = file.read(200)
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
            kind == b"hdlr" and _at(file, content + 8, 4) == b"vide" for kind, content, _ in _boxes(file, start, end)
        )
        for kind, content, _ in _inside(file, [b"minf", b"stbl", b"stsz"], start, end):
            each, count = struct.unpack(">II", _at(file, content + 4, 8).ljust(8, b"\0"))
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


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)
