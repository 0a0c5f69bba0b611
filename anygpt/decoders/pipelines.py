"""Diffusers pipelines: strict loading, quantised networks, offloading hooks, callbacks at each step."""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers import auto as diffusers_quantizers
from torch import nn
from transformers.quantizers import auto as transformers_quantizers

from anygpt.errors import InputError, refusing
from anygpt.parts.files import Place, Weights, built_from, dtype_of, find_weights, shape_of, wants_shapes_only
from anygpt.parts.networks import check_report, load_network, without_report
from anygpt.parts.source import check_vocabulary

TESTED = ">=0.36,<0.43"
"""Versions of diffusers with all the pipelines of our decoders, as in pyproject.toml."""
BACKENDS = {"torchao": "torchao", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
"""Package by quantisation backend, as diffusers calls them."""
DENOISERS = ("unet", "transformer")


def find_pipeline(name: str) -> type[DiffusionPipeline]:
    """The diffusers pipeline class of this name; an `InputError` if the installed version lacks it."""
    what = (
        f"diffusers {diffusers.__version__} has no {name}; versions {TESTED} have it (pip install 'diffusers{TESTED}')"
    )
    with refusing(what, (AttributeError, ImportError, RuntimeError)):
        return getattr(diffusers, name)


def find_class(place: Place, cls: Any, known: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The decoder class (`cls`, or if None the one in `known` by pipeline), and the content of `model_index.json`."""
    config = place.json("model_index.json")
    name = (config or {}).get("_class_name")
    if name is None:
        raise InputError(
            f"no diffusers pipeline at {str(place)!r}: expected a folder with a model_index.json, or a hub id"
            f"{place.taken_for}"
        )
    found = cls or known.get(str(name))
    if found is None:
        raise InputError(f"{place}: no decoder for the pipeline class {name}; known are {', '.join(sorted(known))}")
    if found.pipeline_name != name:
        raise InputError(
            f"{place} holds a {name}, but {found.__name__} needs a {found.pipeline_name}: name a folder of "
            "that kind, or use DiffusionDecoder.from_pretrained"
        )
    return found, config


def load_pipeline(
    cls: type[DiffusionPipeline],
    index: Mapping[str, Any],
    place: Place,
    dtype: torch.dtype,
    quantization_config: Mapping[str, Any] | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """Load the pipeline at `place`, whose `model_index.json` is `index`; given `components` are not loaded.

    Raises:
        InputError: missing or unexpected tensors of a network, or a `quantization_config` (see `quantizers`) that does
            not apply.
    """
    if unknown := sorted(components.keys() - inspect.signature(cls.__init__).parameters):
        raise InputError(f"{place}: a decoder of a {cls.__name__} has no argument {unknown[0]!r}; leave it out")
    given: dict[str, Any] = {}
    networks: dict[str, type[nn.Module]] = {}
    for name, entry in index.items():
        if not isinstance(entry, (list, tuple)) or name in components:
            continue
        if list(entry) == [None, None]:
            given[name] = None  # saved without it (SD 3's T5), which diffusers must be told explicitly
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise InputError(f"{place}/model_index.json has {list(entry)} as {name}; expected a library and a class")
        network = _class_of(*entry)
        if network is not None:
            networks[name] = network
    quantized = quantizers(quantization_config, networks)
    for name, network in networks.items():
        other = f"its {name}, a {network.__name__}, cannot be quantised; name others in components_to_quantize"
        with refusing(other) if name in quantized else nullcontext():
            given[name] = load_network_of_pipeline(network, place.inside(name), dtype, quantized.get(name))
    folder = place.download(weights=False)
    pipeline = cls.from_pretrained(str(folder), torch_dtype=dtype, **given, **components)
    if pipeline.components.get("unet") is None and pipeline.components.get("transformer") is None:
        raise InputError(f"{place}/model_index.json names neither a unet nor a transformer: a decoder needs one")
    for name, component in pipeline.components.items():
        if isinstance(component, transformers.PreTrainedTokenizerBase):
            check_vocabulary(component, place.inside(name))
    return pipeline


def _class_of(library: str, name: str) -> type[nn.Module] | None:
    """The class of a network; None for components without weights."""
    home = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(
        diffusers.pipelines, library, None
    )
    cls = getattr(home, name, None)
    if cls is None:
        raise InputError(f"its model_index.json names {library}.{name}, which this version of {library} does not have")
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None


def load_network_of_pipeline(
    cls: type[nn.Module], place: Place, dtype: torch.dtype, quantizer: Any = None
) -> nn.Module:
    """Load a network of diffusers or transformers; an `InputError` for missing or unexpected tensors."""
    if place.json("config.json") is None:
        raise InputError(f"{place} has no config.json")
    if not issubclass(cls, ModelMixin):
        with built_from(f"{place}/config.json"):
            config = cls.config_class.from_pretrained(
                place.path, revision=place.revision, subfolder=place.subfolder, **place.hub
            )
        options = {} if quantizer is None else {"quantization_config": quantizer}
        return load_network(cls, config, place, dtype=dtype, **options)
    weights = find_weights(place)
    with built_from(f"{place}/config.json"):
        outline = _outline(cls, place, weights)
    if wants_shapes_only():
        outline = outline.to(dtype)
        if quantizer is not None:
            quantize_outline(outline, quantizer)
        return outline
    with without_report("diffusers.models.modeling_utils"):
        # From the local folder: with a hub id, diffusers would ask the hub about shards that are already local.
        network, info = cls.from_pretrained(
            str(weights.entry.parent),
            variant=weights.variant,
            use_safetensors=not weights.pickled,
            torch_dtype=dtype,
            quantization_config=quantizer,
            output_loading_info=True,
        )
    # If a folder holds a network twice, diffusers may have read other files than those checked above.
    check_report(weights, cls, {"lacks": info["missing_keys"], "has left over": info["unexpected_keys"]})
    return network


def _outline(cls: type[ModelMixin], place: Place, weights: Weights) -> ModelMixin:
    """Build a network on the meta device, and compare its tensors with the files' headers."""
    config = cls.load_config(place.path, revision=place.revision, subfolder=place.subfolder, **place.hub)
    with torch.device("meta"):
        network = cls.from_config(config)
    if not weights.files:  # not in the cache
        return network
    found = {name: shape_of(tensor) for name, tensor in weights.tensors()}
    network._fix_state_dict_keys_on_load(found)
    own = network.state_dict()
    faults = {"lacks": own.keys() - found.keys(), "has left over": found.keys() - own.keys()}
    odd = [name for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
    floats = {name for name, parameter in network.named_parameters()}
    integers = [name for name, tensor in weights.tensors() if name in floats and dtype_of(tensor) is None]
    check_report(weights, cls, faults | {"has in another shape": odd, "has as integers": integers})
    return network


def quantizers(config: Mapping[str, Any] | None, networks: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
    """The library's quantization config for each of a pipeline's `networks` (their classes) that `config` names.

    `config` are arguments of diffusers' `PipelineQuantizationConfig`: `quant_backend`, `quant_kwargs` and
    `components_to_quantize`, by default the denoiser. torchao's `quant_type` is the name of one of its config classes
    (`Int8WeightOnlyConfig`), with its arguments beside it. Anything unknown or missing is an `InputError`.
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


def is_hooked(pipeline: DiffusionPipeline) -> bool:
    """Whether offloading keeps a pipeline's weights on a device other than the one it computes on."""
    networks = [x for x in pipeline.components.values() if isinstance(x, nn.Module)]
    # accelerate's hooks and diffusers' block-level ones are on the networks, diffusers' leaf-level ones on the leaves.
    leaves = [next((m for m in network.modules() if m._parameters), network) for network in networks]
    return any(hasattr(module, hook) for module in networks + leaves for hook in ("_hf_hook", "_diffusers_hook"))


def step_callback(pipeline: DiffusionPipeline, on_step: Callable[[int, int], None]) -> dict[str, Any]:
    """Arguments of a pipeline's call that make it call `on_step`, in diffusers' older or newer form."""
    scheduler = pipeline.scheduler
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:

        def at_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, getattr(pipeline, "num_timesteps", len(scheduler.timesteps)))  # fewer with strength
            return tensors

        return {"callback_on_step_end": at_step_end}

    def callback(step: int, timestep: Any, latents: Any) -> None:
        # the older form counts sampler steps of `order` evaluations each
        on_step(step + 1, math.ceil(len(scheduler.timesteps) / getattr(scheduler, "order", 1)))

    return {"callback": callback, "callback_steps": 1}
