"""What differs under FSDP2 and DeepSpeed, as far as a CPU can show it; `scripts/gpu_test.py` shows the rest."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_utils import (
    argument_maker,
    launch,
    launch_command,
    load_script,
    start_process,
    toy_data,
    train_here,
    trained_tensors,
    wait_for,
)

from anygpt.errors import InputError
from anygpt.training.config import Config
from anygpt.training.sharding import check_sharding, gather_into, load_optimizer_state, local, optimizer_state

FSDP = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
DEEPSPEED = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def model_and_optimizer(whole, mesh=None):
    """A copy that is sharded where there is a mesh, and AdamW over what trains, as accelerate wraps it."""
    model = copy.deepcopy(whole)
    if mesh is not None:
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, SimpleNamespace(optimizer=optimizer)


def update(model, optimizer):
    model(torch.arange(4.0).view(1, 4)).square().sum().backward()
    optimizer.optimizer.step()
    optimizer.optimizer.zero_grad()


def test_a_sharded_model_is_saved_whole_and_goes_on(mesh):
    """As a run of two updates that is stopped between them, and as one that is not sharded at all."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    whole[0].requires_grad_(False)
    plain, its_optimizer = model_and_optimizer(whole)
    model, optimizer = model_and_optimizer(whole, mesh)
    assert isinstance(model[1].weight, DTensor) and not isinstance(local(model[1].weight), DTensor)
    update(plain, its_optimizer)
    update(model, optimizer)
    saved = copy.deepcopy(whole)
    gather_into(saved, model)
    state = optimizer_state(model, optimizer, FSDP)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), plain.parameters(), strict=True))
    tensors = [t for entry in state["state"].values() for t in entry.values()]
    assert tensors and not any(isinstance(tensor, DTensor) for tensor in tensors)

    model, optimizer = model_and_optimizer(saved, mesh)
    load_optimizer_state(model, optimizer, state)
    update(plain, its_optimizer)
    update(model, optimizer)
    gather_into(saved, model)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("accelerator", "setting", "resumes", "said"),
    [
        (SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False), {}, False, "fsdp_version: 2"),
        (DEEPSPEED, {"gradient_accumulation_steps": 2}, False, "gradient_accumulation_steps must be 1"),
        (DEEPSPEED, {"save_steps": 5}, False, "train.save_steps to 0"),
        (DEEPSPEED, {}, True, "no checkpoints to continue from"),
    ],
)
def test_what_cannot_be_done_is_refused(accelerator, setting, resumes, said):
    config = Config()
    for name, value in setting.items():
        setattr(config.train, name, value)
    with pytest.raises(InputError, match=said):
        check_sharding(accelerator, config, resumes)


# -- two processes on the CPU ----------------------------------------------------------------------------------

FSDP2 = "two_processes_cpu_fsdp2"


@pytest.fixture(scope="module")
def make_arguments(tmp_path_factory):
    return argument_maker(tmp_path_factory)


def with_everything(data, folder, stage, *more):
    """Checkpoints, evaluation over a number of rows that two processes cannot share, samples, noise."""
    rows = (data / f"stage{stage}.jsonl").read_text().splitlines(keepends=True)[:3]
    (folder / f"eval{stage}.jsonl").write_text("".join(rows))
    held_out = f"[{{path: {folder / f'eval{stage}.jsonl'}, media_root: {data}}}]"
    due = ("--train.save_steps=2", "--train.eval_steps=2", "--train.sample_steps=2", "--train.sample_rows=2")
    losses = {1: (), 2: ("--loss.denoising=1",), 3: ("--loss.denoising=1", "--loss.retention=1")}[stage]
    return ("--data.eval", held_out, *due, *losses, *more)


def updates_of(folder):
    """What each logged update says of losses."""
    lines = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("update ")]
    return [re.sub(r"  learning_rate.*", "", line) for line in lines]


def test_sharded_processes_are_one_process(make_arguments, tmp_path_factory, tmp_path):
    """A stage with evaluation, samples and a checkpoint, from whose files one process goes on to the same end."""
    more = with_everything(toy_data(tmp_path_factory), tmp_path, 1)
    sharded, alone = tmp_path / "sharded", tmp_path / "alone"
    done = launch(1, make_arguments(1, sharded, *more, steps=2, batch_size=2), processes=FSDP2)
    assert done.returncode == 0, done.stderr
    train_here(1, make_arguments(1, alone, *more, steps=2, batch_size=4))
    first, second = trained_tensors(sharded / "final"), trained_tensors(alone / "final")
    assert first.keys() == second.keys()
    assert max(float((first[n] - second[n]).norm() / second[n].norm()) for n in first) < 1e-6
    assert (sharded / "samples/000002/index.jsonl").read_text() == (alone / "samples/000002/index.jsonl").read_text()
    settings = [json.loads((folder / "checkpoint-2/config.json").read_text()) for folder in (sharded, alone)]
    trained = [one.pop("trained") for one in settings]
    assert settings[0] == settings[1]
    assert trained[0]["losses"] == pytest.approx(trained[1]["losses"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharding_is_ddp(make_arguments, tmp_path_factory, tmp_path, stage):
    """To 1e-6, and a run that is killed and goes on is bit for bit the one that was left alone."""
    more = with_everything(toy_data(tmp_path_factory), tmp_path, stage)
    folders = {name: tmp_path / name for name in ("two_processes_cpu", FSDP2, "killed")}
    for name, folder in folders.items():
        args = make_arguments(stage, folder, *more, steps=4, batch_size=2)
        processes = FSDP2 if name == "killed" else name
        if name == "killed":
            process = start_process(*launch_command(stage, args, processes))
            wait_for(lambda log=folder / "log.txt": log.exists() and "update 3  " in log.read_text(), process)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            shutil.rmtree(folder / "final", ignore_errors=True)
        done = launch(stage, args, processes=processes)
        assert done.returncode == 0, done.stderr
    ddp, sharded, killed = (trained_tensors(folder / "final") for folder in folders.values())
    assert max(float((sharded[n] - ddp[n]).norm() / ddp[n].norm()) for n in ddp) < 1e-6
    assert all(torch.equal(sharded[name], killed[name]) for name in sharded)
    assert updates_of(folders[FSDP2]) == updates_of(folders["two_processes_cpu"])


# -- scripts/gpu_test.py ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    return load_script("gpu_test")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_passes(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_test.py"])
    assert script.main() == 2
    assert "nothing was run" in capsys.readouterr().err


def test_losses_are_read_from_the_log_and_compared(script, tmp_path):
    (tmp_path / "log.txt").write_text("stage 1\nupdate 1  loss 2.5  encoder_llm/nll 2.5  tok/s 9\nfinished: x\n")
    losses = script.read_losses(tmp_path)
    assert losses == {1: {"loss": 2.5, "encoder_llm/nll": 2.5}}
    near, far = {1: {"loss": 2.51, "encoder_llm/nll": 2.5}}, {1: {"loss": float("nan"), "encoder_llm/nll": 2.5}}
    assert "0.40%" in script.difference(losses, near, 0.02)
    for other in (far, {1: {"loss": 2.5}}, {2: losses[1]}):
        with pytest.raises(script.Failed):
            script.difference(losses, other, 0.02)
