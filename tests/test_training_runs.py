"""Runs from the outside: killed and resumed, stopped by what goes wrong, and followed by a tracker."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from training_utils import (
    SCRIPTS,
    Bench,
    argument_maker,
    arguments,
    change_tensors,
    check_mistake,
    cli_here,
    logged,
    run_forked,
    sgd,
    stage2_start,
    start_forked,
    toy_data,
    train_here,
    trained_tensors,
    wait_for,
)

from anygpt.training.performance import Meter

BOARD = ("--run.tracker", "tensorboard")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


@pytest.fixture(scope="module")
def make_arguments(tmp_path_factory):
    return argument_maker(tmp_path_factory)


# -- killed and resumed ----------------------------------------------------------------------------------------


SIGTERM_IN_UPDATE_3 = """
import os, signal, sys
from anygpt.training.cli import run_stage
from anygpt.training.stages import ENCODER_LLM
from anygpt.training.trainer import Trainer
step = Trainer.step
def killed(self, batches):
    if self.done == 2:
        os.killpg(0, signal.SIGTERM)
    return step(self, batches)
Trainer.step = killed
run_stage(ENCODER_LLM, "", sys.argv[1:])
"""


def test_sigterm_to_the_group_writes_a_checkpoint(make_arguments, tmp_path):
    """Workers are in the group as well, and must not die before the update is done."""
    args = make_arguments(1, tmp_path / "run", "--data.num_workers=2", steps=6)
    done = run_forked("-c", SIGTERM_IN_UPDATE_3, *args)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "run/final").exists()
    assert "checkpoint after update 3 written" in (tmp_path / "run/log.txt").read_text()
    resumed = train_here(1, args)
    whole = train_here(1, make_arguments(1, tmp_path / "whole", steps=6))
    first, second = trained_tensors(whole), trained_tensors(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoints_are_kept_by_count_and_their_settings_are_checked(make_arguments, tmp_path, capsys):
    args = make_arguments(1, tmp_path / "run", "--train.save_steps=1", "--train.keep_checkpoints=2", steps=4)
    train_here(1, args)
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]
    code, lines = cli_here(1, [*args, "--train.learning_rate=0.1"], capsys)
    check_mistake(code, lines, "checkpoint-4", "train.learning_rate was 0.002 and is 0.1;", "run.resume=never")
    code, _ = cli_here(1, [*args, "--train.learning_rate=0.1", "--run.resume=never"], capsys)
    assert code == 0


WITHOUT_TORCHS_WATCHDOG = """
import runpy, sys, torch.utils.data
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 1e6  # seconds
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_workers_end_with_a_run_that_is_killed(make_arguments, tmp_path):
    args = make_arguments(1, tmp_path, "--data.num_workers=2", steps=500)
    process = start_forked("-c", WITHOUT_TORCHS_WATCHDOG, SCRIPTS[1], *args)
    wait_for(lambda: len(psutil.Process(process.pid).children()) >= 2, process)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=120)[1]


# -- what goes wrong -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_step(data, tmp_path_factory, tmp_path, capsys):
    """Exit code, the batch's samples, and nothing that a run would continue from by itself."""
    poisoned = tmp_path / "poisoned"
    shutil.copytree(stage2_start(tmp_path_factory, data), poisoned)

    def poison(tensors):  # each number is one, but not what comes of multiplying them
        return {n: t * 1e30 if n.startswith("image_encoder.projector") else t for n, t in tensors.items()}

    change_tensors(poisoned, poison)
    output = tmp_path / "run"
    args = arguments(3, data / "stage3.jsonl", output, "--train.save_steps=1", init_from=poisoned, steps=2)
    code, (line,) = cli_here(3, args, capsys)
    assert code == 3
    assert line.startswith("error: update 1: ")
    first = Bench(3, [*args, "--run.output_dir", str(tmp_path / "bench")], sgd, tmp_path / "bench").batches
    ids = [sample for _, found in first for sample in found["sample_ids"]]
    assert all(sample in line for sample in ids) and len(ids) == 6
    assert "not made" in line and str(output / "stopped-0") in line
    assert not (output / "final").exists() and not list(output.glob("checkpoint-*"))


def spoiled(data, folder, count):
    """Stage 1's data with the media of the first `count` rows unreadable; the ids of those rows."""
    shutil.copytree(data / "stage1", folder / "stage1")
    shutil.copy(data / "stage1.jsonl", folder)
    rows = [json.loads(line) for line in (folder / "stage1.jsonl").read_text().splitlines()]
    for row in rows[:count]:
        (folder / row["messages"][0]["content"][0]["path"]).write_bytes(b"x")
    return folder / "stage1.jsonl", [row["id"] for row in rows[:count]]


