"""Decoders from a folder or the hub, with the options of a part in a YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anygpt.decoders.base import DiffusionDecoder
from anygpt.parts.source import Source, load


def load_decoder(path: str | Path | Source, **options: Any) -> DiffusionDecoder:
    """The decoder of a pipeline, every tensor of its networks from the files.

    Args:
        path: folder, hub id or `zoo:<name>`.
        options: the other fields of `Source`, as in a YAML; dtype is float32 where it is not given.

    Raises:
        InputError: nothing there, no known pipeline, or files that do not hold exactly its networks' tensors.
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
