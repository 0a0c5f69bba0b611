"""Detection of truncated audio and video files, of which a decoder returns whatever is left.

FFmpeg marks a partially read packet as corrupt, most containers state their duration, an AVI its size, and an Ogg page
its length. Truncation without such a hint, such as a stream cut between two packets, is not detected.
"""

import math
import os
import re
import struct
from typing import BinaryIO

import av

from anygpt.errors import warn_once

STREAMED = 0x7F000000
"""Bytes. A program that writes to a pipe cannot fill in the header's size: sox and FFmpeg leave at least this, or 0."""
TOLERANCE, SHARE = 0.1, 0.02
"""Seconds, and share of the stated duration, by which the last packet may end early (codec delay, rounding)."""
SEARCHED = 64 * 2**20  # largest file, in bytes, whose sample tables are checked
TAIL = 2**16  # bytes, more than an Ogg page has
PACKING = 8  # most samples per byte of any codec (QuickTime's MACE 6:1 has six)


class Ending:
    """Tracks the packets of a container as they are demuxed, to check at the end whether any are missing."""

    def __init__(self, container: av.container.InputContainer, head: bytes, tail: bytes, name: str):
        self.container, self.head, self.tail, self.name = container, head, tail, name
        self.stated = self._stated_seconds()
        self.begin, self.end, self.longest = math.inf, -math.inf, 0.0
        self.corrupt = 0
        self.last_corrupt = False

    def _stated_seconds(self) -> float | None:
        """The stated duration; None where FFmpeg estimated it from the size, or an MPEG's timestamps."""
        if not self.container.duration or self.container.format.name in ("mpegts", "mpeg"):
            return None
        seconds = self.container.duration / av.time_base
        rates = [s.codec_context.bit_rate or 0 for s in self.container.streams if s.codec_context is not None]
        size = seconds * sum(rates) / 8
        estimated = size and abs(self.container.size - size) < 0.01 * size
        return None if estimated or size >= STREAMED else seconds

    def see(self, packet: av.Packet) -> None:
        time = packet.dts if packet.pts is None else packet.pts
        if not packet.size or packet.is_discard:
            return
        self.corrupt += packet.is_corrupt
        self.last_corrupt = packet.is_corrupt
        if time is not None:
            unit = float(packet.time_base)
            self.begin = min(self.begin, time * unit)
            self.end = max(self.end, (time + (packet.duration or 0)) * unit)
            self.longest = max(self.longest, (packet.duration or 0) * unit)

    def check(self) -> None:
        """Raise `ValueError` if the end is missing; to be called after the last packet."""
        if self.last_corrupt and not self._has_wrong_size():
            raise ValueError("it is truncated: its last packet is not whole")
        if self._is_short():
            raise ValueError("it is truncated: it is shorter than it states")
        if self.corrupt > self.last_corrupt:
            warn_once(f"{self.name} has {self.corrupt} damaged packets; what FFmpeg makes of them is used")
        if self.stated is None:
            warn_once(f"in {self.container.format.name} files that state no length, some cuts cannot be noticed")
        if self.stated is None or self.end == -math.inf:
            return
        there = max(self.end, self.end - self.begin)
        if self.stated - there > max(TOLERANCE, SHARE * self.stated, self.longest):
            raise ValueError(f"it is truncated: {there:.2f} of {self.stated:.2f} seconds are there")

    def _is_short(self) -> bool:
        """Whether an AVI, or the last page of an Ogg file, goes on behind the file's end."""
        if self.head.startswith(b"OggS"):
            page = self.tail[max(0, self.tail.rfind(b"OggS\0")) :]
            lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
            return page.startswith(b"OggS") and len(page) < 27 + max(1, len(lengths)) + sum(lengths)
        behind = int.from_bytes(self.head[4:8], "little") - self.container.size
        return re.match(rb"RIFF....AVI ", self.head, re.DOTALL) is not None and 0 < behind < STREAMED

    def _has_wrong_size(self) -> bool:
        """Whether a WAV or CAF states a wrong size, so that FFmpeg marks its last packet as corrupt."""
        if self.head.startswith(b"caff"):
            return b"data" + 8 * b"\xff" in self.head
        stated = int.from_bytes(self.head[4:8], "little")
        return self.head.startswith(b"RIFF") and not 0 < stated - self.container.size < STREAMED


def check_tables(file: BinaryIO, head: bytes) -> None:
    """Raise `ValueError` for an MP4 that claims more samples than it can hold: FFmpeg allocates for all at once."""
    size = file.seek(0, os.SEEK_END)
    if head[4:8] != b"ftyp" or size > SEARCHED:
        return
    file.seek(0)
    for found in re.finditer(rb"stsz\0\0\0\0(.{8})", file.read(), re.DOTALL):
        each, count = struct.unpack(">II", found[1])
        if (each or 4) * count > PACKING * size:
            raise ValueError(f"its table of samples claims {count:,} of {each:,} bytes")
