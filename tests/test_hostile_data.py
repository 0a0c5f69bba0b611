"""Broken and hostile data: an error that names the place, or a counted skip; no crash, no hang, no memory beyond 2 GB.

The whole file runs under a limit on address space a little above what the process has, so that a bomb is a MemoryError.
"""

import io
import json
import os
import random
import resource
import struct
import tarfile
import wave
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from anygpt.data import BadSample, ConversationDataset, DataSource, read_media, read_samples, write_audio, write_image
from anygpt.data.formats.tables import check_row_groups
from anygpt.errors import InputError
from anygpt.media.writing import write_video


@pytest.fixture(autouse=True)
def two_gigabytes_at_most():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 1024**3, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"):
        write_image(folder / name, picture) if name in ("a.png", "a.jpg") else picture.save(folder / name)
    picture.save(folder / "b.gif", save_all=True, append_images=[picture.rotate(90)] * 3)
    picture.save(folder / "b.webp", save_all=True, append_images=[picture.rotate(90)] * 3)
    write_video(folder / "a.mp4", np.zeros((6, 16, 16, 3), np.uint8), 10)
    write_audio(folder / "a.wav", 0.1 * np.ones((1, 800), np.float32), 16000)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KINDS = {".mp4": "video", ".wav": "audio"}


def kind_of(name: str) -> str:
    return KINDS.get(Path(name).suffix, "image")


# -- media -----------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def wav(channels=1, rate=16000, bits=16, tag=1, data=b"\0" * 64) -> bytes:
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * channels * bits // 8 % 2**32, channels * bits // 8, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def nan_sound() -> bytes:
    return wav(bits=32, tag=3, data=struct.pack("<8f", *[0.0] * 7, float("nan")))


HOSTILE_MEDIA = {
    "nothing.png": b"",
    "nothing.mp4": b"",
    "nothing.wav": b"",
    "text.png": b"<html>404</html>",
    "text.mp4": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "concat.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "text.wav": b"no sound",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "bomb.png": png(40_000, 40_000, zlib.compress(b"\0" * 10_000_000)),
    "absurd.png": png(2**31 - 1, 2**31 - 1),
    "no_width.png": png(0, 10),
    "thin.png": png(2**31 - 1, 1),
    "short.png": png(500, 500, zlib.compress(b"\0" * 100)),
    "nan.wav": nan_sound(),
    "no_samples.wav": wav(data=b""),
    "no_rate.wav": wav(rate=0),
    "no_channels.wav": wav(channels=0),
    "odd_codec.wav": wav(tag=0x7777),
    "many_channels.wav": wav(channels=30_000),
    "box.mp4": struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4sQ", 1, b"mdat", 2**62),
    "self.mp4": struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4s", 8, b"moov") * 1000,
}


@pytest.mark.parametrize("name", HOSTILE_MEDIA)
def test_hostile_media(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE_MEDIA[name])
    with pytest.raises(InputError, match=name) as error:
        read_media(kind_of(name), tmp_path / name)
    assert "memory" not in str(error.value).lower()  # that it ran out of


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_the_largest_images_that_are_allowed(tmp_path, mode):
    Image.new(mode, (8192, 8192)).save(tmp_path / "a.png", compress_level=1)
    assert read_media("image", tmp_path / "a.png").size == (8192, 8192)


def test_mislabelled_media(tmp_path, good):
    """What a file is, is told from its content: a JPEG called .png is an image, a sound called .mp4 is no video."""
    (tmp_path / "a.png").write_bytes(good["a.jpg"])
    assert read_media("image", tmp_path / "a.png").size == (16, 16)
    for content, kind in (("a.wav", "image"), ("a.wav", "video"), ("a.png", "audio"), ("a.png", "video")):
        (tmp_path / "x").write_bytes(good[content])
        with pytest.raises(InputError, match="x"):
            read_media(kind, tmp_path / "x")


