"""Dataclass settings from a YAML file and dotted command-line overrides; all unknown keys are reported together."""

import difflib
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from pydantic import TypeAdapter, ValidationError
from transformers.utils.generic import flatten_dict

from anygpt.errors import InputError, refusing


def parse_settings(arguments: Sequence[str], kind: type, description: str = "") -> Any:
    """An instance of the dataclass `kind`, whose fields have defaults, from `--config FILE` and dotted overrides
    (`--train.learning_rate 1e-3`).

    Later settings override earlier ones. Mappings are merged key by key; all else, including lists, is replaced, so
    that an overridden list of files inherits nothing from the YAML.

    An `InputError` names all unknown keys, and all values that are null, or no section or list, where `kind` requires
    otherwise, by file or option; or a value of another wrong type.
    """
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file with the settings below")
    types, defaults = typing.get_type_hints(kind), kind()
    for section in fields(kind):
        parser.add_argument(f"--{section.name}", type=types[section.name], default=getattr(defaults, section.name))
    merged: dict[str, Any] = {}
    faults: list[str] = []
    for at, content in _given(arguments, kind):
        faults += [f"{at}: {fault}" for fault in _faults(content, kind, "")]
        merged = _merged(merged, content)
    if faults:
        raise InputError("; ".join(faults))
    try:
        parsed = parser.parse_args(list(arguments)) if asks_for_help(arguments) else parser.parse_object(merged)
        parsed = parser.instantiate(parsed)
    except (TypeError, ValueError, OSError, KeyError, ArgumentError) as error:
        raise InputError(" ".join(str(error).split())) from error
    return kind(**{section.name: getattr(parsed, section.name) for section in fields(kind)})


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to `section.key: value`, lists as text, for trackers and comparisons."""
    flat = {name: value for name, value in flatten_dict(settings).items() if value != {}}
    return {name: str(value) if isinstance(value, list | tuple) else value for name, value in flat.items()}


def find_misfits(settings: Any) -> list[str]:
    """Messages for every value of a dataclass, at any depth, that violates its annotated type (`Field(ge=1)`)."""
    try:
        TypeAdapter(type(settings)).validate_python(asdict(settings))
    except ValidationError as error:
        faults = error.errors(include_url=False)
    else:
        return []
    places = ["".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in fault["loc"])[1:] for fault in faults]
    expected = [fault["msg"].removeprefix("Input should be ") for fault in faults]
    return [f"{at} is {f['input']!r}, expected {words}" for at, f, words in zip(places, faults, expected, strict=True)]


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for output only."""
    names = [argument.partition("=")[0] for argument in arguments]
    return any(name in ("-h", "--help", "--print_config") or name.endswith(".help") for name in names)


def _merged(old: Any, new: Any) -> Any:
    """Neither is changed: to YAML's anchors and `<<`, one mapping may stand in several places."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    return new


_BOOL, _MERGE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML's own loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name for name, _ in node.value if name.tag != _MERGE]  # keys merged by << may be overridden
        keys = [self.construct_object(name, deep=True) for name in names]
        for key, name in zip(keys, names, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", name.start_mark)
        return super().construct_mapping(node, deep)


# As in YAML 1.2, `no` is a string (it is one of the precisions); PyYAML would read it as false.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != _BOOL]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

# An impossible date raises ValueError; endless brackets raise RecursionError.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def _given(arguments: Sequence[str], kind: type) -> Iterator[tuple[str, Any]]:
    """Yield every mapping of settings on a command line, with its source (the file or the option)."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        if asks_for_help([word]):
            continue
        if not word.startswith("--"):
            raise InputError(f"{word!r} is no setting; settings are given as --train.max_steps 100")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"{word} has no value, so {name} is null: give one, or {word}=null if that is meant")
            value = words.pop(0)
        if name == "config":
            path = Path(value)
            if not path.is_file():
                raise InputError(f"--config {value!r}: there is no such file; give the path of a YAML file")
            with refusing(f"{path} cannot be read, or is not valid YAML", (OSError, *_YAML_ERRORS)):
                content = yaml.load(path.read_text(), _Loader)
            if content is not None and not isinstance(content, Mapping):
                sections = ", ".join(section.name for section in fields(kind))
                raise InputError(f"{path} holds a {type(content).__name__}, expected the sections {sections}")
            yield str(path), content or {}
        else:
            try:
                content: Any = yaml.load(value, _Loader)  # may be a whole section or list
            except _YAML_ERRORS:
                content = value
            for part in reversed(name.split(".")):
                content = {part: content}
            yield f"--{name}", content


def _faults(content: Any, kind: Any, prefix: str) -> Iterator[str]:
    """Yield messages for keys and values of `content`, at any depth, that do not fit the type `kind`."""
    origin, inner, name = typing.get_origin(kind), typing.get_args(kind), prefix.removesuffix(".")
    known = typing.get_type_hints(kind) if is_dataclass(kind) else None
    if origin in (typing.Union, types.UnionType):
        if content is not None or type(None) not in inner:
            form = next(filter(is_dataclass, inner), str if content is None else Any)
            yield from _faults(content, form, prefix)
    elif origin is list and isinstance(content, list):
        for number, item in enumerate(content):
            yield from _faults(item, inner[0], f"{name}[{number}].")
    elif isinstance(content, Mapping) and (origin is dict or known is not None):
        for key, value in content.items():
            if known is not None and key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                yield f"unknown setting {prefix}{key!s}; did you mean {prefix}{near[0]}?"
            else:
                yield from _faults(value, inner[1] if known is None else known[key], f"{prefix}{key}.")
    elif origin in (list, dict) or known is not None or (content is None and kind not in (Any, type(None))):
        other = "a value" if known is None else f"a section of {', '.join(known)}"
        expected = {list: "a list", dict: "keys and values"}.get(origin, other)
        shown = repr(content)[:80] if isinstance(content, str | int | float) else f"a {type(content).__name__}"
        yield f"{name} is {'null' if content is None else shown}, expected {expected}"
