"""Pairs of media and captions: tar shards and tables, into conversations whose media are read where they lie."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from anygpt.data import (
    ConversationDataset,
    DataSource,
    read_media,
    read_samples,
    write_audio,
    write_video,
)
from anygpt.data.formats.base import find_files
from anygpt.errors import InputError


def png(colour: str | tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def media(tmp_path) -> dict[str, bytes]:
    write_video(tmp_path / "a.mp4", np.zeros((6, 16, 16, 3), np.uint8), 10)
    write_audio(tmp_path / "a.wav", np.zeros((1, 800), np.float32), 16000)
    return {"mp4": (tmp_path / "a.mp4").read_bytes(), "wav": (tmp_path / "a.wav").read_bytes(), "png": png("red")}


# -- shards ----------------------------------------------------------------------------------------------


def test_shards_of_every_media_type_both_ways(tmp_path, media):
    path = shard(
        tmp_path / "00000.tar",
        {
            "00.txt": b"\xef\xbb\xbfa red square\n",
            "01.mp4": media["mp4"],
            "00.png": media["png"],  # the members of a sample need not stand together
            "00.json": json.dumps({"caption": "not this one", "key": "00"}).encode(),
            "01.json": json.dumps({"caption": "a dark clip"}).encode(),
            "sub/02.wav": media["wav"],
            "sub/02.txt": b"silence",
        },
    )
    samples = read_samples(path, task="comprehension")
    assert [sample.id for sample in samples] == ["00000/00", "00000/01", "00000/sub/02"]
    assert [sample.messages[0].content[1].text for sample in samples][:2] == [
        "Describe this image.",
        "Describe this video.",
    ]
    loaded = [ConversationDataset(samples, num_video_frames=2)[i].inputs for i in range(3)]
    assert loaded[0]["image"][0].getpixel((0, 0)) == (255, 0, 0)
    assert loaded[1]["video"][0].frames.shape == (2, 16, 16, 3)
    assert loaded[2]["audio"][0].waveform.shape == (1, 800)
    image, clip, _ = read_samples(path, task="generation")
    assert image.messages[0].content[0].text == "Make this image: a red square"
    assert image.messages[1].content[0].caption == "a red square"
    assert clip.messages[1].content[0].caption == "a dark clip"
    again = pickle.loads(pickle.dumps(image)).messages[1].content[0].path  # as for a worker
    assert again.open().read() == media["png"]


@pytest.mark.parametrize("pattern", ["{00..02}.tar", "*.tar", "{00,01,02}.tar", "0[0-2].tar", "**/0?.tar"])
def test_patterns_stand_for_several_shards(tmp_path, pattern):
    for i, colour in enumerate(("red", "blue", "green")):
        shard(tmp_path / f"0{i}.tar", {"x.png": png(colour), "x.txt": colour.encode()})
    dataset = ConversationDataset.from_files([DataSource(str(tmp_path / pattern), task="generation")])
    assert [sample.id for sample in dataset.samples] == ["00/x", "01/x", "02/x"]
    assert dataset[1].captions == {"image": ["blue"]}
    assert dataset[1].targets["image"][0].getpixel((0, 0)) == (0, 0, 255)


def test_patterns_are_checked(tmp_path):
    for pattern, message in (
        ("*.tar", "no file matches"),
        ("{0..3}.tar", "0.tar does not exist"),
        ("{3..1}.tar", "3.tar does not exist"),
        ("{0..3.tar", "braces .* cannot be expanded"),
        ("{0.." + "9" * 5000 + "}.tar", "braces .* cannot be expanded"),
    ):
        with pytest.raises(InputError, match=message):
            find_files(tmp_path / pattern)


def test_pairs_need_a_task_and_conversations_have_none(tmp_path):
    path = shard(tmp_path / "0.tar", {"x.png": png("red"), "x.txt": b"red"})
    with pytest.raises(InputError, match="task is None: give comprehension"):
        read_samples(path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="task is given"):
        read_samples(tmp_path / "a.jsonl", task="generation")
    with pytest.raises(InputError, match="columns is given"):
        read_samples(tmp_path / "a.jsonl", columns={"text": "x"})
    for setting in ({"media_root": tmp_path}, {"follow_links": True}):
        with pytest.raises(InputError, match=f"{next(iter(setting))} is given"):
            read_samples(path, task="generation", **setting)


# -- tables ----------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "c.png").write_bytes(png("green"))
    rows = {
        "img": [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": "b.png"}],
        "said": ["a red thing", "a blue thing"],
        "file": ["c.png", "c.png"],
        "raw": [png("white"), None],
        "question": ["Which?", "What?"],
        "n": [7, 8],
    }
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "raw": datasets.Value("binary"),
            "n": datasets.Value("int64"),
            **{name: datasets.Value("string") for name in ("said", "file", "question")},
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def colours(samples):
    parts = [part for sample in samples for _, part in sample.media()]
    return [read_media(part.type, part.path).getpixel((0, 0)) for part in parts]


def test_tables_on_disk_and_parquet(tmp_path, table):
    table.save_to_disk(str(tmp_path / "saved"))
    type_of_several = pytest.importorskip("datasets").DatasetDict
    type_of_several({"train": table}).save_to_disk(str(tmp_path / "one"))
    table.to_parquet(tmp_path / "a.parquet")
    columns = {"image": "img", "text": "said", "id": "n"}
    saved = [(tmp_path / name, "datasets") for name in ("saved", "one")]
    for path, format in (*saved, (tmp_path / "a.parquet", None)):
        samples = read_samples(path, format, columns=columns, task="generation")
        assert [sample.id for sample in samples] == ["7", "8"]
        assert [sample.messages[1].content[0].caption for sample in samples] == ["a red thing", "a blue thing"]
        assert colours(pickle.loads(pickle.dumps(samples))) == [(255, 0, 0), (0, 0, 255)]


def test_damaged_rows_of_a_table_are_faults(tmp_path, table):
    """Arrow hands on what it has mapped unseen: text that is none, places beyond the file's end."""
    table.save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"a red thing", b"a \xb9ed thing"))
    options = {"columns": {"image": "img", "text": "said"}, "task": "generation"}
    faults = []
    samples = read_samples(tmp_path / "saved", "datasets", faults=faults, **options)
    assert [sample.id for sample in samples] == ["saved-1"] and colours(samples) == [(0, 0, 255)]
    assert len(faults) == 1 and "saved[0] is damaged" in str(faults[0])
    with pytest.raises(InputError, match=r"saved\[0\] is damaged"):
        read_samples(tmp_path / "saved", "datasets", **options)