DAMAGED = ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff", "a.mp4", "a.wav", "b.gif", "b.webp"]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_media_give_media_or_an_error(tmp_path, good, name):
    """Bytes changed, cut out and cut off at random: decoders pass over some, and no other exception comes out."""
    draw = random.Random(name)
    path = tmp_path / name
    refused = 0
    for _ in range(40):
        content = bytearray(good[name])
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        cut = draw.randrange(len(content))
        path.write_bytes(content[:cut] if draw.random() < 0.4 else content)
        for kind in {kind_of(name), "video" if name in ("a.gif", "b.gif", "b.webp") else "image"}:
            try:
                read_media(kind, path)
            except InputError as error:
                assert name in str(error) and "memory" not in str(error).lower()
                refused += 1
    assert refused


def test_strange_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "folder.png", "loop.png", "zero.png", "x" * 300 + ".png"):
        with pytest.raises(InputError):
            read_media("image", tmp_path / name)


# -- manifests -------------------------------------------------------------------------------------------


def line(user="hello", **more) -> str:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "hi"}]
    return json.dumps({"messages": messages, **more})


def image(path) -> list[dict]:
    return [{"type": "image", "path": path}]


HOSTILE_LINES = {
    "deep lists": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "deep but closed": '{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "many digits": '{"id": ' + "9" * 100_000 + "}",
    "infinite": '{"id": Infinity}',
    "not a number": line(id=float("nan")),
    "long": '{"id": "' + "x" * 20_000_000 + '"}',
    "wrong types": '{"messages": {"0": []}}',
    "null": "null",
    "number": "17",
    "role is a list": '{"messages": [{"role": [], "content": "x"}]}',
    "part is null": line([None]),
    "type is an object": line([{"type": {}}]),
    "unknown key of a megabyte": json.dumps({"x" * 1_000_000: 1}),
    "no bytes": line("\ud800"),
    "path of a megabyte": line(image("x" * 1_000_000)),
    "name beyond the file system's": line(image("x" * 300)),
    "upwards": line(image("../" * 1000 + "etc/passwd")),
    "absolute": line(image("/dev/zero")),
    "zero byte": line(image("a\0b")),
    "loop": line(image("loop/x")),
    "link": line(image("out")),
    "pipe": line(image("pipe")),
    "file address": line(image("file:///etc/passwd")),
    "empty id": line(id=""),
    "id is a list": line(id=[]),
    "no caption": '{"messages": [{"role": "assistant", "content": [{"type": "image", "path": "a.png"}]}]}',
}


@pytest.mark.parametrize("what", HOSTILE_LINES)
def test_hostile_lines(tmp_path, what):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "out").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([line(id="first"), HOSTILE_LINES[what], line(id="last")]))
    with pytest.raises(InputError) as caught:
        read_samples(path)
    assert f"{path}:2" in str(caught.value) and len(str(caught.value)) < 2000
    faults: list[InputError] = []
    assert [sample.id for sample in read_samples(path, faults=faults)] == ["first", "last"]
    assert len(faults) == 1


@pytest.mark.parametrize("what", ["deep lists", "deep objects", "many digits", "long", "null", "wrong types"])
@pytest.mark.parametrize("format", ["nextgpt", "llava", "alpaca", "videochat"])
def test_hostile_lists(tmp_path, what, format):
    path = tmp_path / "d.json"
    path.write_text(f"[{HOSTILE_LINES[what]}]")
    with pytest.raises(InputError, match=r"d\.json(:1|\[0\])"):
        read_samples(path, format)


