"""WebDataset tar shards of media and captions, as written by img2dataset and video2dataset.

A sample is the members with one base name: a medium (`000012.jpg`), its caption (`000012.txt`, else the `caption` in
`000012.json`), and others, which are ignored. Shards are indexed once and never unpacked.
"""

import io
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from anygpt.data.formats.base import MAX_ROW_BYTES, Pair, Row
from anygpt.data.formats.json_files import parse_json
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA, media_type_of

# Names are split as in the `webdataset` library (`base_plus_ext` and `skip_meta`): a key, and after the base name's
# first dot a suffix. Other names are skipped, including hidden ones ("._x.jpg") in folders.
NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__($|/|[.])")
TEXTS, JSONS = ("txt", "text", "transcript"), ("json", "jsn")
BLOCK = 512
MAX_HEADER_BYTES = 1024**2  # room for long names; tarfile would read a header of any claimed size


@dataclass(frozen=True)
class TarMember(StoredMedium):
    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def open(self, mode: str = "rb") -> BinaryIO:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def shard_rows(shard: Path) -> Iterator[Row]:
    """Pairs of a shard, named `00000.tar[000012]`, with ids such as `00000/000012`."""
    samples: list[tuple[str, dict[str, TarMember | None]]] = []
    fault = None
    try:
        _index(shard, samples)
    except InputError as error:
        fault = error
    for key, members in samples:
        source = f"{shard}[{_printable(key)}]"
        try:
            value: Pair | InputError = _pair(members, key, source)
        except InputError as error:
            value = error
        yield Row(source, f"{shard.stem}/{_printable(key)}", value)
    if fault:  # the shard itself is damaged; the pairs before that place have been yielded
        yield Row(str(shard), shard.stem, fault)


def _index(shard: Path, samples: list[tuple[str, dict[str, TarMember | None]]]) -> None:
    """Fill in each key with `{suffix: member}`, in the shard's order; a member that occurs twice or is sparse is None.

    Members of a sample need not be adjacent, unless its key occurs again with the same suffixes. Links are not read, so
    a sample that needs one lacks a medium or a caption.
    """
    latest: dict[str, dict[str, TarMember | None]] = {}
    for info in _headers(shard):
        name = NAME.fullmatch(info.name)
        if not (info.isreg() or info.issym() or info.islnk()) or META.match(info.name) or not name:
            continue
        key, suffix = name[1].removeprefix("./"), name[2].lower()
        again = suffix in latest.get(key, ())
        if key not in latest or (again and samples[-1][0] != key):
            latest[key] = {}
            samples.append((key, latest[key]))
        if info.isreg():
            member = TarMember(shard, info.name, info.offset_data, info.size)
            latest[key][suffix] = None if suffix in latest[key] or info.issparse() else member


def _headers(shard: Path) -> Iterator[tarfile.TarInfo]:
    """Headers of all members; raises `InputError` for an invalid one, which tarfile would take for the end."""
    size, end = shard.stat().st_size, 0
    try:
        with _Guarded(shard) as guarded, tarfile.open(fileobj=guarded, mode="r:") as tar:
            while info := guarded.next_header(tar):
                tar.members = []  # tarfile would keep them all
                if info.size < 0 or info.offset < end:
                    raise tarfile.ReadError("a member has a negative size")
                end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
                if end > size and info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"it ends within {_printable(info.name)}")
                yield info
        with shard.open("rb") as file:
            file.seek(end)
            if not (block := file.read(BLOCK)):
                raise tarfile.ReadError("it has no end mark, so that members may be missing")
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"there is no header at byte {end:,}")
            while block := file.read(MAX_HEADER_BYTES):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("something follows its end mark, as if files were joined")
    except Exception as error:  # on broken headers tarfile raises many types
        raise InputError(
            f"{shard} is not a whole, uncompressed tar file, and only what comes before the fault is read: "
            f"{str(error) or type(error).__name__}"
        ) from error


class _Guarded(io.FileIO):
    """A file for tarfile that limits the size of a header with its extensions."""

    left = MAX_HEADER_BYTES

    def next_header(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        self.left = MAX_HEADER_BYTES
        return tar.next()

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header claims more than {MAX_HEADER_BYTES:,} bytes")
        self.left -= size
        return super().read(size)


def _pair(members: dict[str, TarMember | None], key: str, where: str) -> Pair:
    if bad := [suffix for suffix, member in members.items() if member is None]:
        raise InputError(f"{where}: its member .{_printable(bad[0])} occurs twice or is sparse: pack the shard again")
    if _printable(key) != key:
        raise InputError(f"{where}: the member's name is not UTF-8: rename it")
    kinds = {suffix: media_type_of(f"x.{suffix}") for suffix in members}
    media = [suffix for suffix, kind in kinds.items() if kind is not None]
    # prefer "jpg" to "seg.png": further fields of a sample have longer suffixes
    media = [suffix for suffix in media if f".{suffix}" in kinds[suffix].suffixes] or media
    if len(media) != 1:
        ends = _printable(", ".join(members))
        known = ", ".join(suffix for kind in MEDIA.values() for suffix in kind.suffixes)
        text = f"{where} must have one medium, and has {len(media)}: its members end in {ends}, media in {known}"
        raise InputError(f"{text}; links are not read")
    caption = None
    if name := _ending_in(members, TEXTS):
        try:
            caption = _read(members[name], where).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: the caption is not UTF-8: save it as UTF-8") from error
    elif name := _ending_in(members, JSONS):
        row = parse_json(_read(members[name], where), f"{where}: the member .{name}")
        caption = row.get("caption") if isinstance(row, dict) else None
    return Pair(kind=kinds[media[0]].name, medium=members[media[0]], text=caption)


def _ending_in(members: Collection[str], endings: tuple[str, ...]) -> str | None:
    """A suffix equal to one of `endings`, else the first whose last part is."""
    whole = [ending for ending in endings if ending in members]
    return next(iter(whole or [suffix for suffix in members if suffix.rpartition(".")[2] in endings]), None)


def _read(member: TarMember, where: str) -> bytes:
    if member.size > MAX_ROW_BYTES:
        raise InputError(f"{where}: {_printable(member.name)} has {member.size:,} bytes, more than any caption")
    return member.open().read()


def _printable(name: str) -> str:
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")[:300]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
