"""Data files into samples: the JSON formats, and the message of every fault."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from anygpt.data import ContentPart, Message, Sample, read_samples
from anygpt.data.formats import tables
from anygpt.data.formats.json_files import list_rows
from anygpt.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A media root with four (empty) files; reading a data file looks only at whether they exist."""
    for name in ("a.jpg", "b.jpg", "a.wav", "a.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def jsonl(folder: Path, *rows: dict) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def nextgpt(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def row(user="hello", assistant="hi", **more) -> dict:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, **more}


def talk(human: str, gpt: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}], **more}


def image(name="a.jpg", **more) -> dict:
    return {"type": "image", "path": name, **more}


# -- jsonl -----------------------------------------------------------------------------------------------


def test_jsonl_gives_messages_with_resolved_media(folder):
    path = jsonl(
        folder,
        row(
            [image(), {"type": "text", "text": "Sound?"}],
            [{"type": "audio", "path": "a.wav", "caption": "a horn"}],
            id="7",
        ),
        row(),
    )
    first, second = read_samples(path)
    assert first == Sample(
        id="7",
        messages=(
            Message("user", (ContentPart("image", path=folder / "a.jpg"), ContentPart("text", text="Sound?"))),
            Message("assistant", (ContentPart("audio", path=folder / "a.wav", caption="a horn"),)),
        ),
        source=f"{path}:1",
    )
    assert second.id == "data-1"
    assert second.messages[0].content == (ContentPart("text", text="hello"),)


def test_blank_lines_bom_crlf_and_number_ids_are_accepted(folder):
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(id=1)).encode() + b"\r\n\r\n" + json.dumps(row()).encode())
    assert [(s.id, s.source) for s in read_samples(path)] == [("1", f"{path}:1"), ("data-1", f"{path}:3")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mesages": []}, r"'mesages' is not known: did you mean 'messages'\?"),
        ([1], "must be a JSON object"),
        ({"messages": []}, "at least one message"),
        (row(id=""), "'id' is empty"),
        (row(id=True), "'id' must be a string, and is True"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "assistent", "content": "x"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "'content' must be a string or a list of parts"),
        (row(assistant=""), r"messages\[1\]: is empty"),
        (row(assistant="\n"), r"messages\[1\]: is empty"),
        (row([{"type": "imge", "path": "a.jpg"}]), "did you mean 'image'"),
        (row([{"type": "image", "pth": "a.jpg"}]), "did you mean 'path'"),
        (row([{"type": "text"}]), "'text' must be a string, and is missing"),
        (row([{"type": "text", "text": "x", "path": "a.jpg"}]), "'path' is not known"),
        (row([{"type": "image"}]), "has no 'path'"),
        (row([image(7)]), "'path' must be a string, and is 7"),
        (row([image("")]), "is not a file name"),
        (row([image("a\0.jpg")]), "is not a file name"),
        (row("\ud83d"), "lone surrogate"),
        (row([image(caption="a cat")]), "has a 'caption', which only a target"),
        (row(assistant=[image()]), "has no 'caption'"),
        (row(assistant=[image(caption="  ")]), "has no 'caption'"),
        (row(assistant=[{"type": "image", "caption": "a cat"}]), "has no 'path'"),
        ({"messages": [{"role": "system", "content": [image()]}]}, "a system message holds text only"),
        (row([image("https://example.com/a.jpg")]), "URLs are not fetched"),
        (row([image("data:image/png;base64,AAAA")]), "URLs are not fetched"),
        (row([image("../secret.jpg")]), "not inside the media root"),
        (row([image("x/../../secret.jpg")]), "not inside the media root"),
        (row([image("/etc/passwd")]), "not inside the media root"),
        (row([image("..")]), "not inside the media root"),
    ],
)
def test_a_bad_row_is_an_error_with_its_line(folder, bad, message):
    path = jsonl(folder, row(), bad)
    with pytest.raises(InputError, match=message) as caught:
        read_samples(path)
    assert f"{path}:2" in str(caught.value)


def test_links_may_not_lead_out_of_the_media_root(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.jpg").touch()
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "sub").symlink_to(outside)
    (folder / "inner.jpg").symlink_to(folder / "a.jpg")
    for name in ("link.jpg", "sub/secret.jpg"):
        with pytest.raises(InputError, match="not inside the media root"):
            read_samples(jsonl(folder, row([image(name)])))
    (sample,) = read_samples(jsonl(folder, row([image("inner.jpg")])))
    assert sample.messages[0].content[0].path == folder / "a.jpg"


