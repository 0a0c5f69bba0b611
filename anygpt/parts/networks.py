"""Loading of networks from weight files; missing, unexpected or mismatched tensors are errors."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os.path import commonprefix
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from anygpt.errors import InputError
from anygpt.parts import files
from anygpt.parts.files import Place, Weights


def load_network(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    place: Place,
    *,
    names: Mapping[str, str | None] = {},
    optional: Mapping[str, Mapping[str, Any]] = {},
    dtype: torch.dtype | None = None,
    fallback_dtype: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a transformers network, taking every tensor from the files at `place`, which may also hold other networks.

    Args:
        names: `{prefix in the files: new prefix}`; None for tensors of other networks.
        optional: constructor arguments by tensor name prefix, applied if the files have no such tensors.
        dtype: if None, the config's, else `fallback_dtype` (of the enclosing model), else that of the files.

    Raises:
        InputError: tensors that are missing, unexpected, of another shape, or integer instead of floating-point; or a
            PEFT adapter beside them.
    """
    weights = files.find_weights(place, names)
    config_file = f"{place}/config.json"
    if not weights.files:  # not in the cache, and only shapes are wanted
        with torch.device("meta"), files.built_from(config_file):
            return cls(config).to(dtype or config.dtype or fallback_dtype or torch.float32)
    state, origin, twice = {}, {}, []
    for name, tensor in weights.tensors(names):
        new = files.rename(names, name)
        if new is not None:
            twice += [name] if new in state else []
            state[new], origin[new] = tensor, name
    for prefix, arguments in optional.items():
        if not any(name.startswith(prefix) for name in state):
            options = {**arguments, **options}
    dtypes = (kind for kind in map(files.dtype_of, state.values()) if kind and kind.itemsize > 1)  # none runs in float8
    dtype = dtype or config.dtype or fallback_dtype or next(dtypes, torch.float32)
    if files.wants_shapes_only():
        state = {name: files.shape_of(tensor) for name, tensor in state.items()}
        if getattr(options.get("quantization_config"), "quant_method", None) != "torchao":  # the others need a GPU
            options.pop("quantization_config", None)
        options["device_map"] = "meta"
    options |= {"config": config, "state_dict": state, "dtype": dtype}
    with without_report("transformers.modeling_utils", "LOAD REPORT"), files.built_from(config_file):
        network, info = cls.from_pretrained(None, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    floats = {name for name, parameter in network.named_parameters() if parameter.is_floating_point()}
    integers = [name for name, tensor in state.items() if files.dtype_of(tensor) is None and name in floats]
    faults = {
        "lacks": [_name_in_file(network, name, origin) for name in info["missing_keys"]],
        "has in another shape": [
            f"{_name_in_file(network, name, origin)} {tuple(found)}, expected {tuple(expected)}"
            for name, found, expected in info["mismatched_keys"]
        ],
        "has left over": [origin.get(name, name) for name in info["unexpected_keys"]],
        "has as integers": [origin[name] for name in integers],
        "has twice": twice,
    }
    check_report(weights, cls, faults)
    if network.can_generate() and (generation := place.json("generation_config.json")) is not None:
        with files.built_from(f"{place}/generation_config.json"):
            network.generation_config = GenerationConfig.from_dict(generation)
    network.config.name_or_path = place.path
    return network


def check_report(weights: Weights, cls: type, faults: Mapping[str, Collection[str]]) -> None:
    found = [f"{verb} {files.some(sorted(names))}" for verb, names in faults.items() if names]
    if found:
        where = weights.entry if len(weights.files) < 2 else f"{weights.entry} ({len(weights.files)} shards)"
        raise InputError(
            f"{where} is not what a {cls.__name__} needs: it {'; it '.join(found)}. Nothing is filled with random "
            "numbers: download it again, or name the model that these weights are of"
        )


@contextmanager
def without_report(logger: str, phrase: str = "") -> Iterator[None]:
    """Suppress a library's messages that hold `phrase`, about tensors for which `check_report` raises an error."""
    reports, others = logging.getLogger(logger), logging.Filter()
    others.filter = lambda record: phrase not in record.getMessage()
    reports.addFilter(others)
    try:
        yield
    finally:
        reports.removeFilter(others)


def _name_in_file(network: PreTrainedModel, name: str, origin: Mapping[str, str]) -> str:
    """Name that a missing tensor would have in the files, judged by the most similar tensor there."""
    try:
        saved = list(revert_weight_conversion(network, {name: network.get_parameter_or_buffer(name)}))
    except Exception:  # a tensor that the library splits or fuses: keep the model's name
        saved = []
    candidates = [name, *(saved if len(saved) == 1 else [])]
    pairs = [(one, other) for one in candidates for other in origin]
    name, near = max(pairs, key=_alike, default=(name, ""))
    there = origin.get(near, near)
    kept = _alike((near[::-1], there[::-1]))
    before, after = near[: len(near) - kept], there[: len(there) - kept]
    return after + name.removeprefix(before) if name.startswith(before) else name


def _alike(names: tuple[str, str]) -> int:
    return len(commonprefix(names))  # noqa: RUF071 (of characters, which is meant)
