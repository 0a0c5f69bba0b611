"""Whether media that are streams of packets end with a whole one.

Such files do not say how long they are, and a decoder takes what is there; but one that was cut off nearly always ends
within a packet. One that was cut between two cannot be told from a whole one.
"""

from __future__ import annotations

from typing import BinaryIO

MAX_TAGS = 10**6
"""Of an FLV, that are walked through to look for a cut: some hours."""
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes, the largest that there are
_TS_PACKETS = ((188, 0), (192, 4))
"""Of MPEG-TS: their length, and where in them 0x47 stands. Discs have a time of four bytes before each."""
_PACK, _LAST = 0xBA, 0xB9
"""Start codes of MPEG program streams: of a pack, and of the end."""
_PS_TAIL = 2**18  # bytes in which a pack begins: at least every 0.7 s
_FRAMES = 4  # of sound, one behind the other, that are no accident
_TAIL = 2**14  # bytes, of more than that many


def cut_within(file: BinaryIO, head: bytes, size: int) -> str | None:
    """What a file ends in the middle of, in words; None where it is whole, or no such stream.

    Args:
        file: open for reading.
        head: its first 512 bytes.
        size: its bytes.
    """
    if head.startswith(b"GIF8") and b"\x00\x3b" not in read_at(file, size - 1024, 1024):
        return "a frame"
    if head.startswith(b"OggS") and not _ogg_ends(read_at(file, size - _OGG_PAGE, _OGG_PAGE)):
        return "its stream, before the page that is marked as the last"
    if head.startswith(b"FLV") and not _flv_ends(file, size):
        return "a tag"
    for length, sync in _TS_PACKETS:
        if _is_transport_stream(head, length, sync) and not _transport_stream_ends(file, size, length, sync):
            return "a packet"
    if head.startswith(b"\0\0\1\xba") and not _program_stream_ends(read_at(file, size - _PS_TAIL, _PS_TAIL)):
        return "a packet"
    if frame_length(read_at(file, id3_end(head), 6)) and not _sound_ends(read_at(file, size - _TAIL, _TAIL)):
        return "a frame"
    return None


def read_at(file: BinaryIO, position: int, count: int) -> bytes:
    """Bytes of a file from a position on, or from its beginning where that lies before it."""
    file.seek(max(0, position))
    return file.read(count)


def id3_end(head: bytes) -> int:
    """Where a tag of ID3v2 at the beginning of a file ends; 0 where there is none."""
    tagged = head.startswith(b"ID3") and len(head) >= 10
    return 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(head[6:10])) if tagged else 0


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
    tag = int.from_bytes(read_at(file, size - 4, 4), "big")
    start = size - 4 - tag
    if tag >= 11 and start >= 0 and int.from_bytes(read_at(file, start + 1, 3), "big") + 11 == tag:
        return True
    position = int.from_bytes(read_at(file, 5, 4), "big") + 4
    for _ in range(MAX_TAGS):
        if position >= size:
            break
        tag_head = read_at(file, position, 4)
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
    last, before = (read_at(file, start + sync, 1) for start in (size - rest, size - rest - length))
    return not (rest > sync and last == before == b"G")


def _program_stream_ends(tail: bytes) -> bool:
    """Whether the last packet is whole, from the last pack on (ISO/IEC 13818-1), or something else follows it."""
    place = tail.rfind(b"\0\0\1\xba")
    while 0 <= place <= len(tail) - 4 and tail.startswith(b"\0\0\1", place):
        code, rest = tail[place + 3], tail[place + 4 : place + 14]
        if code == _LAST:
            return True
        if code == _PACK:
            newer = rest[:1] and rest[0] >> 6 == 1
            if len(rest) < (10 if newer else 8):
                return False
            place += 14 + (rest[9] & 7) if newer else 12
        elif code < _PACK:  # of what packets hold
            return True
        else:
            place += 6 + int.from_bytes(rest[:2], "big")
    return place <= len(tail)


def _sound_ends(tail: bytes) -> bool:
    """Whether the last frame of MPEG audio or ADTS is whole, or something else follows it."""
    for tag, length in ((b"TAG", 128), (b"APETAGEX", 32)):  # behind the sound
        if tail[-length:].startswith(tag):
            return True
    for start in range(len(tail)):
        place, count, kind = start, 0, tail[start : start + 2]
        while tail.startswith(kind, place) and (length := frame_length(tail[place : place + 6])):
            place, count = place + length, count + 1
        if count >= _FRAMES:
            return place <= len(tail)
    return True


def frame_length(header: bytes) -> int:
    """Bytes of a frame of MPEG audio (ISO/IEC 11172-3) or ADTS (13818-7), by its first six; 0 if it is none."""
    if len(header) < 6 or header[0] != 0xFF or header[1] < 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # 3 is MPEG-1, 2 MPEG-2, 0 MPEG-2.5
    if layer == 4:
        adts = header[1] & 0xF6 == 0xF0
        return int.from_bytes(header[3:6], "big") >> 5 & 0x1FFF if adts else 0
    rate, bits = header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or rate == 3 or bits in (0, 15):
        return 0
    kilobits = _KILOBITS[version == 3, layer if version == 3 or layer == 1 else 2][bits - 1]
    samples_a_second = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    padding = header[2] >> 1 & 1
    if layer == 1:
        return (12_000 * kilobits // samples_a_second + padding) * 4
    return (72_000 if layer == 3 and version != 3 else 144_000) * kilobits // samples_a_second + padding


_KILOBITS = {
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""A second, by the number in the header less one, of MPEG-1 or not, and of a layer; layer 3 of the latter is as 2."""