def test_a_neighbour_with_the_same_prefix_is_outside(folder):
    (folder / "media").mkdir()
    (folder / "media2").mkdir()
    (folder / "media2" / "x.jpg").touch()
    with pytest.raises(InputError, match="not inside the media root"):
        read_samples(jsonl(folder, row([image("../media2/x.jpg")])), media_root=folder / "media")


def test_missing_media_are_counted_and_the_first_is_named(folder):
    path = jsonl(folder, row([image()]), row([image("x.jpg"), image("y.jpg")], id="two"), row([image("x.jpg")]))
    with pytest.raises(
        InputError, match=rf"{path}:2 \(sample 'two'\): .*x\.jpg does not exist or is not a file \(2 media files"
    ):
        read_samples(path)
    (folder / "sub.jpg").mkdir()
    with pytest.raises(InputError, match="does not exist or is not a file"):
        read_samples(jsonl(folder, row([image("sub.jpg")])))


def test_faults_are_collected_and_the_good_rows_are_given(folder):
    path = jsonl(folder, row(id="a"), row(id=["a"]), row([image("x.jpg")]), {}, row(id="z"))
    with path.open("a") as file:
        file.write("{broken\n")
    faults = []
    assert [sample.id for sample in read_samples(path, faults=faults)] == ["a", "z"]
    assert [re.search(r"jsonl:(\d)", str(fault))[1] for fault in faults] == ["2", "3", "4", "6"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (b'{"messages": [\n', r"data\.jsonl:1 is not valid JSON"),
        (b"\n\n{]\n", r"data\.jsonl:3 is not valid JSON: .* at column 2"),
        (b'{"id": "\xff"}\n', r"data\.jsonl:1 is not UTF-8 \(byte 0xff\)"),
        (b"[" * 100_000, "is not readable JSON|is not valid JSON"),
        (b"9" * 5000, "is not readable JSON"),
        (b'{"id": "a", "messages": [], "id": "b"}\n', r"data\.jsonl:1 has the key 'id' more than once"),
    ],
)
def test_files_that_are_not_jsonl(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_key_that_stands_twice(tmp_path, name):
    """The row before and the row behind are read."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    good = [json.dumps({"id": name, "conversations": turns}) for name in "az"]
    bad = '{"id": "b", "conversations": [{"from": "human", "value": "a", "value": "c"}]}'
    rows = [good[0], bad, good[1]]
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else "[" + ",\n".join(rows) + "]")
    faults = []
    assert [sample.id for sample in read_samples(tmp_path / name, format="nextgpt", faults=faults)] == ["a", "z"]
    (fault,) = faults
    assert f"{name}:2 has the key 'value' more than once" in str(fault)


def test_a_json_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Places and the limit of a row hold across pieces; blanks and faults in each row cost no memory and no time."""
    monkeypatch.setattr("anygpt.data.formats.json_files.MAX_ROW_BYTES", 200)
    monkeypatch.setattr("anygpt.data.formats.json_files.BLOCK", 61)
    path = tmp_path / "data.json"
    good = [{"k": "é\n" * (i % 60)} for i in range(300)]
    path.write_text("\ufeff[" + ",\n\n".join(json.dumps(row, ensure_ascii=False) for row in good) + "\n]", "utf-8")
    assert [row.value for row in list_rows(path)] == good
    path.write_text("[1," + " " * 5000 + "2 x]")
    with pytest.raises(InputError, match=r"data\.json:1 .* at column 5006"):
        list(list_rows(path))
    path.write_text("[1, [" + "[], " * 100 + "2]]")
    with pytest.raises(InputError, match=r"data\.json:1 is longer than 200 bytes"):
        list(list_rows(path))


@pytest.mark.cpu_seconds(30)
def test_many_rows_with_a_key_that_stands_twice(tmp_path):
    (tmp_path / "data.json").write_text("[" + ",\n".join(['{"a": 1, "a": 2}'] * 100_000) + "]")
    *_, last = list_rows(tmp_path / "data.json")
    assert "data.json:100000 has the key 'a' more than once" in str(last.value)


@pytest.mark.parametrize("name", ["table.csv", ""])
def test_a_table_that_was_rewritten_is_read_anew(tmp_path, name):
    file, read = tmp_path / "table.csv", []
    for text in ("one", "two", "three"):
        file.write_text(f"question,answer\na,{text}\n")
        os.utime(file, (1, 1))  # as rsync and tar set it
        (sample,) = read_samples(tmp_path / name, "datasets", columns={"prompt": "question", "text": "answer"})
        read.append(sample.messages[1].content[0].text)
    assert read == ["one", "two", "three"]


def test_tables_of_a_glob_without_rows_are_passed_over(tmp_path):
    columns = {"prompt": "question", "text": "answer"}
    (tmp_path / "a.csv").write_text("question,answer\na,b\n")
    for name, text in (("b.csv", "question,answer\n"), ("c.csv", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="holds no samples"):
            read_samples(tmp_path / name, "datasets", columns=columns)
    assert [sample.id for sample in read_samples(tmp_path / "*.csv", "datasets", columns=columns)] == ["a-0"]


def test_a_folder_of_tables_has_one_split(tmp_path):
    (tmp_path / "validation.csv").write_text("question,answer\na,b\n")
    assert len(tables._load(tmp_path)) == 1
    (tmp_path / "train.csv").write_text("question,answer\nc,d\n")
    with pytest.raises(InputError, match=r"several splits \(train, validation\): name the files of one"):
        tables._load(tmp_path)
    columns = {"prompt": "question", "text": "answer"}
    assert [sample.id for sample in read_samples(tmp_path / "validation*", "datasets", columns=columns)] == [
        "validation-0"
    ]


def test_no_table_of_a_folder_is_left_out(tmp_path):
    """Of those in a subfolder, of a split's name, of another format."""
    for name in ("a.csv", "sub/b.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("question,answer\na,b\n")
    assert len(tables._load(tmp_path)) == 2
    for name, content in (("c-dev.csv", "question,answer\nc,d\n"), ("d.jsonl", '{"question": "a", "answer": "b"}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=r"is read without \d of its tables, such as .*: name the files"):
            tables._load(tmp_path)
        (tmp_path / name).unlink()


def test_the_file_the_format_and_the_media_root_are_checked(folder):
    path = jsonl(folder, row())
    with pytest.raises(InputError, match="does not exist"):
        read_samples(folder / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"is not a file \(format 'datasets' reads a folder"):
        read_samples(folder)
    assert len(read_samples(folder / "da*.jsonl")) == 1
    for name, pack, message in (
        ("data.jsonl.gz", gzip.compress, "gzip-compressed: unpack it"),
        ("packed.jsonl", gzip.compress, "gzip-compressed: unpack it"),
        ("wide.jsonl", lambda content: content.decode().encode("utf-16"), "UTF-16: save it as UTF-8"),
    ):
        (folder / name).write_bytes(pack(path.read_bytes()))
        with pytest.raises(InputError, match=f"{name} is {message}"):
            read_samples(folder / name)
    with pytest.raises(InputError, match="did you mean 'jsonl'"):
        read_samples(path, format="json1")
    with pytest.raises(InputError, match="cannot be told from its suffix"):
        read_samples(path.rename(folder / "data.txt"))
    assert len(read_samples(folder / "data.txt", format="jsonl")) == 1
    with pytest.raises(InputError, match=r"media root .* is not a folder"):
        read_samples(folder / "data.txt", format="jsonl", media_root=folder / "nowhere")


# -- NExT-GPT --------------------------------------------------------------------------------------------


def test_nextgpt_comprehension_and_generation_rows(folder):
    path = nextgpt(
        folder,
        talk("<image>\nWhat is it?", "a cat", input_image="a.jpg"),
        talk(
            "Draw a cat",
            "Sure! <image>",
            output_image="a.jpg",
            image_captions="a cat",
            image_caption_embeddings="a.npy",
        ),
    )
    comprehension, generation = read_samples(path)
    assert (comprehension.id, comprehension.source) == ("rows-0", f"{path}[0]")
    assert comprehension.messages[0].content == (
        ContentPart("image", path=folder / "a.jpg"),
        ContentPart("text", text="What is it?"),
    )
    assert generation.messages[1].content == (
        ContentPart("text", text="Sure! "),
        ContentPart("image", path=folder / "a.jpg", caption="a cat"),
    )


def test_nextgpt_several_turns_media_and_types_in_order(folder):
    turns = [
        {"from": "system", "value": "Write <image> where a picture goes."},
        {"from": "human", "value": "<image><image>\nand <audio>", "input_modality": "image"},
        {"from": "gpt", "value": "One: <image>\n\nTwo: <video>"},
        {"from": "human", "value": "More"},
        {"from": "gpt", "value": "<image>"},
    ]
    media = {
        "input_image": ["a.jpg", "b.jpg"],
        "input_audio": "a.wav",
        "output_image": ["b.jpg", "a.jpg"],
        "image_captions": ["B", "A"],
        "output_video": "a.mp4",
        "video_captions": ["V"],
    }
    (sample,) = read_samples(nextgpt(folder, {"id": 5, "conversations": turns, **media}))
    shown = [[part.text or (part.path.name, part.caption) for part in m.content] for m in sample.messages]
    assert sample.id == "5"
    assert shown == [
        ["Write <image> where a picture goes."],
        [("a.jpg", None), ("b.jpg", None), "and ", ("a.wav", None)],
        ["One: ", ("b.jpg", "B"), "\nTwo: ", ("a.mp4", "V")],
        ["More"],
        [("a.jpg", "A")],
    ]


def test_nextgpt_inputs_without_a_marker_open_the_first_human_turn(folder):
    (sample,) = read_samples(nextgpt(folder, talk("What is it?", "a cat", input_image="a.jpg")))
    assert [part.type for part in sample.messages[0].content] == ["image", "text"]


def test_nextgpt_takes_the_turns_own_caption_where_the_row_has_none(folder):
    gpt = {"from": "gpt", "value": "<audio>", "caption": "a horn", "output_modality": "audio"}
    rows = {"conversations": [{"from": "human", "value": "Honk"}, gpt], "output_audio": "a.wav"}
    (sample,) = read_samples(nextgpt(folder, rows))
    assert sample.messages[1].content[0].caption == "a horn"


def test_nextgpt_looks_in_the_conventional_folders_too(folder):
    (folder / "images").mkdir()
    (folder / "a.jpg").rename(folder / "images" / "a.jpg")
    path = nextgpt(folder, talk("<image>", "a cat", input_image="a.jpg"))
    found = [read_samples(path, media_root=root)[0].messages[0].content[0].path for root in (None, folder / "images")]
    assert found == [folder / "images" / "a.jpg"] * 2
    (folder / "a.jpg").touch()  # what lies in the root itself comes first
    assert read_samples(path)[0].messages[0].content[0].path == folder / "a.jpg"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (talk("<image><image>", "x", input_image="a.jpg"), "hold 2 '<image>' marker.* names 1 file"),
        (talk("<image>", "x"), "hold 1 '<image>' marker.* names 0 file"),
        (talk("x", "done", output_image="a.jpg", image_captions="A"), "gpt turns hold 0 '<image>' marker"),
        (talk("x", "<image>", output_image="a.jpg"), "holds 0 caption"),
        (talk("x", "<image>", output_image="a.jpg", image_captions=["A", "B"]), "holds 2 caption"),
        (talk("x", "<audio>", audio_captions=["A"]), "'audio_captions' but no 'output_audio'"),
        ({"conversations": [{"from": "human", "value": "x", "caption": "lost"}]}, "caption 'lost' of a turn"),
        ({"conversations": [{"from": "gpt", "value": "x", "caption": "lost", "output_modality": "text"}]}, "'lost'"),
        (talk("x", "y", input_image=3), "'input_image' must be a string"),
        (talk("x", "y", image="a.jpg"), "'image' is not known: did you mean 'input_image'"),
        ({"conversation": []}, "did you mean 'conversations'"),
        ({"conversations": []}, "at least one turn"),
        ({"conversations": [{"from": [], "value": "x"}]}, "'from' is"),
        ({"conversations": [{"from": "human"}]}, "'value' must be a string, and is missing"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "input_image": "a.jpg"}, "human turns hold 0"),
        (talk("x", "y", input_image="../a.jpg"), "not inside the media root"),
    ],
)
def test_a_bad_nextgpt_row_is_an_error_with_its_index(folder, bad, message):
    path = nextgpt(folder, talk("x", "y"), bad)
    with pytest.raises(InputError, match=message) as caught:
        read_samples(path)
    assert f"{path}[1]" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("[]", "it is empty"),
        ("{}", "one JSON list"),
        ("[\n{]\n]", r"rows\.json:2 is not valid JSON"),
    ],
)
def test_files_that_are_not_nextgpt(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path / "rows.json")


