"""`scripts/validate_data.py`: every fault with its place, the summary, the exit code; and the written schema."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from training_utils import REPOSITORY, run_forked

from anygpt import commands
from anygpt.data import DataSource, write_image
from anygpt.data.rows import SampleRow
from anygpt.data.validation import validate


@pytest.fixture(scope="module")
def main():
    return partial(commands.run, "validate-data")


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
    )
    for line, said in zip(shown, expected, strict=False):
        assert str(path) in line and all(text in line for text in said), line
    counts = {line.rsplit(None, 1)[0]: line.rsplit(None, 1)[1] for line in shown[len(expected) :]}
    kinds = ("caption", "missing media", "not decodable", "structure")
    assert {f"faults: {kind}": "1" for kind in kinds}.items() <= counts.items()
    assert (counts["rows"], counts["samples without a fault"], counts["repeated conversations"]) == ("6", "2", "1")
    assert counts["repeated ids"] == "1"


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
    for columns in (["text=a", "prompt"], ["text=a", "text=b"], ["text=a", "--columns", "text=b"]):
        with pytest.raises(SystemExit):
            main(["a.parquet", "--columns", *columns])
        assert "each key once" in capsys.readouterr().err


def test_no_fault_is_kept(folder):
    faults = []
    report = validate(DataSource(write(folder, *[row("x.png")] * 5)), on_fault=faults.append)
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


def test_the_json_schema_of_a_row():
    """For editors: the same keys that are checked."""
    schema = SampleRow.model_json_schema()
    assert set(schema["properties"]) == {"id", "messages"} and schema["additionalProperties"] is False
    assert schema["$defs"]["PartRow"]["properties"]["path"]["type"] == "string"
    assert schema["$defs"]["MessageRow"]["required"] == ["role", "content"]


def test_deep_refuses_reserved_tokens_in_texts_as_training_does(folder, main, capsys):
    rows = [
        row(id="1", answer="see [IMG0]"),
        row(id="2", answer=[{"type": "text", "text": ["<video>", "b"]}]),
        row(id="3"),
    ]
    path = write(folder, *rows)
    assert main([str(path)]) == 0
    assert main([str(path), "--deep"]) == 1
    shown = capsys.readouterr().out
    assert f"{path}:1 (sample '1'): the text contains '[IMG0]', which is a reserved token" in shown
    assert f"{path}:2 (sample '2'): the text contains '<video>'" in shown and "not usable" in shown


@pytest.mark.parametrize("seconds", [0, 1])
def test_workers_end_with_a_parent_that_is_killed(folder, seconds):
    """Also one that starts so late that its parent is killed before."""
    path = write(folder, *(row(id=str(i)) for i in range(5)))
    code = (
        "import os, time, multiprocessing as mp\n"
        "from anygpt.data import DataSource, validation\nfrom anygpt.data.validation import validate\n"
        "end_with_parent = validation.end_with_parent\n"
        f"validation.end_with_parent = lambda i: (time.sleep(i * {seconds}), end_with_parent(i))\n"
        "def slow(rows):\n"
        "    for i, row in enumerate(rows):\n"
        "        print(*(p.pid for p in mp.active_children()), flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
        f"validate(DataSource({str(path)!r}), num_workers=2, progress=slow)\n"
    )
    done = run_forked("-c", code)
    workers = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and workers
    for _ in range(300):
        if not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"{workers} still run")


def test_more_workers_than_any_machine_has(folder, main, capsys):
    assert main([str(write(folder, row())), "--num-workers", "100000"]) == 2
    assert "num_workers is 100,000" in capsys.readouterr().err
