"""The loop: losses fall, splits agree, runs can be killed and go on, and what goes wrong stops it in time."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training_utils import (
    SCRIPTS,
    STAGES,
    arguments,
    assert_same_losses,
    change_tensors,
    check_mistake,
    cli_here,
    launch,
    logged,
    losses_of,
    reset_accelerate,
    run_script,
    shared,
    start_of,
    start_process,
    tensors_of,
    toy_data,
    train_here,
    trained_tensors,
)

from anygpt.data.collation import TARGET_IDS, Collator, move
from anygpt.training.config import parse_config
from anygpt.training.loop import make_generators, make_loader, take_updates, update, use_frames_of
from anygpt.training.setup import build_dataset
from anygpt.training.tracking import RunLog

BOARD = ("--run.tracker", "tensorboard")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


@pytest.fixture(scope="module")
def stage2_final(tmp_path_factory, data):
    """A `final/` folder with all parts, for stage 3 to start from."""

    def make(folder):
        args = arguments(2, data / "stage2.jsonl", folder / "run", "--model.init_from", "null", steps=1)
        train_here(2, args)

    return shared(tmp_path_factory, "stage2_start", make) / "run/final"


@pytest.fixture
def make_arguments(data, stage2_final):
    """`make_arguments(stage, output, *more, **options)`, each stage with its own data and start."""

    def make(stage, output, *more, **options):
        more = ("--model.init_from", "null", *more) if stage == 2 else more
        start = stage2_final if stage == 3 else None
        return arguments(stage, data / f"stage{stage}.jsonl", output, *more, init_from=start, **options)

    return make


class Bench:
    """The pieces of a run, with its first batches at hand."""

    def __init__(self, stage, args, optimizer, folder):
        reset_accelerate()
        self.config = parse_config(args)
        self.accelerator = Accelerator(cpu=True)
        self.model, processor, self.names = start_of(stage, args)
        dataset = build_dataset(self.config.data.train, self.model, self.config, STAGES[stage])
        use_frames_of(dataset, processor)
        loader = make_loader(dataset, Collator(processor), self.config, self.accelerator, start=0)
        self.batches = next(take_updates(loader, self.config))
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        folder.mkdir(exist_ok=True)
        self.log = RunLog(self.accelerator, self.config, 1, 0)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer(self.parameters.values()))
        self.wrapped.train()

    def update(self, step=0):
        return update(
            *(self.wrapped, self.model, self.optimizer, self.batches, step),
            *(self.config, self.accelerator, self.log),
        )


# -- what an update does ---------------------------------------------------------------------------------------

EXPECTED = {
    1: {"encoder_llm/nll"},
    2: {"llm_decoder/nll"}
    | {f"llm_decoder/{sub}/{key}" for sub in ("alignment", "denoising") for key in ("image", "video", "audio")},
    3: {f"{term}/nll" for term in ("llm", "encoder_llm", "llm_decoder", "encoder_decoder")}
    | {"encoder_decoder/alignment/image", "llm_decoder/denoising/audio"},
}


DENOISING_ALONE = ("--loss.nll=0", "--loss.alignment=0")


@pytest.mark.parametrize(
    ("stage", "weights"),
    [(1, ()), (2, ("--loss.denoising=0",)), (2, DENOISING_ALONE), (3, ("--loss.denoising=0",)), (3, DENOISING_ALONE)],
    ids=["1", "2 NLL and alignment", "2 denoising", "3 NLL and alignment", "3 denoising"],
)
def test_every_loss_falls_on_a_fixed_batch(make_arguments, tmp_path, stage, weights):
    """And nothing that is frozen changes by a bit, buffers included, while everything else gets a gradient.

    Denoising is looked at alone: its slope through a random UNet is a hundredth of the others'.
    """
    args = make_arguments(stage, tmp_path / "run", *weights, batch_size=12)
    bench = Bench(stage, args, lambda p: torch.optim.AdamW(p, lr=1e-2 if stage == 1 else 3e-3), tmp_path / "run")
    frozen = {name: t.clone() for name, t in tensors_of(bench.model).items() if name not in bench.names}
    with_gradient = set()
    for name, parameter in bench.parameters.items():
        parameter.register_hook(lambda g, n=name: with_gradient.add(n) if g.abs().max() > 0 else None)
    runs = [bench.update(step=0) for _ in range(20)]  # step 0 each time: the same noise
    first, final = runs[0], runs[-1]
    wanted = {name for name in EXPECTED[stage] if ("denoising" in name) == (weights == DENOISING_ALONE)}
    assert wanted <= set(first)
    assert first.keys() == final.keys()
    rising = {name: (first[name], final[name]) for name in first if final[name] >= first[name] and "norm" not in name}
    assert not rising
    silent = set(bench.names) - with_gradient
    if weights != DENOISING_ALONE:
        assert not silent
    else:
        assert {name for name in silent if "output_projector" in name or "input_rows" in name} == set()
    after = tensors_of(bench.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert any(name not in bench.model.state_dict() for name in frozen)  # buffers that are not saved were looked at


def test_an_update_is_the_same_however_it_is_split(make_arguments, tmp_path):
    """Plain SGD at rate 1 without clipping: what moves is the gradient itself."""
    results = []
    for size, parts in ((8, 1), (4, 2), (1, 8)):
        args = make_arguments(
            3, tmp_path / "run", f"--train.gradient_accumulation_steps={parts}", "--train.max_grad_norm=1e9", batch_size=size
        )
        bench = Bench(3, args, lambda p: torch.optim.SGD(p, lr=1.0), tmp_path / "run")
        before = {name: p.detach().clone() for name, p in bench.parameters.items()}
        ids = [sample for _, found in bench.batches for sample in found["sample_ids"]]
        metrics = bench.update()
        results.append((ids, metrics, {n: before[n] - p.detach() for n, p in bench.parameters.items()}))
    whole = results[0]
    kinds = [{name.split("/")[0] for name in whole[1]}]
    assert {"llm", "encoder_llm", "llm_decoder", "encoder_decoder"} <= kinds[0]
    for ids, metrics, gradients in results[1:]:
        assert ids == whole[0]
        assert metrics.keys() == whole[1].keys()
        for name, value in metrics.items():
            assert value == pytest.approx(whole[1][name], rel=2e-6), name
        size = torch.cat([g.flatten() for g in whole[2].values()]).norm()
        difference = torch.cat([(gradients[n] - g).flatten() for n, g in whole[2].items()]).norm()
        assert difference < 2e-6 * size
        for name, gradient in whole[2].items():
            assert (gradients[name] - gradient).norm() < 2e-5 * gradient.norm() + 1e-7 * size, name


def test_the_logged_loss_is_the_weighted_sum_of_its_terms(make_arguments, tmp_path):
    weights = ("--loss.nll=0.5", "--loss.llm_decoder=2", "--loss.denoising=0", "--loss.by_modality={image: 3}")
    args = make_arguments(2, tmp_path / "run", *BOARD, *weights, steps=2, batch_size=6)
    train_here(2, args)
    for metrics in losses_of(tmp_path / "run").values():
        terms = {name: value for name, value in metrics.items() if "/" in name}
        assert not any("denoising" in name for name in terms)
        total = sum(
            value * 2 * (0.5 if name.endswith("nll") else 1) * (3 if name.endswith("image") else 1)
            for name, value in terms.items()
        )
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)


def test_rows_without_a_weighted_loss_do_no_harm(make_arguments, tmp_path):
    args = make_arguments(3, tmp_path / "run", *BOARD, "--loss.llm=0", "--loss.encoder_llm=0", steps=6, batch_size=1)
    train_here(3, args)
    seen = logged(tmp_path / "run")
    assert min(metrics["loss"] for metrics in seen.values()) == 0  # some row was of those kinds
    assert max(metrics["loss"] for metrics in seen.values()) > 0


# -- several processes -----------------------------------------------------------------------------------------


def test_two_processes_are_one_with_twice_the_batch(make_arguments, tmp_path):
    """With one row a process, each lacks most modalities in every update."""
    two, one = tmp_path / "two", tmp_path / "one"
    done = launch(3, make_arguments(3, two, *BOARD, steps=4, batch_size=1), processes="two_processes_cpu")
    assert done.returncode == 0, done.stderr
    train_here(3, make_arguments(3, one, *BOARD, steps=4, batch_size=2))
    losses = losses_of(one)
    assert list(losses) == [1, 2, 3, 4]
    assert_same_losses(losses, losses_of(two), relative=1e-5)
    first, second = trained_tensors(one / "final"), trained_tensors(two / "final")
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first) < 1e-2
    log = (two / "log.txt").read_text()
    assert log.count("update 1  ") == 1  # one process writes


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_over_20_updates(make_arguments, tmp_path, stage):
    two, one = tmp_path / "two", tmp_path / "one"
    more = (*BOARD, "--train.gradient_accumulation_steps=2")
    done = launch(stage, make_arguments(stage, two, *more, steps=20, batch_size=2), processes="two_processes_cpu")
    assert done.returncode == 0, done.stderr
    train_here(stage, make_arguments(stage, one, *more, steps=20, batch_size=4))
    assert_same_losses(losses_of(one), losses_of(two), relative=1e-5)


# -- killed and resumed ----------------------------------------------------------------------------------------


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1]}")
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def kill_and_resume(stage, make, tmp_path, steps):
    """A run killed once it has a checkpoint and then continued, against one that was left alone."""
    more = ("--train.save_steps=2",) + (("--lora.dropout=0.1",) if stage == 3 else ())
    whole = train_here(stage, make(stage, tmp_path / "whole", *more, steps=steps))
    args = make(stage, tmp_path / "killed", *more, steps=steps)
    process = start_process(sys.executable, SCRIPTS[stage], *args)
    wait_for((tmp_path / "killed/checkpoint-2").exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (tmp_path / "killed/final").exists()
    resumed = train_here(stage, args)
    assert "continues from" in (tmp_path / "killed/log.txt").read_text()
    assert not list((tmp_path / "killed").glob(".*.incomplete"))
    first, second = trained_tensors(whole), trained_tensors(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_run_ends_as_if_it_had_not_been(make_arguments, tmp_path):
    kill_and_resume(3, make_arguments, tmp_path, steps=8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_runs_of_each_stage(make_arguments, tmp_path, stage):
    kill_and_resume(stage, make_arguments, tmp_path, steps=20)


def test_sigterm_to_the_group_writes_a_checkpoint(make_arguments, tmp_path):
    """Workers are in the group as well, and must not die before the update is done."""
    args = make_arguments(1, tmp_path / "run", "--data.num_workers=2", steps=60)
    process = start_process(sys.executable, SCRIPTS[1], *args)
    log = tmp_path / "run/log.txt"
    wait_for(lambda: log.exists() and "update 2  " in log.read_text(), process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert not (tmp_path / "run/final").exists()
    assert f"checkpoint after update {checkpoint.name.removeprefix('checkpoint-')} written" in log.read_text()
    resumed = train_here(1, args)
    whole = train_here(1, make_arguments(1, tmp_path / "whole", steps=60))
    first, second = trained_tensors(whole), trained_tensors(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoints_are_kept_by_count_and_their_settings_are_checked(make_arguments, tmp_path, capsys):
    args = make_arguments(1, tmp_path / "run", "--train.save_steps=1", "--train.keep_checkpoints=2", steps=4)
    train_here(1, args)
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]
    code, lines = cli_here(1, [*args, "--train.learning_rate=0.1"], capsys)
    check_mistake(code, lines, "checkpoint-4", "other settings", "run.resume=never")
    code, _ = cli_here(1, [*args, "--train.learning_rate=0.1", "--run.resume=never"], capsys)
    assert code == 0


# -- what goes wrong -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_step(data, stage2_final, tmp_path):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(stage2_final, poisoned)
    name = "image_encoder.projector"

    def poison(tensors):
        chosen = next(key for key in tensors if key.startswith(name) and key.endswith("weight"))
        tensors[chosen][0, 0] = float("nan")
        return tensors

    change_tensors(poisoned, poison)
    output = tmp_path / "run"
    args = arguments(3, data / "stage3.jsonl", output, "--train.save_steps=1", init_from=poisoned, steps=2)
    done = run_script(3, args)
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: update 1: ")
    first = Bench(3, [*args, "--run.output_dir", str(tmp_path / "bench")], _sgd, tmp_path / "bench").batches
    ids = [sample for _, found in first for sample in found["sample_ids"]]
    assert all(sample in line for sample in ids) and len(ids) == 6
    assert "not made" in line
    assert not (output / "final").exists() and not list(output.glob("checkpoint-*"))


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


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
    skip = ("--data.on_bad_sample=skip", *BOARD)
    train_here(1, arguments(1, path, tmp_path / "run", *skip, steps=12 // size, batch_size=size))
    metrics = logged(tmp_path / "run")
    assert metrics[12 // size]["skipped"] == len(bad)  # an epoch: each of them once
    assert all(torch.isfinite(t).all() for t in trained_tensors(tmp_path / "run/final").values())


def test_bad_samples_are_an_error_by_default(data, tmp_path, capsys):
    path, bad = spoiled(data, tmp_path, 3)
    code, lines = cli_here(1, arguments(1, path, tmp_path / "run", batch_size=12), capsys)
    check_mistake(code, lines, "cannot be read")
    assert any(f"sample {name!r}" in lines[0] for name in bad)
    assert not (tmp_path / "run").exists()


# -- settings --------------------------------------------------------------------------------------------------


def test_evaluation_during_training(make_arguments, data, tmp_path):
    held_out = ("--data.eval", f"[{{path: {data / 'stage2.jsonl'}}}]", "--train.eval_steps=2")
    more = (*held_out, *BOARD, "--train.learning_rate=1e-12")
    train_here(2, make_arguments(2, tmp_path / "run", *more, steps=4, batch_size=12))
    metrics = logged(tmp_path / "run")
    assert [step for step in metrics if "eval/loss" in metrics[step]] == [2, 4]
    names = {f"eval/{name}" for name in EXPECTED[2]}
    assert names <= set(metrics[2])
    # The rate is nearly nothing and both see all 12 rows: NLL and alignment are the same, and so is the noise twice.
    for name in ("llm_decoder/nll", "llm_decoder/alignment/image"):
        assert metrics[2][f"eval/{name}"] == pytest.approx(metrics[2][name], rel=1e-5)
    assert metrics[4]["eval/loss"] == pytest.approx(metrics[2]["eval/loss"], rel=1e-5)


def test_evaluation_does_not_disturb_training(make_arguments, data, tmp_path):
    held_out = ("--data.eval", f"[{{path: {data / 'stage3.jsonl'}}}]", "--train.eval_steps=1")
    dropout = "--lora.dropout=0.2"  # draws from the process's random state
    with_it = train_here(3, make_arguments(3, tmp_path / "with", dropout, *held_out, steps=3, batch_size=3))
    without = train_here(3, make_arguments(3, tmp_path / "without", dropout, steps=3, batch_size=3))
    first, second = trained_tensors(with_it), trained_tensors(without)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_workers_change_nothing(make_arguments, tmp_path):
    finals = [
        train_here(3, make_arguments(3, tmp_path / str(n), f"--data.num_workers={n}", *BOARD, steps=3)) for n in (0, 2)
    ]
    assert losses_of(tmp_path / "0") == losses_of(tmp_path / "2")
    first, second = map(trained_tensors, finals)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bf16_keeps_trained_tensors_in_float32(make_arguments, data, tmp_path):
    bf16 = ("--train.mixed_precision=bf16", *BOARD, "--train.eval_steps=2")
    held_out = ("--data.eval", f"[{{path: {data / 'stage2.jsonl'}}}]")
    args = make_arguments(2, tmp_path / "half", *bf16, *held_out, steps=2, batch_size=12)
    model, _, names = start_of(2, args)
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in names} == {torch.float32}
    assert model.language_model.dtype == torch.bfloat16
    assert next(model.decoders["image"].module.parameters()).dtype == torch.bfloat16
    final = train_here(2, args)
    tensors = trained_tensors(final)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    fine = tensors["signal_tokens.input_rows.image"]  # more than bfloat16 can hold
    assert not torch.equal(fine, fine.bfloat16().float())
    train_here(2, make_arguments(2, tmp_path / "full", *BOARD, steps=2, batch_size=12))
    half, full = losses_of(tmp_path / "half"), losses_of(tmp_path / "full")
    for name in EXPECTED[2]:
        assert half[1][name] == pytest.approx(full[1][name], rel=0.05), name


def test_gradient_checkpointing_changes_no_loss(make_arguments, tmp_path):
    for value in ("true", "false"):
        more = (*BOARD, f"--train.gradient_checkpointing={value}")
        train_here(3, make_arguments(3, tmp_path / value, *more, steps=2))
    assert_same_losses(losses_of(tmp_path / "false"), losses_of(tmp_path / "true"), relative=1e-5)


@pytest.mark.parametrize("rows", ["both", "output", "none"])
def test_which_signal_rows_train(make_arguments, tmp_path, rows):
    _, _, names = start_of(2, make_arguments(2, tmp_path / "run", f"--train.signal_rows={rows}"))
    found = {name.split(".")[1] for name in names if name.startswith("signal_tokens.")}
    assert found == {"both": {"input_rows", "output_rows"}, "output": {"output_rows"}, "none": set()}[rows]


# -- trackers --------------------------------------------------------------------------------------------------


def files_of(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_no_tracker_writes_nothing(make_arguments, tmp_path):
    train_here(1, make_arguments(1, tmp_path / "run", "--run.tracker=none"))
    assert {name for name in files_of(tmp_path / "run") if not name.startswith("final/")} == {"config.yaml", "log.txt"}


def test_tensorboard_gets_what_the_log_says(make_arguments, tmp_path):
    train_here(1, make_arguments(1, tmp_path / "run", *BOARD))
    metrics = logged(tmp_path / "run")
    assert sorted(metrics) == [1, 2]
    for step, values in metrics.items():
        assert {"loss", "encoder_llm/nll", "gradient_norm", "learning_rate", "tok/s", "samples/s"} <= set(values)
        line = next(x for x in (tmp_path / "run/log.txt").read_text().splitlines() if x.startswith(f"update {step} "))
        assert f"encoder_llm/nll {values['encoder_llm/nll']:.4g}" in line


def test_wandb_writes_an_offline_run(make_arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_here(1, make_arguments(1, tmp_path / "run", "--run.tracker=wandb", "--run.name=mine"))
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    (record,) = offline.glob("*.wandb")
    content = record.read_bytes()
    assert b"encoder_llm/nll" in content and b"train.learning_rate" in content and b"mine" in content


# -- noise -----------------------------------------------------------------------------------------------------


def test_noise_belongs_to_seed_update_and_target(make_arguments, tmp_path):
    """The denoising loss of a batch depends on the update's number, and on nothing that was drawn before."""
    args = make_arguments(2, tmp_path / "run", batch_size=3)
    bench = Bench(2, args, _sgd, tmp_path / "run")
    batch, ids = bench.batches[0]

    def losses(step, seed=0):
        generators = make_generators(ids[TARGET_IDS], seed, step)
        with torch.no_grad():
            found = bench.model(**move(batch, "cpu"), generators=generators).losses
        return {name: float(term.total) for name, term in found.items() if "denoising" in name}

    first = losses(step=1)
    assert first
    torch.rand(100)
    assert losses(step=1) == first
    for other in (losses(step=2), losses(step=1, seed=1)):
        assert all(other[name] != first[name] for name in first)
    targets = list(itertools.chain(*ids[TARGET_IDS].values()))
    assert len(set(targets)) == len(targets) == 3
