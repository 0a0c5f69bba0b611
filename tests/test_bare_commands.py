"""Stages as people type them first: without a configuration, and under a launcher that has something to say itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from training_utils import REPOSITORY, SCRIPTS, cli_here, launch

from anygpt import threads
from anygpt.training import cli
from anygpt.training.config import parse_config
from anygpt.training.stages import ENCODER_LLM, INSTRUCTION_TUNING, LLM_DECODER
from anygpt.training.tiny import make_data, with_tiny_config

STAGES = [ENCODER_LLM, LLM_DECODER, INSTRUCTION_TUNING]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with data to which nothing must be added."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        path = tmp_path / f"runs/toyworld/stage{number}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def leave(number):
    final = Path(f"runs/tiny/stage{number}/final")
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")


def test_a_stage_starts_from_what_is_there(folder, capsys):
    """Nothing, then stage 1's model, then stage 2's; the parts of the stages that were left out are brought along."""

    def model(stage):
        config = parse_config(with_tiny_config(stage, [], main=True)).model
        return config.init_from, set(config.encoders), config.language_model is not None, set(config.decoders)

    every = {"image", "video", "audio"}
    assert model(ENCODER_LLM) == (None, every, True, set())
    assert model(LLM_DECODER) == model(INSTRUCTION_TUNING) == (None, every, True, every)
    assert "stage3.yaml, from the pretrained parts; another with --config" in capsys.readouterr().out
    leave(1)
    assert model(LLM_DECODER) == model(INSTRUCTION_TUNING) == ("runs/tiny/stage1/final", every, True, every)
    leave(2)
    assert model(INSTRUCTION_TUNING) == ("runs/tiny/stage2/final", set(), False, set())
    assert "from runs/tiny/stage2/final" in capsys.readouterr().out


def test_what_is_given_counts(folder):
    given = ["--train.max_steps=3", "--train.warmup_steps", "0", "--model.init_from", "x"]
    config = parse_config(with_tiny_config(LLM_DECODER, given, main=False))
    assert (config.train.max_steps, config.model.init_from, config.train.batch_size) == (3, "x", 32)
    file = ["--config", str(REPOSITORY / "tests/configs/stage1.yaml")]
    assert with_tiny_config(ENCODER_LLM, file, main=True) == file
    assert with_tiny_config(ENCODER_LLM, ["--help"], main=True) == ["--help"]


def test_data_are_made_where_there_are_none(tmp_path):
    path = tmp_path / "toyworld/stage1.jsonl"
    make_data(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 1600
    before = path.stat().st_mtime_ns
    make_data(path)
    assert path.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_bare_commands_train_three_stages(tmp_path):
    few = ["--train.max_steps", "2", "--train.warmup_steps", "0", "--train.ridge_captions", "32"]
    accelerate = Path(sys.executable).parent / "accelerate"
    for number in (1, 2, 3):
        command = [accelerate, "launch", REPOSITORY / SCRIPTS[number], *few]
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("No --config: this is ")
        assert (tmp_path / f"runs/tiny/stage{number}/final/config.json").is_file()
        config = yaml.safe_load((tmp_path / f"runs/tiny/stage{number}/config.yaml").read_text())
        assert config["model"]["init_from"] == (f"runs/tiny/stage{number - 1}/final" if number > 1 else None)


# -- the last line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", ["one_process", "two_processes_cpu"])
def test_our_line_is_the_last_under_a_launcher(processes):
    done = launch(1, ["--train.max_stes", "4"], processes=processes)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "did you mean train.max_steps?" in last
    assert done.stderr.count(last) == 1


def test_without_a_launcher_the_line_is_all(capsys):
    code, lines = cli_here(1, ["--config", "absent.yaml"], capsys)
    assert code == 2 and len(lines) == 1


def test_other_processes_give_the_first_time_to_say_it(monkeypatch, capsys):
    """The launcher ends all once one has ended."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "find_launcher", lambda: 1)
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=waited.append))
    said = []
    monkeypatch.setattr(cli, "say_last", lambda line, launcher: said.append((line, list(waited))))
    assert cli_here(1, ["--config", "absent.yaml"], capsys) == (2, [])
    ((line, before),) = said  # where the first process has no such mistake, and so did not end this one
    assert "absent.yaml" in line and before == [cli.PATIENCE]


# -- threads -----------------------------------------------------------------------------------------------------

LOOK = """
import os, runpy, sys
def hook(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
        os._exit(0)  # what comes after it takes seconds, and says no more
sys.addaudithook(hook)
sys.argv = ["stage", "--help"]
runpy.run_path("stages/stage1_encoder_llm.py", run_name="__main__")
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_give_their_core_away(given, expected):
    """OpenMP reads it when torch is loaded, so it must be there before."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    command = [sys.executable, "-c", LOOK]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True)
    assert done.stdout == f"{expected}\n", done.stderr


@pytest.mark.parametrize("path", [p for folder in ("scripts", "stages") for p in (REPOSITORY / folder).rglob("*.py")])
def test_anygpt_is_imported_before_what_loads_torch(path):
    modules = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    loads = {"torch", "transformers", "diffusers", "accelerate", "datasets", "peft", "safetensors", "benchmarks"}
    first = next((name for name in modules if name in {"anygpt", *loads}), "anygpt")
    assert first == "anygpt", path


def test_tiny_models_take_the_fastest_number_of_threads(monkeypatch, parts):
    model, chosen = parts.language_model(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(threads, "seconds_of_forward", lambda model, rows: abs(chosen[-1] - 2.2))
    assert threads.choose_threads(model) == 2 and sorted(chosen[:-1]) == [1, 2, 4, 6] and chosen[-1] == 2
    monkeypatch.setattr(threads, "TINY", 0)
    assert threads.choose_threads(model) == 6
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.choose_threads(model) == torch.get_num_threads()
