"""Optimization: parameter groups with rates by part, the schedule, moving averages, and compiled layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from anygpt.errors import InputError, refusing
from anygpt.model.multimodal import MultimodalModel
from anygpt.training.config import Config, TrainConfig
from anygpt.training.sharding import is_sharded
from anygpt.training.stages import part_kinds

BASE = "learning_rate"
_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def parameter_groups(model: MultimodalModel, train: TrainConfig) -> list[dict[str, Any]]:
    """Groups of trainable parameters by peak rate, with the `name` under which the rate is logged.

    A part's own entry in `train.learning_rates`, which must train, takes precedence over that of its kind, and
    `train.learning_rate` is the default.
    """
    kinds, rates, base = part_kinds(model), train.learning_rates, train.learning_rate
    if unknown := sorted(set(rates) - {*kinds, *kinds.values()}):
        known = dict.fromkeys([*kinds.values(), *kinds])
        raise InputError(f"train.learning_rates names {', '.join(unknown)}; the parts are {', '.join(known)}")
    name_of = {
        id(parameter): next((name for name in (part, kind) if name in rates), "")
        for part, kind in kinds.items()
        for parameter in model.part_parameters(part)
    }
    groups: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(name_of.get(id(parameter), ""), []).append(parameter)
    # If no signal rows train, a rate for them is not a mistake.
    idle = sorted(set(rates) - set(groups) - ({"signal_tokens"} if train.signal_rows == "none" else set()))
    if idle:
        raise InputError(f"train.learning_rates names {', '.join(idle)}, of which nothing trains; leave it out")
    return [
        {"params": groups[name], "lr": rates.get(name, base), "name": f"{BASE}/{name}" if name else BASE}
        for name in sorted(groups)
    ]


def make_optimizer(model: MultimodalModel, config: Config) -> tuple[torch.optim.AdamW, Any]:
    """AdamW over the trainable parameters, and its schedule over `train.max_steps`."""
    train = config.train
    optimizer = torch.optim.AdamW(parameter_groups(model, train), weight_decay=train.weight_decay, fused=True)
    return optimizer, get_scheduler(_SCHEDULERS[train.scheduler], optimizer, train.warmup_steps, train.max_steps)


def clip_gradients(model: MultimodalModel, optimizer: Any, bound: float, accelerator: Accelerator) -> float:
    """Clip the gradients to a norm of `bound`; returns the norm before clipping.

    In a single process, parameters without a gradient get zeros, as they do on several (`touch_trainable`), so that the
    optimizer treats them alike.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in trained:
        if parameter.grad is None and not torch.distributed.is_initialized():
            parameter.grad = torch.zeros_like(parameter)
    # accelerate recognizes a sharded model by the list of all its parameters.
    clipped = model.parameters() if is_sharded(accelerator) else trained
    return float(accelerator.clip_grad_norm_(clipped, bound))


class Averages:
    """Exponential moving averages of a model's trainable parameters (EMA); does nothing without `train.ema_decay`.

    After update n the decay is min(ema_decay, n / (n + 9)), and 0 for n = 1, so that the start is soon forgotten.
    """

    def __init__(self, model: MultimodalModel, train: TrainConfig):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.used_for = train.ema_for
        self.ema = None if train.ema_decay is None else EMAModel(self.parameters, decay=train.ema_decay)

    def step(self) -> None:
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextmanager
    def instead(self, where: str) -> Iterator[None]:
        """Replace the weights by the averages within the block, if `train.ema_for` names this place."""
        if self.ema is None or where not in self.used_for:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @property
    def evaluated(self) -> bool:
        """Whether evaluations use the averages, which differ from a checkpoint's own tensors."""
        return self.ema is not None and "evaluation" in self.used_for

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the optimizer's state."""
        return {} if self.ema is None else {"ema": self.ema.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.parameters[0].device)


def compile_layers(model: MultimodalModel) -> None:
    """Apply torch.compile to the repeated layers of encoders, language model and denoisers.

    Whole parts would recompile at each step, because hooks insert the signal tokens into the language model; and layers
    of one class share their compiled code. Where torch.compile does not work, an `InputError` says so.
    """
    advice = "; install what it needs (on a CPU a C++ compiler, on a GPU Triton), or turn it off"
    with refusing("train.compile is on, but torch.compile does not work here", advice=advice):
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=model.device))
    torch._dynamo.reset()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
    for decoder in model.decoders.values():
        denoiser = decoder.module.denoiser
        if getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks(dynamic=True)
