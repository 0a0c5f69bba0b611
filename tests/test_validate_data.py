"""`scripts/validate_data.py`: every fault with its place, the summary, the exit code; and the written schema."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from training_utils import load_script

from anygpt.data import json_schema, write_image
from anygpt.data.validation import validate

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def main():
    return load_script("validate_data").main


def row(path="a.png", answer="yes", **more) -> dict:
    user = {"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "Is it?"}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], **more}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_image(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def write(folder: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "d.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "d.jsonl"


def test_a_sound_file(folder, main, capsys):
    assert main([str(write(folder, row(id="1"), row(id="2", answer="no"))), "--deep"]) == 0
    shown = capsys.readouterr().out
    assert "samples without a fault           2" in shown and "faults                            0" in shown


def test_every_fault_is_shown_with_file_line_and_sample(folder, main, capsys):
    target = [{"type": "image", "path": "a.png"}]
    path = write(
        folder, row(id="1"), "{broken", row("x.png", id="3"), row(id="4", answer=target), row(id="1"), row("cut.png")
    )
    assert main([str(path), "--deep"]) == 1
    shown = capsys.readouterr().out.splitlines()
    expected = (
        (":2 is not valid JSON",),
        (":3 (sample '3')", "x.png does not exist"),
        (":4 (sample '4')", "no 'caption'"),
        (":6 (sample 'd-5')", "cut.png cannot be read as an image"),
        (":5 (sample '1')", f"already used at {path}:1"),
    )
    for line, said in zip(shown, expected, strict=False):
        assert str(path) in line and all(text in line for text in said), line
    counts = {line.rsplit(None, 1)[0]: line.rsplit(None, 1)[1] for line in shown[len(expected) :]}
    kinds = ("caption", "duplicates", "missing media", "not decodable", "structure")
    assert {f"faults: {kind}": "1" for kind in kinds}.items() <= counts.items()
    assert (counts["rows"], counts["samples without a fault"], counts["repeated conversations"]) == ("6", "1", "1")


def test_a_list_that_breaks_off_is_shown_with_what_comes_before(folder, main, capsys):
    turns = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}], "image": "a.png"}
    path = folder / "d.json"
    path.write_text(json.dumps([turns, turns | {"image": ["a.png", "a.png"]}], indent=1)[:-1] + ",\n{]")
    assert main([str(path), "--format", "llava"]) == 1
    shown = capsys.readouterr().out
    assert f"{path}[1] (sample 'd-1'): its human turns hold 1 '<image>' marker(s)" in shown
    assert "is not valid JSON" in shown
    assert "faults: placeholders" in shown


def test_what_cannot_be_checked_at_all(folder, main, capsys):
    for arguments in ([str(folder / "none.jsonl")], [str(write(folder, row())), "--format", "jsnl"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as end:
        main(["--dep"])
    assert end.value.code == 2


def test_no_fault_is_kept(folder):
    faults = []
    report = validate(write(folder, *[row("x.png")] * 5), on_fault=faults.append)
    assert (report.rows, report.samples, len(faults), report.repeated) == (5, 0, 5, 4)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers must inherit what is patched")
def test_a_decoder_that_ends_its_process_is_said_to(folder, main, monkeypatch, capsys):
    monkeypatch.setattr("anygpt.data.validation.read_media", lambda *_, **__: os._exit(1))  # as a crash in C would
    assert main([str(write(folder, row(id="1"))), "--deep", "--num-workers", "1"]) == 2
    shown = capsys.readouterr().err
    assert "(sample '1')" in shown and "ended the process that decoded it" in shown


def test_faults_go_to_any_terminal_and_into_head(folder):
    """A name in another script on an ASCII terminal; a reader that has seen enough."""
    path = write(folder, *(row("gone.png", id=f"пример {i}") for i in range(3000)))
    script = REPOSITORY / "scripts/validate_data.py"
    command = f"'{sys.executable}' '{script}' '{path}' | head -1"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "\\u043f" in done.stdout
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_the_written_schema_is_that_of_the_types():
    written = json.loads((REPOSITORY / "anygpt/data/schema.json").read_text())
    assert written == json_schema.json_schema(), "run python -m anygpt.data.json_schema > anygpt/data/schema.json"
    assert written["$defs"]["TargetRow"]["required"] == ["type", "path", "caption"]
    assert written["$defs"]["MediaRow"]["required"] == ["type", "path"]
