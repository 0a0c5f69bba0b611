"""Precision and memory of a pipeline: quantised networks, tiled VAEs, weights that wait on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers import auto as diffusers_quantizers
from torch import nn
from transformers.quantizers import auto as transformers_quantizers

from anygpt.errors import InputError

BACKENDS = {"torchao": "torchao", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
"""Package by quantisation backend, as diffusers calls them."""
OFFLOADS = ("model", "group")


def quantizers(config: Mapping[str, Any] | None, networks: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
    """The library's quantization config for each of a pipeline's networks that `config` names.

    Args:
        config: arguments of diffusers' `PipelineQuantizationConfig`: `quant_backend`, `quant_kwargs` and
            `components_to_quantize`, all networks by default. The `quant_type` of torchao is the name of one of its
            config classes (`Int8WeightOnlyConfig`), whose arguments stand beside it.
        networks: classes of the pipeline's networks.

    Raises:
        InputError: an unknown key, backend or network, an argument that the backend does not take, a missing package.
    """
    if config is None:
        return {}
    who, known = "quantization_config", ("quant_backend", "quant_kwargs", "components_to_quantize")
    if not isinstance(config, Mapping) or set(config) - set(known):
        raise InputError(f"{who} is {config!r:.200}; expected a mapping of {', '.join(known)}")
    backend, arguments = config.get("quant_backend"), config.get("quant_kwargs") or {}
    if backend not in BACKENDS:
        raise InputError(f"quant_backend of {who} is {backend!r}; expected {', '.join(BACKENDS)}")
    if importlib.util.find_spec(BACKENDS[backend]) is None:
        raise InputError(f"{who} needs the package {BACKENDS[backend]}, which is not installed")
    names = config.get("components_to_quantize") or list(networks)
    names = [names] if isinstance(names, str) else names
    if unknown := [name for name in names if name not in networks]:
        raise InputError(
            f"components_to_quantize of {who} names {unknown[0]!r}; expected some of {', '.join(networks)}"
        )
    with refusing(f"quant_kwargs of {who} are {arguments!r:.200}, which its library refuses"):
        if backend == "torchao":
            arguments = _torchao_arguments(**arguments)
        homes = {name: diffusers_quantizers if issubclass(networks[name], ModelMixin) else None for name in names}
        return {
            name: (home or transformers_quantizers).AUTO_QUANTIZATION_CONFIG_MAPPING[backend](**arguments)
            for name, home in homes.items()
        }


def _torchao_arguments(quant_type: str, modules_to_not_convert: list[str] | None = None, **options: Any) -> dict:
    library = importlib.import_module("torchao.quantization")
    kinds = [name for name in dir(library) if name.endswith("WeightOnlyConfig")]  # gradients pass through these
    if quant_type not in kinds:
        raise ValueError(f"quant_type {quant_type!r} is none of {', '.join(kinds)}")
    kind = getattr(library, quant_type)(**options)
    return {"quant_type": kind, "modules_to_not_convert": modules_to_not_convert}


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a library raises into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error


def quantize_outline(network: ModelMixin, config: Any) -> None:
    """Quantise a network on the meta device as loading would, with torchao; others keep their size."""
    if config.quant_method == "torchao":
        quantizer = diffusers_quantizers.DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
        quantizer.preprocess_model(network, device_map=None, keep_in_fp32_modules=network._keep_in_fp32_modules or [])
        for name, parameter in list(network.named_parameters()):
            if quantizer.check_if_quantized_param(network, parameter, name, {}):
                quantizer.create_quantized_param(network, parameter, name, "meta", {}, [])


def use_vae(pipeline: DiffusionPipeline, **options: bool | None) -> None:
    """Set `vae_tiling` and `vae_slicing`, None leaving it as it is; an `InputError` if the VAE cannot do it."""
    for option, value in options.items():
        attribute = option.replace("vae", "use")
        if value not in (None, True, False):
            raise InputError(f"{option} of a {type(pipeline).__name__} is {value!r}; expected true or false")
        if value and not hasattr(pipeline.vae, attribute):
            raise InputError(f"{option} is set, but the vae is a {type(pipeline.vae).__name__}, which cannot do it")
        if value is not None and hasattr(pipeline.vae, attribute):
            setattr(pipeline.vae, attribute, value)


def start_offloading(pipeline: DiffusionPipeline, kind: str, device: torch.device) -> None:
    """Keep a pipeline's weights on the CPU, and bring them to `device` as they are used, by diffusers' hooks."""
    if kind == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(device, offload_type="leaf_level")