def test_tables_with_paths_bytes_prompts_and_text_alone(tmp_path, table):
    table.to_parquet(tmp_path / "a.parquet")

    def read(faults=None, task="comprehension", **columns):
        return read_samples(tmp_path / "a.parquet", columns=columns, task=task, faults=faults)

    assert colours(read(image="file", text="said")) == [(0, 128, 0)] * 2
    asked = read(image="img", text="said", prompt="question")
    assert [sample.messages[0].content[1].text for sample in asked] == ["Which?", "What?"]
    faults = []
    assert colours(read(faults, image="raw", text="said")) == [(255, 255, 255)]
    assert "has no 'path'" in str(faults[0]) and "[1]" in str(faults[0])
    assert [sample.media() for sample in read(text="said", prompt="question", task=None)] == [[], []]


@pytest.mark.parametrize("stored", ["abc", 5, ["a"], {"b": 1}])
def test_a_medium_whose_bytes_are_none(tmp_path, table, stored):
    """As in tables that were saved as JSON."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"img": {"bytes": stored, "path": "c.png"}, "said": "a thing"}) + "\n")
    options = {"columns": {"image": "img", "text": "said"}, "task": "generation"}
    with pytest.raises(InputError, match="media column of type struct"):
        list(read_samples(path, "datasets", **options))


def test_lists_of_media_have_media_and_a_caption_each(tmp_path, table):
    path = tmp_path / "lists.parquet"
    pq.write_table(pa.table({"img": [["c.png", "c.png"], []], "said": [["", "A", "B"], ["A"]]}), path)
    for task, counts in (("comprehension", [2]), ("generation", [])):
        faults = []
        samples = read_samples(path, columns={"image": "img", "text": "said"}, task=task, faults=faults)
        assert [len(sample.media()) for sample in samples] == counts
        assert "has an empty list of media" in str(faults.pop())
        assert not faults or "2 targets and 3 captions (1 blank)" in str(faults[0])


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view(), pa.null()])
def test_columns_of_other_types(tmp_path, table, kind):
    value = None if kind == pa.null() else "c.png" if kind == pa.string_view() else png("green")
    pq.write_table(pa.table({"img": pa.array([value], kind), "said": ["a"]}), tmp_path / "a.parquet")
    faults = []
    options = {"columns": {"image": "img", "text": "said"}, "task": "generation", "faults": faults}
    assert colours(read_samples(tmp_path / "a.parquet", **options)) == ([(0, 128, 0)] if value else [])
    assert bool(value) or "has no 'path'" in str(faults[0])


def test_names_with_marks_of_patterns_and_files_in_several_folders(tmp_path, table):
    columns = {"columns": {"image": "img", "text": "said"}, "task": "generation"}
    for name in ("a[1].parquet", "a1.parquet", "b/a*.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"img": ["c.png"], "said": [name]}), tmp_path / name)
    for name in ("a[1].parquet", "a1.parquet"):
        (sample,) = read_samples(tmp_path / name, **columns)
        assert sample.messages[1].content[0].caption == name
    with pytest.raises(InputError, match="the data files are in several folders: give media_root"):
        read_samples(tmp_path / "{a1,b/a*}.parquet", **columns)
    two = read_samples(tmp_path / "{a1,b/a*}.parquet", media_root=tmp_path, **columns)
    assert [sample.id for sample in two] == ["a1-0", "a*-0"]
    pq.write_table(pa.table({"img": ["c.png"] * 2, "said": ["a", " "]}), tmp_path / "a2.parquet")
    with pytest.raises(InputError, match=r"a2\.parquet\[1\]"):
        read_samples(tmp_path / "a[12].parquet", **columns | {"media_root": tmp_path})
    (tmp_path / "b" / "a0.parquet").write_bytes(b"PAR1xxxx")
    with pytest.raises(InputError, match=r"a0\.parquet cannot be read as a table"):
        read_samples(tmp_path / "b" / "*.parquet", **columns)


def test_columns_and_tables_are_checked(tmp_path, table):
    path = tmp_path / "a.parquet"
    table.to_parquet(path)
    for columns, message in (
        (None, "give columns"),
        ({"image": "img"}, "must give 'text'"),
        ({"image": "img", "video": "img", "text": "said"}, "one of image"),
        ({"image": "imge", "text": "said"}, "has no column 'imge'"),
        ({"imgae": "img", "text": "said"}, "did you mean 'image'"),
        ({"image": "n", "text": "said"}, "media column of type int64"),
        ({"image": "img", "text": "n"}, "the text must be a string, and is 7"),
    ):
        with pytest.raises(InputError, match=message):
            read_samples(path, columns=columns, task="generation")
    nested = tmp_path / "nested.parquet"
    pq.write_table(pa.table({"img": [[[b"a"]]], "said": ["a"]}), nested)
    with pytest.raises(InputError, match="media column of type list<"):  # and no object's repr
        read_samples(nested, columns={"image": "img", "text": "said"}, task="comprehension")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_samples(path, columns={"image": "img", "text": "said"}, task="generation")
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_samples(tmp_path, "datasets", columns={"image": "img", "text": "said"}, task="generation")
