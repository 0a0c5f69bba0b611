"""Checkpoints: whole or passed over, kept by count and by metric, and never lost to a full disk."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import resource
import shutil

import pytest
import torch
import yaml
from training_utils import (
    REPOSITORY,
    arguments,
    change_tensors,
    check_mistake,
    cli_here,
    logged,
    toy_data,
    train_here,
    trained_tensors,
)

from anygpt.errors import InputError
from anygpt.parts.manifest import MANIFEST, find_fault, write_manifest
from anygpt.training.checkpoint import settings_that_count
from anygpt.training.config import Config, parse_config
from anygpt.training.folder import (
    best_checkpoint,
    find_checkpoints,
    remove_old,
    set_aside,
)

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


def stage1(data, output, *more, steps=STEPS):
    more = ("--train.save_steps=1", "--train.keep_checkpoints=3", *more)
    return arguments(1, data / "stage1.jsonl", output, *more, steps=steps, batch_size=3)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run with `checkpoint-2`, `-3` and `-4`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_here(1, stage1(data, folder))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, killed before it had written `final/`, and while it wrote a checkpoint."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    (tmp_path / "run/.checkpoint-5.incomplete").mkdir()
    return tmp_path / "run"


# -- manifests -------------------------------------------------------------------------------------------------


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors has 1000 bytes"),
    "a bit flipped": (lambda f: flip_a_bit(f / "optimizer.pt"), "optimizer.pt has other content"),
    "a file missing": (lambda f: (f / "rng-0.pt").unlink(), "rng-0.pt is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no manifest.json"),
    "manifest cut": (lambda f: os.truncate(f / MANIFEST, 40), "manifest.json"),
    "manifest of another kind": (lambda f: (f / MANIFEST).write_text("[1]"), "manifest.json"),
    "emptied": (lambda f: [p.unlink() for p in f.rglob("*") if p.is_file()], "no manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found(run, kind):
    damage, said = DAMAGES[kind]
    checkpoint = run / "checkpoint-4"
    assert find_fault(checkpoint) is None
    (checkpoint / "notes.txt").write_text("somebody's own")
    assert find_fault(checkpoint) is None
    damage(checkpoint)
    assert said in find_fault(checkpoint)


def test_every_file_is_in_the_manifest(finished):
    for folder in (finished / "checkpoint-4", finished / "final"):
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert set(listed) | {MANIFEST} == files
        assert all(entry["size"] == (folder / name).stat().st_size for name, entry in listed.items())


def test_damaged_checkpoints_are_passed_over(data, finished, run):
    """The newest is cut short, the one before it has lost a file: the run goes on from the third, to the same end."""
    os.truncate(run / "checkpoint-4/optimizer.pt", 10)
    (run / "checkpoint-3/model.safetensors").unlink()
    final = train_here(1, stage1(data, run))
    log = (run / "log.txt").read_text()
    assert "checkpoint-4 is damaged and skipped: optimizer.pt has 10 bytes" in log
    assert "checkpoint-3 is damaged and skipped: model.safetensors is missing" in log
    assert f"continues from {run / 'checkpoint-2'}" in log
    assert not list(run.glob(".*.incomplete"))
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert all(find_fault(path) is None for path in find_checkpoints(run))
    first, second = trained_tensors(finished / "final"), trained_tensors(final)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_damaged_checkpoint_that_is_asked_for_is_a_mistake(data, run, capsys):
    os.truncate(run / "checkpoint-3/model.safetensors", 10)
    for path, said in (
        (run / "checkpoint-3", "model.safetensors has 10 bytes"),
        (run / "checkpoint-9", "no such folder"),
        (data, "no manifest.json"),
    ):
        code, lines = cli_here(1, stage1(data, run, "--run.resume", path), capsys)
        check_mistake(code, lines, "run.resume", path, said)
    assert not (run / "final").exists()


def test_going_back_leaves_nothing_that_looks_newer(data, run):
    """From an older checkpoint by its path: the newer ones are put aside, and a later start does not take them."""
    train_here(1, stage1(data, run, "--run.resume", run / "checkpoint-2", steps=STEPS))
    assert {"set-aside-3", "set-aside-4", "checkpoint-3", "checkpoint-4"} <= {path.name for path in run.iterdir()}
    assert set_aside(run, 4) == []


class Malice:
    def __reduce__(self):
        return (os.mkdir, (str(REPOSITORY / "malice"),))


def test_pickles_in_a_checkpoint_are_not_run(data, run, capsys):
    """Not even where the manifest was made to fit."""
    for name in ("optimizer.pt", "rng-0.pt"):
        folder = run / "checkpoint-4"
        before = (folder / name).read_bytes()
        content = io.BytesIO()
        torch.save(Malice(), content)
        for spoiled in (content.getvalue(), pickle.dumps(Malice())):
            (folder / name).write_bytes(spoiled)
            (folder / MANIFEST).unlink()
            write_manifest(folder)
            code, lines = cli_here(1, stage1(data, run), capsys)
            check_mistake(code, lines, folder / name, "not loaded")
            assert not (REPOSITORY / "malice").exists()
        (folder / name).write_bytes(before)


# -- which are kept --------------------------------------------------------------------------------------------


def test_the_best_is_kept_beside_the_newest(tmp_path):
    values = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 5.0}
    for step, value in values.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        metrics = {} if value is None else {"eval/loss": value}
        (folder / "training_state.json").write_text(json.dumps({"metrics": metrics}))
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    config = Config()
    config.train.keep_checkpoints, config.train.keep_best = 1, "eval/loss"
    assert best_checkpoint(tmp_path, "eval/loss") == (tmp_path / "checkpoint-2", 1.0)
    remove_old(tmp_path, config)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-6", "checkpoint-best"}


def test_best_and_bounds_in_a_run(data, tmp_path, capsys):
    output = tmp_path / "run"
    args = stage1(data, output, "--train.keep_best=loss", "--train.keep_checkpoints=1", "--run.tracker=tensorboard")
    train_here(1, args)
    losses = {step: metrics["loss"] for step, metrics in logged(output).items()}
    lowest = min(losses, key=losses.get)
    path, value = best_checkpoint(output, "loss")
    assert path.name == f"checkpoint-{lowest}" and value == pytest.approx(losses[lowest])
    assert {p.name for p in find_checkpoints(output)} == {path.name, f"checkpoint-{STEPS}"}
    assert f"lowest loss: {value:.4g}, in {path}" in (output / "log.txt").read_text()
    bound = ("--train.abort_above={loss: 0.5}", "--run.resume=never")
    code, lines = cli_here(1, [*args, *bound], capsys)
    stopped = output / "stopped-1"
    assert code == 4 and len(lines) == 1
    assert "after update 1: loss is" in lines[0] and "above 0.5" in lines[0] and str(stopped) in lines[0]
    assert find_fault(stopped) is None and not (output / "final").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--train.keep_best=eval/los", "--train.save_steps=1"), ("keep_best", "eval/los", "did you mean")),
        (("--train.abort_above={los: 1}",), ("abort_above", "did you mean loss")),
        (("--train.keep_best=eval/loss", "--train.save_steps=1"), ("keep_best", "train.eval_steps")),
        (("--train.keep_best=loss", "--train.save_steps=0"), ("keep_best", "train.save_steps")),
    ],
)
def test_metrics_that_there_are_not(data, tmp_path, capsys, more, said):
    code, lines = cli_here(1, stage1(data, tmp_path / "run", *more), capsys)
    check_mistake(code, lines, *said)
    assert not (tmp_path / "run").exists()


# -- what a run continues from ---------------------------------------------------------------------------------


def test_other_data_is_refused(data, run, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "shorter")  # the data itself is shared with tests in other processes
    path = tmp_path / "shorter/stage1.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    code, lines = cli_here(1, stage1(tmp_path / "shorter", run), capsys)
    check_mistake(code, lines, run / "checkpoint-4", "12 rows", "10 rows", "run.resume=never")


def test_a_run_can_be_moved(data, finished, run, tmp_path):
    """Run, data and media lie elsewhere than when it was killed: it goes on to the same end."""
    shutil.copytree(data, tmp_path / "elsewhere")
    shutil.rmtree(run / "checkpoint-4")
    moved = run.rename(tmp_path / "moved")
    final = train_here(1, stage1(tmp_path / "elsewhere", moved))
    assert f"continues from {moved / 'checkpoint-3'}" in (moved / "log.txt").read_text()
    first, second = trained_tensors(finished / "final"), trained_tensors(final)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_are_counted_over_all_processes(data, tmp_path, monkeypatch):
    """1 process with 6 rows and 2 with 3 train the same, and may go on from each other; 2 with 6 may not."""
    one = settings_that_count(parse_config([*stage1(data, tmp_path), "--train.batch_size=6"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settings_that_count(parse_config([*stage1(data, tmp_path), "--train.batch_size=3"])) == one
    suite = ["--train.eval_suite=a.yaml", "--train.eval_steps=1", "--data.eval=[{path: a}]", "--train.batch_size=3"]
    assert settings_that_count(parse_config([*stage1(data, tmp_path), *suite])) == one  # measuring changes no weights
    assert settings_that_count(parse_config([*stage1(data, tmp_path), "--train.batch_size=6"])) != one


def test_batches_by_tokens_depend_on_the_processes(data, tmp_path, monkeypatch):
    given = [*stage1(data, tmp_path), "--data.max_batch_tokens=512"]
    one = settings_that_count(parse_config([*given, "--train.batch_size=6"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settings_that_count(parse_config([*given, "--train.batch_size=3"])) != one


# -- more updates, and other data ------------------------------------------------------------------------------


def test_a_finished_run_goes_on_with_more_updates(data, finished, run):
    """With a constant rate it ends where a run of that length does; with another the new schedule counts at once."""
    constant = ("--train.scheduler=constant", "--train.save_steps=2")
    short, long = run.with_name("short"), run.with_name("long")
    train_here(1, stage1(data, short, *constant, steps=2))
    first = trained_tensors(train_here(1, stage1(data, short, *constant, steps=4)))
    second = trained_tensors(train_here(1, stage1(data, long, *constant, steps=4)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "of 4 updates instead of 2" in (short / "log.txt").read_text()

    train_here(1, stage1(data, run, steps=6))
    shown = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("update 5  ")]
    rate = parse_config(stage1(data, run)).train.learning_rate * 0.5 * (1 + math.cos(math.pi * 4 / 6))
    assert f"learning_rate {rate:.4g}" in shown[-1]


def test_a_run_killed_before_its_end_says_what_was_trained(data, finished, run):
    train_here(1, stage1(data, run))
    first, second = (json.loads((folder / "final/config.json").read_text()) for folder in (finished, run))
    assert first["trained"]["losses"] and first["trained"] == second["trained"]


def test_a_run_is_not_made_shorter_than_it_is(data, run, capsys):
    code, lines = cli_here(1, stage1(data, run, steps=3), capsys)
    check_mistake(code, lines, "checkpoint-4 is beyond train.max_steps, which is 3")


def test_evaluations_of_a_run_before_are_not_taken_for_this_ones(data, tmp_path):
    output = tmp_path / "run"
    train_here(1, stage1(data, output))
    for step in (2, 3):
        (output / f"evaluation/{step:06d}").mkdir(parents=True)
    shutil.rmtree(output / "checkpoint-4")
    shutil.rmtree(output / "checkpoint-3")
    train_here(1, stage1(data, output))
    assert [path.name for path in (output / "evaluation").iterdir()] == ["000002"]
    for name in ("parts", "profile"):
        (output / name).mkdir()
    train_here(1, stage1(data, output, "--run.resume=never"))
    assert not any((output / name).exists() for name in ("evaluation", "parts", "profile"))
    with pytest.raises(InputError, match=r"lies in run\.output_dir"):  # it would be removed
        train_here(1, stage1(data, output, f"--model.language_model.path={output / 'parts/language_model'}"))


def test_samples_of_updates_that_come_again_do_not_contradict_them(data, tmp_path):
    sampled = ("--train.sample_steps=1", "--train.sample_rows=1", f"--data.eval=[{{path: {data / 'stage1.jsonl'}}}]")
    args = stage1(data, tmp_path / "run", *sampled, steps=2)
    train_here(1, args)
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    index = tmp_path / "run/samples/000002/index.jsonl"
    line = json.loads(index.read_text())
    index.write_text(json.dumps(line | {"text": "another machine's answer"}) + "\n")
    train_here(1, args)
    assert json.loads(index.read_text()) == line


def test_epochs_are_counted_in_updates(data, tmp_path):
    more = ("--train.num_epochs=1.5", "--train.gradient_accumulation_steps=2")
    train_here(1, stage1(data, tmp_path / "run", *more))
    assert "1.5 epochs of 12 rows, 6 an update: 3 updates" in (tmp_path / "run/log.txt").read_text()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["max_steps"] == 3
    assert (tmp_path / "run/checkpoint-3").is_dir()
    parse_config(stage1(data, tmp_path / "long", "--train.num_epochs=300", "--train.warmup_steps=5"))
    with pytest.raises(InputError, match=r"warmup_steps is 5, expected at most the 3 updates"):
        train_here(1, stage1(data, tmp_path / "short", *more, "--train.warmup_steps=5"))
    with pytest.raises(InputError, match=r"which data\.max_batch_tokens replaces"):
        parse_config(stage1(data, tmp_path / "run", *more, "--data.max_batch_tokens=512"))


@pytest.mark.parametrize("change", [lambda rows: rows[::-1], lambda rows: [r.replace("a ", "a  ", 1) for r in rows]])
def test_other_rows_of_the_same_number_are_noticed(data, run, tmp_path, capsys, change):
    shutil.copytree(data, tmp_path / "elsewhere")
    file = tmp_path / "elsewhere/stage1.jsonl"
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
    code, lines = cli_here(1, stage1(file.parent, run, steps=6), capsys)
    check_mistake(code, lines, file, "the same rows in the same order", "12 rows", "run.resume=never")


# -- what is not finite ----------------------------------------------------------------------------------------


def test_the_state_before_a_loss_that_is_not_finite_is_kept(data, finished, tmp_path, capsys):
    """Numbers too large for float32 to multiply. The state is whole, and a run starts from it where one says so."""
    start = tmp_path / "start"
    shutil.copytree(finished / "final", start)

    def enlarge(tensors):
        return {n: t * 1e30 if n.startswith("image_encoder.projector") else t for n, t in tensors.items()}

    change_tensors(start, enlarge)
    output = tmp_path / "run"
    args = arguments(1, data / "stage1.jsonl", output, init_from=start, batch_size=12)
    code, lines = cli_here(1, args, capsys)
    assert code == 3 and len(lines) == 1
    stopped = output / "stopped-0"
    assert lines[0].startswith("error: update 1: ") and str(stopped) in lines[0]
    assert find_fault(stopped) is None and not (output / "final").exists()
    code, again = cli_here(1, [*args, "--run.resume", str(stopped)], capsys)
    assert code == 3 and again == lines


def test_a_start_that_is_not_finite_is_refused(data, finished, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(finished / "final", start)
    name = "audio_encoder.projector.projection.0.bias"
    change_tensors(start, lambda tensors: tensors | {name: tensors[name] * float("nan")})
    code, lines = cli_here(1, arguments(1, data / "stage1.jsonl", tmp_path / "run", init_from=start), capsys)
    check_mistake(code, lines, start, "not finite", name)
    assert not (tmp_path / "run").exists()


# -- a full disk -----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(data, run, capsys):
    """No file may be larger than what is left: the next checkpoint cannot be written."""
    shutil.rmtree(run / "checkpoint-4")
    before = {path: path.read_bytes() for path in run.glob("checkpoint-*/*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        code, lines = cli_here(1, stage1(data, run), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_mistake(code, lines, run / "checkpoint-4", "File too large", f"last checkpoint is {run / 'checkpoint-3'}")
    assert {path: path.read_bytes() for path in run.glob("checkpoint-*/*") if path.is_file()} == before
    assert not list(run.glob(".*.incomplete")) and not (run / "final").exists()
    assert cli_here(1, stage1(data, run), capsys)[0] == 0


# -- kills -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killing():
    """`tests/killing.py`."""
    import killing

    return killing


def test_a_killed_run_ends_as_if_it_had_not_been(killing, tmp_path):
    runner = killing.Runner()
    killing.prepare(runner, tmp_path, [1])
    assert killing.survives(runner, 1, tmp_path, kills=1, steps=12, processes=1, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "processes"), [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_runs_killed_ten_times(killing, tmp_path, stage, processes):
    runner = killing.Runner()
    killing.prepare(runner, tmp_path, [stage])
    assert killing.survives(runner, stage, tmp_path, kills=10, steps=40, processes=processes, seed=0)
