"""Decoders from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anygpt.decoders.base import DiffusionDecoder
from anygpt.parts.source import Source, load


def load_decoder(path: str | Path | Source, **options: Any) -> DiffusionDecoder:
    """The decoder of a pipeline, loaded strictly.

    Args:
        path: folder, hub id or `zoo:<name>`.
        options: other fields of `Source`, as in a YAML; dtype is float32 by default.

    Raises:
        InputError: nothing at `path`, an unknown pipeline, or missing or unexpected tensors.
    """
    source = Source.of(path, options)
    given = {"torch_dtype": source.torch_dtype, "num_frames": source.num_frames}
    return load(
        source,
        "decoder",
        lambda: DiffusionDecoder.from_pretrained(
            source.folder,
            variant=source.variant,
            weights=source.weights,
            **source.where,
            **{name: value for name, value in given.items() if value is not None},
        ),
    )