def test_random_rows(tmp_path):
    """Rows of the right keys with values of any type: a sample or an error in every format."""
    draw = random.Random(0)
    keys = ["id", "messages", "conversations", "image", "input_image", "output_image", "image_captions", "QA", "video"]
    keys += ["instruction", "output", "role", "content", "from", "value", "type", "text", "path", "q", "a", "i"]
    words = [
        "",
        "x",
        "user",
        "assistant",
        "human",
        "gpt",
        "<image>",
        "image",
        "text",
        "../x",
        None,
        True,
        -1,
        1.5,
        "\0",
    ]

    def value(depth: int):
        form = draw.random()
        if depth == 0 or form < 0.4:
            return draw.choice(words)
        if form < 0.7:
            return [value(depth - 1) for _ in range(draw.randrange(3))]
        return {draw.choice(keys): value(depth - 1) for _ in range(draw.randrange(5))}

    path = tmp_path / "d.json"
    path.write_text(json.dumps([{k: value(4) for k in draw.sample(keys, 4)} for _ in range(500)]))
    for format in ("nextgpt", "llava", "alpaca", "videochat"):
        faults: list[InputError] = []
        samples = read_samples(path, format, faults=faults)
        assert len(samples) + len(faults) == 500
    path = path.rename(tmp_path / "d.jsonl")
    path.write_text("\n".join(json.dumps({"messages": [value(4) for _ in range(2)]}) for _ in range(500)))
    faults = []
    assert len(read_samples(path, faults=faults)) + len(faults) == 500


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, put in, taken out, or cut off."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        place, what = draw.randrange(len(changed) + 1), draw.random()
        if what < 0.6:
            changed[place : place + 1] = bytes([draw.choice([0, 255, draw.randrange(256)])])
        elif what < 0.75:
            changed[place:place] = draw.randbytes(draw.randint(1, 16))
        elif what < 0.9:
            del changed[place : place + draw.randint(1, 64)]
        else:
            del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize("format", ["jsonl", "nextgpt", "llava", "alpaca", "videochat", "webdataset"])
def test_damaged_manifests_give_samples_or_errors(tmp_path, good, format):
    """Also of their media; faults say in which file they are."""
    (tmp_path / "a.png").write_bytes(good["a.png"])
    said = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    row = {
        "jsonl": json.loads(line(image("a.png"), id="1")),
        "nextgpt": {"input_image": "a.png", "conversations": said},
        "llava": {"image": "a.png", "conversations": said},
        "alpaca": {"instruction": "a", "input": "", "output": "b"},
        "videochat": {"image": "a.png", "QA": [{"i": "x", "q": "y", "a": "z"}]},
    }.get(format)
    content = json.dumps(row if format == "jsonl" else [row] * 3).encode()
    content = pair("x") + pair("y") + END if format == "webdataset" else content
    path = tmp_path / {"jsonl": "d.jsonl", "webdataset": "d.tar"}.get(format, "d.json")
    draw, refused = random.Random(format), 0
    for _ in range(150):
        path.write_bytes(damaged(content, draw))
        faults: list[InputError] = []
        try:
            samples = read_samples(path, format, faults=faults, task="generation" if format == "webdataset" else None)
            for _, part in (use for sample in samples for use in sample.media()):
                read_media(part.type, part.path)
        except InputError as error:
            faults.append(error)
        assert all(path.name in str(fault) or "a.png" in str(fault) for fault in faults), faults
        refused += bool(faults)
    assert refused > 20


def test_bad_media_are_skipped_and_counted(tmp_path):
    for name, content in HOSTILE_MEDIA.items():
        (tmp_path / name).write_bytes(content)
    parts = [[{"type": kind_of(name), "path": name}] for name in HOSTILE_MEDIA]
    (tmp_path / "d.jsonl").write_text("\n".join(line(part) for part in parts))
    dataset = ConversationDataset.from_files([DataSource(str(tmp_path / "d.jsonl"))], on_bad_sample="skip")
    for i, name in enumerate(HOSTILE_MEDIA):
        bad = dataset[i]
        assert isinstance(bad, BadSample) and name in bad.reason and f"d.jsonl:{i + 1} (sample" in bad.reason


# -- shards ----------------------------------------------------------------------------------------------


