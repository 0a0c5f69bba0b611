"""What a command line gives, before it is parsed: YAML files and dotted overrides as one mapping, unknown keys."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from anygpt.errors import InputError


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the command line only wants something printed, or has words that are no settings (an error)."""
    names = [a for a in arguments if a.startswith("-")]
    odd = any(a.partition("=")[0].endswith((".help", "+")) or not a.startswith("--") for a in names)
    loose = any(
        not a.startswith("-") and (i == 0 or not arguments[i - 1].startswith("--") or "=" in arguments[i - 1])
        for i, a in enumerate(arguments)
    )
    return odd or loose or any(a.partition("=")[0] in ("--help", "--print_config") for a in names)


def merge(arguments: Sequence[str], kind: type) -> dict[str, Any]:
    """All settings of a command line as one mapping, later ones over earlier ones.

    A mapping is merged key by key; anything else, lists too, is replaced whole, so that an overridden list of files
    inherits nothing from the one in the YAML.
    """
    merged: dict[str, Any] = {}

    def put(into: dict[str, Any], content: Mapping[str, Any]) -> None:
        for key, value in content.items():
            if isinstance(value, Mapping) and isinstance(into.get(key), dict):
                put(into[key], value)
            else:
                into[key] = copy.deepcopy(value)

    for _, content in _given(arguments, kind):
        put(merged, content)
    return merged


def check_keys(arguments: Sequence[str], kind: type) -> None:
    """Raise one `InputError` that names every key in the files and on the command line that `kind` does not have."""
    faults = []
    for place, content in _given(arguments, kind):
        faults += [f"{place}: {fault}" for fault in _unknown_keys(content, kind, "")]
    if faults:
        raise InputError("; ".join(faults))


def _given(arguments: Sequence[str], kind: type) -> Iterator[tuple[str, Any]]:
    """Every mapping of settings that a command line gives, with the place where it stands."""
    names = list(arguments)
    for index, argument in enumerate(names):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        value = value if equals else names[index + 1] if index + 1 < len(names) else ""
        if name == "config":
            path = Path(value)
            if not path.is_file():
                raise InputError(f"--config {value!r}: there is no such file; give the path of a YAML file")
            try:
                content = yaml.safe_load(path.read_text())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
            if content is not None and not isinstance(content, Mapping):
                sections = ", ".join(section.name for section in fields(kind))
                raise InputError(f"{path} holds a {type(content).__name__}, expected the sections {sections}")
            yield str(path), content or {}
        elif name not in ("help", "print_config") and not name.endswith(".help"):
            try:
                content: Any = yaml.safe_load(value)  # a section or a list can be given whole
            except yaml.YAMLError:
                content = value
            for part in reversed(name.rstrip("+").split(".")):
                content = {part: content}
            yield f"--{name}", content


def _unknown_keys(content: Any, kind: Any, prefix: str) -> Iterator[str]:
    """Keys of `content` that the type `kind` does not have, at any depth."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            if is_dataclass(option):
                yield from _unknown_keys(content, option, prefix)
    elif origin is list and isinstance(content, list):
        for item in content:
            yield from _unknown_keys(item, inner[0], prefix)
    elif origin is dict and isinstance(content, Mapping):
        for key, value in content.items():
            yield from _unknown_keys(value, inner[1], f"{prefix}{key}.")
    elif is_dataclass(kind):
        if not isinstance(content, Mapping):
            return
        known = typing.get_type_hints(kind)
        for key, value in content.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                yield f"unknown setting {prefix}{key!s}; did you mean {prefix}{near[0]}?"
            else:
                yield from _unknown_keys(value, known[key], f"{prefix}{key}.")
