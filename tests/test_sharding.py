"""What differs under FSDP2 and DeepSpeed, as far as a CPU can show it; `scripts/gpu_test.py` shows the rest."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_utils import load_script

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
        (FSDP, {"sample_steps": 5}, False, "train.sample_steps must be 0"),
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


# -- scripts/gpu_test.py ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    return load_script("gpu_test")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_passes(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_test.py"])
    assert script.main() == 2
    assert "nothing was tried" in capsys.readouterr().err


def test_losses_are_read_from_the_log_and_compared(script, tmp_path):
    (tmp_path / "log.txt").write_text("stage 1\nupdate 1  loss 2.5  encoder_llm/nll 2.5  tok/s 9\nfinished: x\n")
    losses = script.read_losses(tmp_path)
    assert losses == {1: {"loss": 2.5, "encoder_llm/nll": 2.5}}
    near, far = {1: {"loss": 2.51, "encoder_llm/nll": 2.5}}, {1: {"loss": float("nan"), "encoder_llm/nll": 2.5}}
    assert "0.40%" in script.difference(losses, near, 0.02)
    for other in (far, {1: {"loss": 2.5}}, {2: losses[1]}):
        with pytest.raises(script.Failed):
            script.difference(losses, other, 0.02)