@pytest.mark.parametrize("size", [1, 6], ids=["whole batches", "parts of batches"])
def test_bad_samples_are_skipped_and_counted(data, tmp_path, size):
    path, bad = spoiled(data, tmp_path, 3)
    skip, steps = ("--data.on_bad_sample=skip", *BOARD, "--train.save_steps=12", "--train.eval_steps=1"), 12 // size
    more = (*skip, "--data.eval", f"[{{path: {path}}}]")
    train_here(1, arguments(1, path, tmp_path / "run", *more, steps=steps, batch_size=size))
    metrics = logged(tmp_path / "run")
    assert metrics[steps]["skipped"] == len(bad)  # an epoch: each of them once
    assert {values["eval/skipped"] for values in metrics.values()} == {len(bad)}
    idle = sum("loss" not in values for values in metrics.values())  # updates without a row
    assert idle == (len(bad) if size == 1 else 0)
    optimizer = torch.load(tmp_path / f"run/checkpoint-{steps}/optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {steps - idle}
    assert all(torch.isfinite(t).all() for t in trained_tensors(tmp_path / "run/final").values())


def test_an_evaluation_without_a_row_is_an_error(data, tmp_path, capsys):
    path, _ = spoiled(data, tmp_path, 12)
    more = ("--data.on_bad_sample=skip", "--data.eval", f"[{{path: {path}}}]", "--train.eval_steps=1")
    code, lines = cli_here(1, arguments(1, data / "stage1.jsonl", tmp_path / "run", *more), capsys)
    check_mistake(code, lines, "data.eval", "12 of 12 were skipped")


def test_bad_samples_are_an_error_by_default(data, tmp_path, capsys):
    path, bad = spoiled(data, tmp_path, 3)
    code, lines = cli_here(1, arguments(1, path, tmp_path / "run", batch_size=12), capsys)
    check_mistake(code, lines, "cannot be read")
    assert any(f"sample {name!r}" in lines[0] for name in bad)
    assert not (tmp_path / "run").exists()


# -- trackers --------------------------------------------------------------------------------------------------


def files_of(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_no_tracker_writes_nothing(make_arguments, tmp_path):
    train_here(1, make_arguments(1, tmp_path / "run", "--run.tracker=none"))
    left = {name for name in files_of(tmp_path / "run") if not name.startswith("final/")}
    assert left == {"config.yaml", "environment.json", "log.txt"}


def test_tensorboard_gets_what_the_log_says(make_arguments, tmp_path):
    train_here(1, make_arguments(1, tmp_path / "run", *BOARD, "--run.name=mine"))
    assert list((tmp_path / "run/mine").rglob("events.out.tfevents.*"))  # its folder bears the run's name
    metrics = logged(tmp_path / "run")
    assert sorted(metrics) == [1, 2]
    for step, values in metrics.items():
        assert {"loss", "encoder_llm/nll", "gradient_norm", "learning_rate", "tok/s", "samples/s"} <= set(values)
        line = next(x for x in (tmp_path / "run/log.txt").read_text().splitlines() if x.startswith(f"update {step} "))
        assert f"encoder_llm/nll {values['encoder_llm/nll']:.4g}" in line


def test_wandb_writes_an_offline_run(make_arguments, tmp_path, monkeypatch):
    import wandb  # here, for the workers that do not run this test

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "300")  # seconds for its service to start
    wandb.teardown()  # else it keeps the mode that it was first used with in this process
    train_here(1, make_arguments(1, tmp_path / "run", "--run.tracker=wandb", "--run.name=mine"))
    wandb.teardown()  # as a process that ends does it: its service writes the record's last lines only then
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    (record,) = offline.glob("*.wandb")
    content = record.read_bytes()
    assert b"encoder_llm/nll" in content and b"train.learning_rate" in content and b"mine" in content
    assert re.search(rb'data\.cache_dir[^"]{1,6}null', content)  # a null, and no text


# -- how fast it is --------------------------------------------------------------------------------------------


def test_the_log_tells_where_the_time_goes_and_a_trace_is_written(make_arguments, tmp_path):
    args = make_arguments(1, tmp_path / "run", *BOARD, "--train.profile=1", "--data.num_workers=1", steps=4)
    train_here(1, args)
    updates, names = logged(tmp_path / "run"), ("data", "forward", "backward", "optimizer")
    shares = [[updates[number][f"{name}_share"] for name in names] for number in (1, 2, 3, 4)]
    assert min(map(min, shares)) >= 0 and max(map(sum, shares)) <= 1.001
    assert max(map(sum, shares)) > 0.1  # of an update during which this process was not kept waiting
    values = updates[4]
    assert 0 < values["MFU"] < 1 and values["TFLOP/s"] > 0 and values["tok/s"] > values["samples/s"] > 0
    trace = json.loads((tmp_path / "run/profile/trace-0.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_operations_are_counted_by_the_shapes():
    """Of two layers of which the first is frozen: forward twice, weights once, inputs once."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Unflatten(1, (1, 16)), torch.nn.Conv1d(1, 4, 3))
    meter = Meter(Accelerator(cpu=True))
    layers[0].requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    with meter.phase("forward"):
        layers(x)
    assert meter.flops == 2 * 5 * 8 * 16 * 2 + 2 * (4 * 3) * (5 * 14) * 3
