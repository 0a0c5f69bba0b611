"""Quantised networks of a pipeline."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin
from diffusers.quantizers import auto as diffusers_quantizers
from torch import nn
from transformers.quantizers import auto as transformers_quantizers

from anygpt.errors import InputError, refusing

BACKENDS = {"torchao": "torchao", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
"""Package by quantisation backend, as diffusers calls them."""
DENOISERS = ("unet", "transformer")


def quantizers(config: Mapping[str, Any] | None, networks: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
    """The library's quantization config for each of a pipeline's `networks` (their classes) that `config` names.

    `config` are arguments of diffusers' `PipelineQuantizationConfig`: `quant_backend`, `quant_kwargs` and
    `components_to_quantize`, by default the denoiser. torchao's `quant_type` is the name of one of its config classes
    (`Int8WeightOnlyConfig`), whose arguments stand beside it. Whatever is unknown or missing is an `InputError`.
    """
    if config is None:
        return {}
    who, known = "quantization_config", ("quant_backend", "quant_kwargs", "components_to_quantize")
    if not isinstance(config, Mapping) or set(config) - set(known):
        raise InputError(f"{who} is {config!r:.200}; expected a mapping of {', '.join(known)}")
    backend, arguments, names = (config.get(name) for name in known)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError(f"quant_backend of {who} is {backend!r}; expected {', '.join(BACKENDS)}")
    if importlib.util.find_spec(BACKENDS[backend]) is None:
        raise InputError(f"{who} needs the package {BACKENDS[backend]}, which is not installed")
    if names is None:
        names = [name for name in DENOISERS if name in networks]
    names = list(names) if isinstance(names, (list, tuple)) and names else [names]
    if unknown := [name for name in names if name not in list(networks)]:
        there = ", ".join(networks)
        raise InputError(f"components_to_quantize of {who} names {unknown[0]!r:.80}; expected some of {there}")
    found = {}
    with refusing(f"quant_kwargs of {who} are {arguments!r:.200}, which its library refuses"):
        for name in names:
            home = diffusers_quantizers if issubclass(networks[name], ModelMixin) else transformers_quantizers
            given = _torchao_arguments(**arguments or {}) if backend == "torchao" else arguments
            found[name] = home.AUTO_QUANTIZATION_CONFIG_MAPPING[backend](**given or {})
    return found


def _torchao_arguments(quant_type: str, modules_to_not_convert: list[str] | None = None, **options: Any) -> dict:
    library = importlib.import_module("torchao.quantization")
    kinds = [name for name in dir(library) if name.endswith("WeightOnlyConfig")]  # gradients pass through these
    if quant_type not in kinds:
        raise ValueError(f"quant_type {quant_type!r} is none of {', '.join(kinds)}")
    kind = getattr(library, quant_type)(**options)
    return {"quant_type": kind, "modules_to_not_convert": modules_to_not_convert}


def quantize_outline(network: ModelMixin, config: Any) -> None:
    """Quantise a network on the meta device as loading would, with torchao; others keep their size."""
    if config.quant_method == "torchao":
        quantizer = diffusers_quantizers.DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
        quantizer.preprocess_model(network, device_map=None, keep_in_fp32_modules=network._keep_in_fp32_modules or [])
        for name, parameter in list(network.named_parameters()):
            if quantizer.check_if_quantized_param(network, parameter, name, {}):
                quantizer.create_quantized_param(network, parameter, name, "meta", {}, [])
