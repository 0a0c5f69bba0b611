"""Moving averages of what trains: their formula, their place in evaluation and `final/`, and an exact resume."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_utils import arguments, toy_data, train_here

from anygpt.errors import InputError
from anygpt.training.config import TrainConfig, parse_config

DECAY, STEPS = 0.6, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


def start(data, output, *more):
    options = ("--train.ema_decay", DECAY, "--train.save_steps", 1, "--train.keep_checkpoints", STEPS, *more)
    return arguments(1, data / "stage1.jsonl", output, *options, steps=STEPS)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("ema") / "run"
    train_here(1, start(data, folder))
    return folder


def weights(folder):
    return {name: x for name, x in load_file(folder / "model.safetensors").items() if "projector" in name}


def averages(folder):
    return torch.load(folder / "optimizer.pt", weights_only=True)["ema"]


def test_the_averages_are_those_of_the_weights(run, data):
    """Shadow ← d·shadow + (1 − d)·weights with d = min(decay, n / (n + 9)) after update n; n = 1 takes the weights."""
    steps = [weights(run / f"checkpoint-{n}") for n in range(1, STEPS + 1)]
    expected = steps[0]
    for n, now in enumerate(steps[1:], start=1):
        d = min(DECAY, (1 + n) / (10 + n))
        expected = {name: d * expected[name] + (1 - d) * now[name] for name in now}
    final = weights(run / "final")
    for name, wanted in expected.items():
        torch.testing.assert_close(final[name], wanted, rtol=1e-5, atol=1e-7)
        assert not torch.equal(final[name], steps[-1][name])
    shadow = averages(run / f"checkpoint-{STEPS}")["shadow_params"]
    assert {x.shape for x in shadow} <= {x.shape for x in final.values()} and len(shadow) == len(final)


@pytest.mark.parametrize("step", [1, 3])
def test_resume_is_bit_identical(run, data, tmp_path, step):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(again / f"checkpoint-{later}")
    shutil.rmtree(again / "final")
    train_here(1, start(data, again))
    last = f"checkpoint-{STEPS}"
    for folder in ("final", last):
        ours, theirs = weights(again / folder), weights(run / folder)
        assert ours and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = averages(again / last), averages(run / last)
    assert all(map(torch.equal, ours.pop("shadow_params"), theirs.pop("shadow_params"))) and ours == theirs


def test_where_they_are_used_is_a_setting(run, data, tmp_path):
    """Without `final` there the weights are written; evaluation with the averages differs from one without."""
    evaluation = ("--data.eval", f"[{{path: {data / 'stage1.jsonl'}}}]", "--train.eval_steps", STEPS)
    losses = {}
    for used in ("evaluation", "final"):
        folder = tmp_path / used
        train_here(1, start(data, folder, "--train.ema_for", f"[{used}]", *evaluation))
        state = json.loads((folder / f"checkpoint-{STEPS}/training_state.json").read_text())
        losses[used] = state["metrics"]["eval/loss"]
        averaged = weights(run / "final") if used == "final" else weights(run / f"checkpoint-{STEPS}")
        assert all(torch.equal(x, averaged[name]) for name, x in weights(folder / "final").items())
    assert losses["evaluation"] != losses["final"]


def test_the_averages_of_a_kept_checkpoint_are_written_by_a_run_of_no_updates(data, tmp_path):
    args = start(data, tmp_path / "run", "--train.keep_best", "max:loss", "--train.num_epochs", 2)
    train_here(1, args)
    (line,) = [one for one in (tmp_path / "run/log.txt").read_text().splitlines() if "its averages" in one]
    options = shlex.split(line.partition(": ")[2])
    checkpoint = Path(options[0].removeprefix("--run.resume="))
    assert checkpoint.name != f"checkpoint-{STEPS}"
    train_here(1, [*args, "--run.output_dir", str(tmp_path / "best"), *options])
    written = weights(tmp_path / "best/final")
    shadow = averages(checkpoint)["shadow_params"]
    assert len(written) == len(shadow) and all(any(torch.equal(x, y) for y in shadow) for x in written.values())


def test_wrong_settings_are_refused():
    assert TrainConfig().ema_decay is None
    for name, value in (("ema_decay", "1.0"), ("ema_decay", "0"), ("ema_for", "[chat]")):
        with pytest.raises(InputError, match=f"train.{name}"):
            parse_config(["--model.init_from=x", "--data.train=[{path: x}]", f"--train.{name}={value}"])
