"""Support for FSDP2, which shards parameters and optimizer, and DeepSpeed, which owns the optimizer.

Under FSDP2 a process holds a part of each tensor. For saving, the trainable parameters are gathered into a full copy of
the model in the main process's memory.
"""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from anygpt.encoders.module import base_model
from anygpt.errors import InputError
from anygpt.model.multimodal import MultimodalModel
from anygpt.training.config import Config

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, config: Config, resumes: bool) -> None:
    """Raise `InputError` for settings that FSDP or DeepSpeed does not support."""
    train, faults = config.train, []
    sharded, deepspeed = is_sharded(accelerator), accelerator.distributed_type == DistributedType.DEEPSPEED
    if sharded and not accelerator.is_fsdp2:
        faults.append("only FSDP2 is supported; set fsdp_version: 2 in accelerate's config")
    if train.ema_decay is not None and (sharded or deepspeed):
        faults.append("train.ema_decay needs whole parameters on every process: use DDP, or leave it out")
    if deepspeed:
        if train.gradient_accumulation_steps != 1:
            faults.append("train.gradient_accumulation_steps must be 1 under DeepSpeed, which would average its parts")
        if train.save_steps or resumes:
            faults.append(
                "under DeepSpeed there are no checkpoints to continue from (its optimizer's state is pickled); set "
                "train.save_steps to 0, or use DDP or FSDP2"
            )
    if faults:
        raise InputError("; ".join(faults))


def prepare(model: MultimodalModel, optimizer: Any, accelerator: Accelerator, config: Config) -> tuple[Any, Any, Any]:
    """The model and optimizer, prepared by accelerate, and the model to save: if sharded, a full copy on the main
    process and None on the others."""
    whole = model
    if is_sharded(accelerator):
        whole = copy.deepcopy(model).cpu() if accelerator.is_main_process else None
        # Shard each layer of the language model by itself; accelerate reads their class from the model.
        model._no_split_modules = list(base_model(model.language_model)._no_split_modules or [])
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.train.batch_size
        settings["gradient_clipping"] = config.train.max_grad_norm
    return *accelerator.prepare(model, optimizer), whole


def gather_into(whole: MultimodalModel | None, model: MultimodalModel) -> None:
    """Copy trainable parameters of a sharded model into the full copy (None except on the main process); collective."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and whole is not model:
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if whole is not None:
                tensors[name] = tensor.cpu()
    if tensors:
        missing = whole.load_state_dict(tensors, strict=False).unexpected_keys
        assert not missing, f"{missing} are not in the whole copy"


def optimizer_state(model: MultimodalModel, optimizer: Any, accelerator: Accelerator) -> dict[str, Any]:
    """Unsharded state of the optimizer, if sharded on the main process only; empty under DeepSpeed. Collective."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {}
    if is_sharded(accelerator):
        return get_optimizer_state_dict(model, optimizer.optimizer, options=_WHOLE)
    return optimizer.state_dict()


def load_optimizer_state(model: MultimodalModel, optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned into a prepared optimizer."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer.optimizer, state, options=whole)
    else:
        optimizer.load_state_dict(state)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor; an unsharded tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
