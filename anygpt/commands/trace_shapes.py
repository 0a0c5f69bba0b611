"""List the tensors between all parts, from input to decoder: name, shape, dtype and device, in order of computation.

    anygpt trace-shapes configs/tiny/stage3.yaml [--section.key value …]

Traces one real forward pass on samples of the config's data that cover every input and output modality, or on samples
of ToyWorld if there is no data.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from anygpt import InputError, MultimodalModel, MultimodalProcessor
from anygpt.commands import new_parser
from anygpt.data.collation import BAD, NOT_FOR_MODEL, Collator, move
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.toyworld.datasets import write_dataset
from anygpt.training.config import parse_config
from anygpt.training.loading import use_frames_of
from anygpt.training.setup import build

COLUMNS = ("hop", "tensor", "shape", "dtype", "device")

Found = tuple[str, str, Any]
"""Hop, name, and tensors."""
See = Callable[[tuple, Any], Iterable[Found]]  # picks from the arguments and the result of a call


def rows_of(hop: str, name: str, value: Any) -> Iterator[tuple[str, ...]]:
    """Rows of the table for all tensors in a value, with their place: `.key` of a mapping or field, `[i]` of a list."""
    inside: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Tensor):
        yield hop, name, str(tuple(value.shape)), str(value.dtype).removeprefix("torch."), str(value.device)
    elif hasattr(value, "keys"):
        inside = [(f".{key}", value[key]) for key in value]
    elif is_dataclass(value):
        inside = [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, (list, tuple)):
        inside = [(f"[{index}]", item) for index, item in enumerate(value)]
    for place, item in inside:
        yield from rows_of(hop, name + place, item)


def calls(model: MultimodalModel) -> Iterator[tuple[Any, str, See]]:
    """Yield every hop: the owner of a method, its name, and what to list for each call."""

    def output(hop: str, name: str) -> See:
        return lambda _, result: [(hop, name, result)]

    def states(_: tuple, result: tuple) -> list[Found]:
        return [("language model", "logits", result[0]), ("language model", "hidden_states", result[1])]

    def spans(arguments: tuple, result: dict[str, Tensor]) -> Iterator[Found]:
        yield "language model", "last states", arguments[2]
        for key, state in result.items():
            yield "signal tokens", f"positions of {key}", arguments[1][key].positions
            yield "signal tokens", f"states of {key}", state

    def noise(hop: str, arguments: tuple, result: Any) -> list[Found]:
        return [(hop, "noisy latents", arguments[0]), (hop, "prediction", result)]

    for key, encoder in model.encoders.items():
        yield encoder.module, "forward", output(f"{key} encoder", "output")
        yield encoder.projector, "forward", output(f"{key} projector", "output")
        yield encoder, "forward", output(f"{key} projector", "features")
    yield model, "embed", output("token embeddings", "text")
    yield model, "merge", output("merge", "sequence")
    yield model, "run_language_model", states
    yield model, "read_spans", spans
    for key, decoder in model.decoders.items():
        projector, hop = f"{key} output projector", f"{key} decoder"
        yield decoder.projector, "forward", output(projector, "projected")
        yield decoder, "condition", output(projector, "condition")
        yield decoder.module, "encode_text", output(hop, "encoding of captions")
        yield decoder.module, "encode_media", output(hop, "latents of targets")
        yield decoder.module.denoiser, "forward", partial(noise, hop)


@torch.no_grad()
def trace(model: MultimodalModel, batch: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []

    def watched(original: Callable, see: See) -> Callable:
        @wraps(original)  # encoders' arguments are chosen by signature
        def call(*arguments: Any, **kwargs: Any) -> Any:
            result = original(*arguments, **kwargs)
            rows.extend(row for found in see(arguments, result) for row in rows_of(*found))
            return result

        return call

    targets = {f"targets of {key}": target.get("media") for key, target in batch["decoder_targets"].items()}
    for name, value in ({name: batch[name] for name in batch if name != "decoder_targets"} | targets).items():
        rows.extend(rows_of("processor", name, value))
    with ExitStack() as stack:
        for owner, method, see in calls(model):
            stack.enter_context(patch.object(owner, method, watched(getattr(owner, method), see)))
        output = model(**batch)
    rows.extend(rows_of("losses", "sum", {name: term.total for name, term in (output.losses or {}).items()}))
    rows.extend(rows_of("losses", "loss", output.loss))
    return rows


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [COLUMNS, tuple("─" * width for width in widths), *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def make_batch(model: MultimodalModel, processor: MultimodalProcessor, sources: list[DataSource]) -> dict[str, Any]:
    """Batch of few samples that cover all media of the model; of ToyWorld if there is no data."""
    known = {("user", reader.modality) for reader in model.readers.values()}
    known |= {("assistant", maker.modality) for maker in model.makers.values()}
    with tempfile.TemporaryDirectory() as folder:
        if not sources or not all(Path(source.path).exists() for source in sources):
            print("no data: these are samples of ToyWorld\n")
            kinds = ("stage1", "stage2")  # media in, media out
            sources = [DataSource(path=str(write_dataset(Path(folder), kind, 3, seed=0))) for kind in kinds]
        dataset = ConversationDataset.from_files(sources, on_bad_sample="error")
        use_frames_of(dataset, processor)
        chosen, covered = [], set()
        for index, sample in enumerate(dataset.samples):
            kinds = {(role, part.type) for role, part in sample.media()}
            if kinds <= known and (kinds - covered or not chosen):
                chosen.append(index)
                covered |= kinds
        if not chosen:
            given = ", ".join(source.path for source in sources)
            raise InputError(f"no row of {given} has only media that the model reads and makes; give data that suit it")
        batch = Collator(processor)([dataset[index] for index in chosen])
    if batch[BAD]:
        raise InputError(batch[BAD][0].reason)
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}


def main(arguments: list[str]) -> None:
    parser = new_parser("trace-shapes", __doc__)
    parser.add_argument("config", help="a YAML file of a stage; dotted overrides may follow")
    options, overrides = parser.parse_known_args(arguments)
    config = parse_config([f"--config={options.config}", *overrides])
    model, processor = build(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    print(table(trace(model, move(make_batch(model, processor, config.data.train), model.device))))