def test_lists_are_read_row_by_row(folder):
    """Characters of several bytes, brackets and escapes in strings, faults after good rows."""
    rows = [talk(f"Größe 漢字 {i}" * (i + 1), "ja {[,]} \\") for i in range(4)]
    path = folder / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False, indent=1).encode() + b"\n")
    samples = read_samples(path)
    assert [s.messages[0].content[0].text for s in samples] == [r["conversations"][0]["value"] for r in rows]
    good = json.dumps(rows[0])
    for content, message in (
        (f"[{good}\n,\n{good}", r"rows\.json:3 is not valid JSON: Expecting ',' or '\]'"),
        (f"[{good},\n{good},\n]", r"rows\.json:3 is not valid JSON"),
        (f"[{good}\n{good}]", r"rows\.json:2 is not valid JSON: Expecting ',' or '\]' at column 1"),
        (f"[{good}]\n[]", r"rows\.json:2 is not valid JSON: Extra data"),
        (f"[{good},\n{good[:40]}", r"rows\.json:2 is not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_samples(path)
    path.write_bytes(b"[" + good.encode() + b",\n\xff]")
    with pytest.raises(InputError, match=r"rows\.json:2 is not UTF-8 \(byte 0xff\)"):
        read_samples(path)


# -- LLaVA, Alpaca, VideoChat ----------------------------------------------------------------------------


def shown(sample):
    return [(m.role, [part.text or part.path.name for part in m.content]) for m in sample.messages]


def test_llava(folder):
    rows = (
        talk("<image>\nWhat is it?", "a cat, not <image>", id="000", image="a.jpg"),
        talk("First <image>, then <image>", "two", id=1, image=["a.jpg", "b.jpg"]),
        talk("What is it?", "a clip", video="a.mp4"),
        talk("Just text", "yes", model=""),
    )
    samples = read_samples(nextgpt(folder, *rows), "llava")
    assert [s.id for s in samples] == ["000", "1", "rows-2", "rows-3"]
    assert [shown(s)[0][1] for s in samples] == [
        ["a.jpg", "What is it?"],
        ["First ", "a.jpg", ", then ", "b.jpg"],
        ["a.mp4", "What is it?"],
        ["Just text"],
    ]
    assert shown(samples[0])[1] == ("assistant", ["a cat, not <image>"])
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
    assert read_samples(path, "llava")[0].source == f"{path}:1"


def test_alpaca(folder):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is …"},
        {"instruction": "Hi", "input": "", "output": "Ho"},
    ]
    samples = read_samples(nextgpt(folder, *rows), "alpaca")
    assert [shown(s) for s in samples] == [
        [("user", ["Add.\n\n1 2"]), ("assistant", ["3"])],
        [("user", ["Hi"]), ("assistant", ["Ho"])],
    ]


def test_videochat(folder):
    qa = [{"i": "Look well.", "q": "What?", "a": "A dog."}, {"i": "Look well.", "q": "Where?", "a": "There."}]
    caption = {"image": "a.jpg", "QA": [{"i": "", "q": "", "a": "A cat."}]}
    talked, captioned = read_samples(nextgpt(folder, {"video": "a.mp4", "QA": qa}, caption), "videochat")
    assert shown(talked) == [
        ("system", ["Look well."]),
        ("user", ["a.mp4", "What?"]),
        ("assistant", ["A dog."]),
        ("user", ["Where?"]),
        ("assistant", ["There."]),
    ]
    assert shown(captioned) == [("user", ["a.jpg"]), ("assistant", ["A cat."])]


@pytest.mark.parametrize(
    ("format", "bad", "message"),
    [
        ("llava", talk("<image>", "x"), "hold 1 '<image>' marker"),
        ("llava", talk("<image>", "x", image=["a.jpg", "b.jpg"]), "'image' names 2 file"),
        ("llava", talk("x", "y", imge="a.jpg"), "did you mean 'image'"),
        ("llava", talk("x", "y", image={}), "'image' must be a string"),
        ("llava", {"conversations": [{"from": "gpt", "value": "x", "caption": "y"}]}, "'caption' is not known"),
        ("alpaca", {"instruction": "x"}, "'output' must be a string, and is missing"),
        ("alpaca", {"instruction": "x", "output": ""}, "is empty"),
        ("alpaca", {"instruction": 1, "output": "x"}, "'instruction' must be a string"),
        ("videochat", {"QA": [{"q": "x", "a": "y"}]}, "'video' or 'image', and has neither"),
        ("videochat", {"video": "a.mp4", "QA": []}, "at least one pair"),
        ("videochat", {"video": "a.mp4", "QA": [{"q": "x"}]}, "'a' must be a string"),
        ("videochat", {"video": "a.mp4", "QA": [{"q": "x", "a": "y"}], "start": 0, "end": 2}, "a part of its video"),
    ],
)
def test_bad_rows_of_the_other_formats(folder, format, bad, message):
    path = nextgpt(folder, bad)
    with pytest.raises(InputError, match=message) as caught:
        read_samples(path, format)
    assert f"{path}[0] (sample 'rows-0')" in str(caught.value)