def member(name="x.png", content=b"", **attributes) -> bytes:
    """One member with its header, as it stands in a tar file; `attributes` of `TarInfo` may lie about it."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)


def pair(name: str) -> bytes:
    return member(f"{name}.png", png(4, 4, zlib.compress(b"\0" * 52))) + member(f"{name}.txt", b"a caption")


def sparse_map(count: int) -> bytes:
    """A member whose first blocks list its holes, as GNU tar's PAX format 1.0 has it."""
    info = tarfile.TarInfo("x.png")
    info.pax_headers = {f"GNU.sparse.{key}": value for key, value in (("major", "1"), ("minor", "0"), ("name", "x"))}
    content = b"%d\n" % (count // 2) + b"1\n" * 8 * count
    content += b"\0" * (-len(content) % 512)
    info.size = len(content)
    return info.tobuf(tarfile.PAX_FORMAT) + content


END = b"\0" * 1024
OUT = "../../etc/passwd"
HOSTILE_SHARDS = {
    "absolute name": member("/etc/x.png", b"1") + END,
    "name upwards": member("../../x.png", b"1") + END,
    "symbolic link": member("x.png", type=tarfile.SYMTYPE, linkname=OUT) + member("x.txt", b"c") + END,
    "links alone": member("x.png", type=tarfile.LNKTYPE, linkname="good.png") + END,
    "hard link": member("x.png", type=tarfile.LNKTYPE, linkname=OUT) + member("x.txt", b"c") + END,
    "device": member("x.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5) + member("x.txt", b"c") + END,
    "sparse": member("x.png", type=tarfile.GNUTYPE_SPARSE) + member("x.txt", b"c") + END,
    "huge size": member("x.png", b"1", size=2**60),
    "negative size": member("x.png", b"1", size=-512) + END,
    "very negative size": member("x.png", b"1", size=-(2**40)) + END,
    "huge header": member("x", type=tarfile.XHDTYPE, size=2**40) + END,
    "negative header": member("x", type=tarfile.GNUTYPE_LONGNAME, size=-512) + END,
    "endless map of holes": sparse_map(200_000) + END,
    "many headers": member("x", b"y" * 512, type=tarfile.GNUTYPE_LONGNAME) * 3000 + END,
    "broken header": b"\x01" * 512 + END,
    "cut off": member("x.png", b"1" * 4000)[:2000],
    "cut off between members": b"",
    "joined": END + pair("x") + END,
    "header cut off": member("x.png", b"1")[:200],
    "twice": member("x.png", b"1") + member("x.png", b"2") + member("x.txt", b"c") + END,
    "two media": member("x.png", b"1") + member("x.wav", b"2") + member("x.txt", b"c") + END,
    "no medium": member("x.txt", b"c") + END,
    "no caption": member("x.png", b"1") + END,
    "empty caption": member("x.png", b"1") + member("x.txt", b" \n") + END,
    "caption not UTF-8": member("x.png", b"1") + member("x.txt", b"\xff\xfe") + END,
    "caption of 20 MB": member("x.png", b"1") + member("x.txt", b"c" * 20_000_000) + END,
    "deep JSON": member("x.png", b"1") + member("x.json", b"[" * 100_000) + END,
    "caption is a list": member("x.png", b"1") + member("x.json", b'{"caption": []}') + END,
    "name not UTF-8": member("x\udcff.png", b"1") + member("x\udcff.txt", b"c") + END,
}


@pytest.mark.parametrize("what", HOSTILE_SHARDS)
@pytest.mark.cpu_seconds(20)
def test_hostile_shards(tmp_path, what):
    """The fault names the shard; what stands before it is still given."""
    path = tmp_path / "s.tar"
    path.write_bytes(pair("good") + HOSTILE_SHARDS[what])
    faults: list[InputError] = []
    assert [sample.id for sample in read_samples(path, task="generation", faults=faults)] == ["s/good"]
    assert faults and all("s.tar" in str(fault) and len(str(fault)) < 2000 for fault in faults)
    str(faults[0]).encode()  # it can be printed
    with pytest.raises(InputError, match=r"s\.tar"):
        read_samples(path, task="generation")
    assert [file.name for file in tmp_path.iterdir()] == ["s.tar"]


def test_a_sparse_file_behind_a_huge_header(tmp_path):
    """The claimed bytes are there, as a hole: 8 GB that no one may read."""
    path = tmp_path / "s.tar"
    path.write_bytes(pair("good") + member("x", type=tarfile.XHDTYPE, size=2**33))
    os.truncate(path, 2**33 + 10_000)
    with pytest.raises(InputError, match="a header claims"):
        read_samples(path, task="generation")


@pytest.mark.parametrize("name", ["{00000..99999999}.tar", "{0..-99999999}.tar", "{0..9}" * 12 + ".tar"])
@pytest.mark.cpu_seconds(20)
def test_braces_for_too_many_files(tmp_path, name):
    with pytest.raises(InputError, match="more than 100,000 files"):
        read_samples(tmp_path / name, task="generation")


def test_other_files_as_shards(tmp_path, good):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.png"))
    for content in (b"", b"x", good["a.png"], packed.getvalue(), b"\0" * 100_000):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(InputError, match=r"s\.tar"):
            read_samples(tmp_path / "s.tar", task="generation")


def test_hostile_media_in_shards(tmp_path):
    path = tmp_path / "s.tar"
    content = b"".join(member(name, data) + member(f"{Path(name).stem}.txt", b"c") for name, data in UNIQUE.items())
    path.write_bytes(content + END)
    samples = read_samples(path, task="comprehension")
    assert len(samples) == len(UNIQUE)
    for sample in samples:
        with pytest.raises(InputError, match=r"s\.tar\["):
            ConversationDataset([sample])[0]


UNIQUE = {f"{i}{Path(name).suffix}": content for i, (name, content) in enumerate(HOSTILE_MEDIA.items())}


def test_a_shard_that_shrinks_while_it_is_used(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(pair("good") + END)
    dataset = ConversationDataset(read_samples(path, task="comprehension"))
    dataset[0]
    os.truncate(path, 540)
    with pytest.raises(InputError, match="cannot be read as an image"):
        dataset[0]


def test_a_sound_that_goes_on(tmp_path):
    """Two hours of silence: refused by its header, before anything is decoded."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(b"\x80" * 8000 * 7200)
    with pytest.raises(InputError, match="more than max_seconds"):
        read_media("audio", tmp_path / "a.wav")


# -- tables ----------------------------------------------------------------------------------------------


def repeated(value, count: int) -> pa.Table:
    """One value many times, which a dictionary says in a few bytes."""
    said = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))
    return pa.table({"said": said, "question": said})


BOMBS = {
    "by a dictionary": (lambda: repeated("y" * 2**22, 1000), {"store_schema": False}),
    "by what values share": (
        lambda: pa.table({"said": ["y" * 60_000 + str(i) for i in range(6000)]}),
        {"use_dictionary": False, "column_encoding": {"said": "DELTA_BYTE_ARRAY"}},
    ),
    "by packing": (lambda: pa.table({"said": ["y" * 600_000] * 600}), {"use_dictionary": False, "compression": "zstd"}),
    "by run lengths": (lambda: pa.table({"n": pa.array(np.zeros(60_000_000), pa.float64())}), {}),
}


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.cpu_seconds(60)
def test_row_groups_that_are_far_larger_in_memory(tmp_path, what):
    table, options = BOMBS[what]
    path = tmp_path / ("t.PARQUET" if what == "by packing" else "t.parquet")
    pa.parquet.write_table(table(), path, row_group_size=10**9, **options)
    assert path.stat().st_size < 5 * 2**20
    with pytest.raises(InputError, match=r"(?i)t\.parquet: row group 0, of .* rows, takes more than 335,544,320 bytes"):
        read_samples(path, "datasets", columns={"text": "said", "prompt": "question"})


def test_row_groups_that_are_as_large_in_the_file(tmp_path, monkeypatch):
    """A few values are repeated, many are not, and of the lengths nothing is known before they are decoded."""
    monkeypatch.setattr("anygpt.data.formats.tables.MAX_ROW_GROUP", 2**20)
    texts = [random.Random(i).randbytes(2000).hex() for i in range(1000)] + ["a caption"] * 1000
    pa.parquet.write_table(pa.table({"said": texts, "more": [[text] * 2 for text in texts]}), tmp_path / "t.parquet")
    check_row_groups(tmp_path / "t.parquet")


@pytest.mark.cpu_seconds(60)
def test_row_groups_of_categories(tmp_path):
    """Read as dictionaries, a whole one with each few rows; and one long value, of which one row is decoded at once."""
    labels = pa.array([f"kind {i} of a thing" for i in range(5000)])
    kinds = pa.DictionaryArray.from_arrays(pa.array(np.arange(60_000) % 5000, pa.int32()), labels)
    pa.parquet.write_table(pa.table({"said": kinds}), tmp_path / "t.parquet")
    check_row_groups(tmp_path / "t.parquet")
    pa.parquet.write_table(repeated("y" * 2**28, 16), tmp_path / "t.parquet", store_schema=False)
    with pytest.raises(InputError, match="row group 0, of 16 rows"):
        check_row_groups(tmp_path / "t.parquet")
