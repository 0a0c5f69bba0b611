"""Details of running diffusers pipelines: offloading hooks and step callbacks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


def is_hooked(pipeline: DiffusionPipeline) -> bool:
    """Whether offloading keeps a pipeline's weights on another device than the one it computes on."""
    networks = [x for x in pipeline.components.values() if isinstance(x, nn.Module)]
    # accelerate's hooks and diffusers' block-level ones are on the networks, diffusers' leaf-level ones on the leaves.
    leaves = [next((m for m in network.modules() if m._parameters), network) for network in networks]
    return any(hasattr(module, hook) for module in networks + leaves for hook in ("_hf_hook", "_diffusers_hook"))


def step_callback(pipeline: DiffusionPipeline, on_step: Callable[[int, int], None]) -> dict[str, Any]:
    """Arguments of a pipeline's call that make it call `on_step`, in diffusers' older or newer form."""
    scheduler = pipeline.scheduler
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:

        def at_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, len(scheduler.timesteps))
            return tensors

        return {"callback_on_step_end": at_step_end}

    def callback(step: int, timestep: Any, latents: Any) -> None:
        # the older form counts sampler steps of `order` evaluations each
        on_step(step + 1, math.ceil(len(scheduler.timesteps) / getattr(scheduler, "order", 1)))

    return {"callback": callback, "callback_steps": 1}
