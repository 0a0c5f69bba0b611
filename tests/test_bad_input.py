"""Mistaken input: one line that says what, where and what was expected, exit code 2, nothing half-written.

One runs as `python stages/…`, where messages and exit codes are judged; the rest through the same command line in this
process.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from training_utils import arguments, check_mistake, cli_here, run_script, toy_data, train_here


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


@pytest.fixture
def media(data, tmp_path):
    """A folder of its own with one file of each kind, `a.png`, `a.mp4`, `a.wav`."""
    for kind, suffix in (("image", "png"), ("video", "mp4"), ("audio", "wav")):
        shutil.copy(sorted(data.glob(f"stage1/{kind}/*"))[0], tmp_path / f"a.{suffix}")
    return tmp_path


def write_rows(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_nextgpt(folder, row):
    path = folder / "rows.json"
    path.write_text(json.dumps([row]))
    return path


def row(user, assistant, name="0"):
    return {"id": name, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def text(said="What is it?"):
    return {"type": "text", "text": said}


IMAGE = {"type": "image", "path": "a.png"}
TARGET = IMAGE | {"caption": "a red circle"}
ANSWER = [text("A red circle.")]
FROM_PARTS = ("--model.init_from", "null")


def refuse(stage, path, folder, capsys, *said, more=()):
    """The run stops with one line that says all of `said`, and leaves no folder behind."""
    more = (*FROM_PARTS, *more) if stage == 2 else more
    output = folder / "runs/new"
    code, lines = cli_here(stage, arguments(stage, path, output, *more, batch_size=2), capsys)
    check_mistake(code, lines, *said)
    assert not output.exists()


# -- the data --------------------------------------------------------------------------------------------------


def test_unreadable_media_in_a_worker_as_a_process(media, tmp_path):
    (media / "b.png").write_bytes(b"not a picture")
    path = write_rows(media, [row([IMAGE | {"path": "b.png"}, text()], ANSWER)])
    done = run_script(1, arguments(1, path, tmp_path / "run", "--data.num_workers", "1"))
    check_mistake(done.returncode, done.stderr.splitlines(), f"{path}:1", "b.png", "cannot be read as an image")
    assert not (tmp_path / "run").exists()


def test_missing_media(media, capsys):
    path = write_rows(media, [row([IMAGE, text()], ANSWER), row([IMAGE | {"path": "b.png"}], ANSWER, "1")])
    refuse(1, path, media, capsys, f"{path}:2", "'1'", "b.png", "does not exist", "media_root")


def test_unreadable_media_later_in_the_run(media, capsys):
    """Found in the third update: what the run wrote until then goes again."""
    (media / "b.png").write_bytes((media / "a.png").read_bytes()[:40])
    rows = [row([IMAGE, text()], ANSWER, str(i)) for i in range(30)]
    path = write_rows(media, [*rows, row([IMAGE | {"path": "b.png"}, text()], ANSWER, "bad")])
    refuse(1, path, media, capsys, f"{path}:31", "'bad'", "b.png", "cannot be read", more=("--train.max_steps", "40"))


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_unreadable_clips_and_sounds(media, capsys, kind):
    name = {"video": "b.mp4", "audio": "b.wav"}[kind]
    (media / name).write_bytes(b"\0" * 100)
    path = write_rows(media, [row([{"type": kind, "path": name}, text()], ANSWER)])
    refuse(1, path, media, capsys, f"{path}:1", name, "cannot be read", kind)


def test_an_unreadable_target(media, capsys):
    (media / "b.png").write_bytes(b"x")
    path = write_rows(media, [row([text()], [TARGET | {"path": "b.png"}])])
    refuse(2, path, media, capsys, f"{path}:1", "b.png", "target image")


def test_media_without_caption(media, capsys):
    path = write_rows(media, [row([text()], [IMAGE])])
    refuse(2, path, media, capsys, f"{path}:1", "messages[1]", "content[0]", "'caption'", "add one")


def test_a_caption_without_media(media, capsys):
    path = write_rows(media, [row([text()], [{"type": "image", "caption": "a red circle"}])])
    refuse(2, path, media, capsys, f"{path}:1", "messages[1].content[0]", "'path'")


def test_a_caption_without_media_in_nextgpt(media, capsys):
    turns = [{"from": "human", "value": "Show it."}, {"from": "gpt", "value": "Here."}]
    path = write_nextgpt(media, {"conversations": turns, "image_captions": ["a red circle"]})
    refuse(2, path, media, capsys, f"{path}[0]", "'image_captions'", "no 'output_image'")


def test_a_placeholder_without_an_input(media, capsys):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
    path = write_nextgpt(media, {"conversations": turns})
    refuse(1, path, media, capsys, f"{path}[0]", "1 '<image>' marker", "0 file(s)")


def test_inputs_that_do_not_fit_the_placeholders(media, capsys):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
    path = write_nextgpt(media, {"conversations": turns, "input_image": ["a.png", "a.png"]})
    refuse(1, path, media, capsys, f"{path}[0]", "1 '<image>' marker", "2 file(s)")


def test_a_target_without_its_marker(media, capsys):
    turns = [{"from": "human", "value": "Show it."}, {"from": "gpt", "value": "Here."}]
    row = {"conversations": turns, "output_image": "a.png", "image_captions": ["a red circle"]}
    path = write_nextgpt(media, row)
    refuse(2, path, media, capsys, f"{path}[0]", "gpt turns hold 0 '<image>' marker", "1 file(s)")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(media, capsys, content):
    path = media / "rows.jsonl"
    path.write_text(content)
    refuse(1, path, media, capsys, path, "empty")


def test_no_such_data_file(media, capsys):
    refuse(1, media / "absent.jsonl", media, capsys, media / "absent.jsonl", "does not exist")


def test_a_broken_line(media, capsys):
    path = write_rows(media, [row([IMAGE, text()], ANSWER)])
    path.write_text(path.read_text() + '{"id": ')
    refuse(1, path, media, capsys, f"{path}:2", "not valid JSON")


def test_evaluation_data_are_checked_too(media, capsys):
    good = write_rows(media, [row([IMAGE, text()], ANSWER)])
    bad = media / "eval.jsonl"
    bad.write_text("")
    refuse(1, good, media, capsys, bad, "empty", more=("--data.eval", f"[{{path: {bad}}}]"))


@pytest.mark.parametrize(
    ("stage", "wrong", "said"),
    [
        (1, row([text()], ANSWER), ("llm", "stage 1")),
        (2, row([IMAGE], ANSWER), ("encoder_llm", "stage 2", "llm_decoder")),
        (2, row([IMAGE], [TARGET]), ("encoder_decoder", "stage 2")),
        (1, row([text()], [TARGET]), ("image", "a decoder", "nothing")),
    ],
    ids=["text in stage 1", "reading in stage 2", "both in stage 2", "no decoder"],
)
def test_rows_that_the_stage_does_not_train_on(media, capsys, stage, wrong, said):
    path = write_rows(media, [wrong])
    refuse(stage, path, media, capsys, f"{path}:1", *said)


@pytest.mark.parametrize("token", ["<image>", "<audio>", "[IMG0]", "[VID23]"])
def test_text_with_a_reserved_token(media, capsys, token):
    stage = 2 if token.startswith("[") else 1
    user = [text(f"Look: {token}")]
    bad = row(user, [TARGET]) if stage == 2 else row([IMAGE, *user], ANSWER)
    path = write_rows(media, [bad])
    refuse(stage, path, media, capsys, f"{path}:1", token, "reserved token")


# -- settings and folders --------------------------------------------------------------------------------------


def test_misspelt_settings(data, tmp_path, capsys):
    more = ("--train.learning_rat", "1", "--train.btch_size=3")
    said = ("train.learning_rat;", "train.learning_rate?", "train.batch_size?")
    refuse(1, data / "stage1.jsonl", tmp_path, capsys, *said, more=more)


def test_a_negative_learning_rate(data, tmp_path, capsys):
    said = ("train.learning_rate is -1.0", "greater than 0")
    refuse(1, data / "stage1.jsonl", tmp_path, capsys, *said, more=("--train.learning_rate", "-1"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model.encoders.image.path=zoo:image_encodr",), ("image_encodr", "image_encoder")),
        (("--model.encoders.image.path=/nowhere/at/all",), ("image encoder", "/nowhere/at/all", "no such folder")),
        (("--model.language_model.path=zoo:image_encoder",), ("language model", "zoo:image_encoder")),
        (("--model.encoders.image.dtype=float33",), ("float33", "bfloat16")),
        (("--model.encoders.image.projector={projection_type: lstm}",), ("lstm", "linear")),
        (("--model.encoders.image.projector={projection_typ: mlp}",), ("projection_typ", "projection_type")),
        (("--loss.by_modality.image=0.5",), ("loss.by_modality", "image", "none")),
        (("--run.resume=/nowhere/checkpoint-1",), ("run.resume", "/nowhere/checkpoint-1", "never")),
        (("--data.train=[{path: a.jsonl, format: nextgtp}]",), ("a.jsonl",)),
    ],
    ids=["zoo name", "no folder", "other part", "dtype", "projector", "projector key", "weights", "resume", "format"],
)
def test_wrong_settings(data, tmp_path, capsys, more, said):
    refuse(1, data / "stage1.jsonl", tmp_path, capsys, *said, more=more)


@pytest.mark.parametrize("layers", ["[qq]", "[q_proj, qq]", "'.*qq(['"])
def test_lora_on_layers_that_are_not_there(data, tmp_path, capsys, layers):
    train_here(2, arguments(2, data / "stage2.jsonl", tmp_path / "start", *FROM_PARTS, steps=1, batch_size=1))
    args = arguments(
        *(3, data / "stage3.jsonl", tmp_path / "run"),
        f"--lora.target_modules={layers}",
        init_from=tmp_path / "start/final",
    )
    code, lines = cli_here(3, args, capsys)
    check_mistake(code, lines, "lora.target_modules", "qq")
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_not_there(data, tmp_path, capsys):
    start = tmp_path / "nothing/final"
    code, lines = cli_here(2, arguments(2, data / "stage2.jsonl", tmp_path / "run", init_from=start), capsys)
    check_mistake(code, lines, start, "config.json", "final/")
    assert not (tmp_path / "run").exists()


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_finished_run_is_not_written_over(data, tmp_path, capsys):
    args = arguments(1, data / "stage1.jsonl", tmp_path / "run", steps=1)
    train_here(1, args)
    before = snapshot(tmp_path / "run")
    code, lines = cli_here(1, args, capsys)
    check_mistake(code, lines, tmp_path / "run/final", "run.resume=never")
    assert snapshot(tmp_path / "run") == before


def test_a_mistake_leaves_a_finished_run_as_it_was(data, media, tmp_path, capsys):
    """Even with `run.resume=never`: the first update's samples are read before the old run is removed."""
    output = tmp_path / "run"
    train_here(1, arguments(1, data / "stage1.jsonl", output, steps=1))
    before = snapshot(output)
    (media / "b.png").write_bytes(b"not a picture")
    path = write_rows(media, [row([IMAGE | {"path": "b.png"}], ANSWER)])
    code, lines = cli_here(1, arguments(1, path, output, "--run.resume", "never"), capsys)
    check_mistake(code, lines, f"{path}:1", "b.png")
    assert snapshot(output) == before


def test_an_output_folder_that_is_a_file(data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/below/run"):
        code, lines = cli_here(1, arguments(1, data / "stage1.jsonl", output), capsys)
        check_mistake(code, lines, "run.output_dir", output, "is not a folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that no one may write to")
def test_an_output_folder_that_cannot_be_made(data, capsys):
    """Root may write to any ordinary folder, but not make one in /proc."""
    code, lines = cli_here(1, arguments(1, data / "stage1.jsonl", "/proc/run"), capsys)
    check_mistake(code, lines, "run.output_dir", "/proc/run", "choose another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(data, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, lines = cli_here(1, arguments(1, data / "stage1.jsonl", tmp_path / "locked/run"), capsys)
    check_mistake(code, lines, "run.output_dir", tmp_path / "locked", "may not be written to")
