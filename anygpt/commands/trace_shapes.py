"""List the tensors between all parts, from input to decoder: name, shape, dtype and device, in order of computation.

    anygpt trace-shapes configs/tiny/stage3.yaml [--section.key value …]
    anygpt trace-shapes --checkpoint runs/quickstart/stage3/final

Traces one real forward pass on samples of the config's data that cover every input and output modality, or on samples
of ToyWorld if there is no data. The letters of shapes are explained in `anygpt/outputs.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from anygpt import InputError, MultimodalModel, MultimodalProcessor
from anygpt.chat.chat_model import load_checkpoint
from anygpt.commands import new_parser
from anygpt.data.collation import BAD, NOT_FOR_MODEL, Collator, move
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.toyworld.datasets import write_dataset
from anygpt.training.config import parse_config
from anygpt.training.loading import use_frames_of
from anygpt.training.setup import build

CONDITION = {".embeds": "(K, T, D)", ".pooled": "(K, P)", ".mask": "(K, T)", "": "(K, T, D)"}
SEQUENCE = {".inputs_embeds": "(B, S, H)", ".media_in": "(B,)", "": "(B, S)"}
ENCODED = {".pooler_output": "(items, width)", "": "(items, n, width)"}
FEATURES, LATENTS = "(items, n, H)", "(K, C, …)"
COLUMNS = ("hop", "tensor", "shape", "dtype", "device", "in letters")


class Trace:
    """A table of tensors in the order in which they are added."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def add(self, hop: str, name: str, value: Any, letters: str | dict[str, str]) -> None:
        """Add a tensor, or all in a list, mapping or dataclass, with letters by place in it, `""` for the others."""
        by_place = letters if isinstance(letters, dict) else {"": letters}
        for place, tensor in tensors_in(value):
            facts = (str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."), str(tensor.device))
            self.rows.append((hop, name + place, *facts, by_place.get(place, by_place[""])))

    def __str__(self) -> str:
        """Aligned table; each hop is named once."""
        widths = [max(map(len, column)) for column in zip(COLUMNS, *self.rows, strict=True)]
        lines, before = [], None
        for row in [COLUMNS, tuple("─" * width for width in widths), *self.rows]:
            cells = ("", *row[1:]) if row[0] == before else row
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
            before = row[0]
        return "\n".join(lines)


def tensors_in(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its place: `.key` of a mapping or field, `[i]` of a list."""
    inside: list[tuple[str, Any]] = []
    if isinstance(value, Tensor):
        yield place, value
    elif hasattr(value, "keys"):
        inside = [(f".{key}", value[key]) for key in value]
    elif is_dataclass(value):
        inside = [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, (list, tuple)):
        inside = [(f"[{index}]", item) for index, item in enumerate(value)]
    for name, item in inside:
        yield from tensors_in(item, place + name)


@torch.no_grad()
def trace(model: MultimodalModel, batch: dict[str, Any]) -> Trace:
    """Run one forward pass and record the output of every hop."""
    table, stack = Trace(), ExitStack()

    def watch(owner: Any, method: str, see: Any) -> None:
        """Call `see(arguments, result)` after each call of a method of this object."""
        original = getattr(owner, method)

        @wraps(original)  # encoders' arguments are chosen by signature
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            see(args, result)
            return result

        stack.enter_context(patch.object(owner, method, call))

    def list_results(owner: Any, method: str, hop: str, name: str, letters: str | dict[str, str]) -> None:
        watch(owner, method, lambda _, result: table.add(hop, name, result, letters))

    def list_arguments(owner: Any, method: str, hop: str, name: str, letters: str) -> None:
        watch(owner, method, lambda arguments, _: table.add(hop, name, arguments[0], letters))

    def language_model(args: tuple, result: tuple) -> None:
        table.add("language model", "logits", result[0], "(B, S, V') or, at labels, (1, M, V')")
        table.add("language model", "hidden_states", result[1], "(B, S, H)")

    def spans(args: tuple, result: dict[str, Tensor]) -> None:
        table.add("language model", "last states", args[2], "(B, S, H)")
        for key, state in result.items():
            table.add("signal tokens", f"positions of {key}", args[1][key].positions, "(K, N)")
            table.add("signal tokens", f"states of {key}", state, "(K, N, H)")

    text = {"input_ids", "attention_mask", "labels"}
    for name, value in batch.items():
        if name != "decoder_targets":
            table.add("processor", name, value, "(B, S)" if name in text else "(items, …)")
    for key, target in batch["decoder_targets"].items():
        table.add("processor", f"targets of {key}", target.get("media"), "(K, …)")
    with stack:
        for key, encoder in model.encoders.items():
            list_results(encoder.module, "forward", f"{key} encoder", "output", ENCODED)
            list_results(encoder.projector, "forward", f"{key} projector", "output", FEATURES)
            list_results(encoder, "forward", f"{key} projector", "features", FEATURES)
        list_results(model, "embed", "token embeddings", "text", SEQUENCE)
        list_results(model, "merge", "merge", "sequence", SEQUENCE)
        watch(model, "run_language_model", language_model)
        watch(model, "read_spans", spans)
        for key, decoder in model.decoders.items():
            hop = f"{key} output projector"
            list_results(decoder.projector, "forward", hop, "projected", CONDITION)
            list_results(decoder, "condition", hop, "condition", CONDITION)
            hop = f"{key} decoder"
            list_results(decoder.module, "encode_text", hop, "encoding of captions", CONDITION)
            list_results(decoder.module, "encode_media", hop, "latents of targets", LATENTS)
            list_arguments(decoder.module.denoiser, "forward", hop, "noisy latents", LATENTS)
            list_results(decoder.module.denoiser, "forward", hop, "prediction", LATENTS)
        output = model(**batch)
    table.add("losses", "sum", {name: term.total for name, term in (output.losses or {}).items()}, "()")
    table.add("losses", "loss", output.loss, "()")
    return table


def make_batch(model: MultimodalModel, processor: MultimodalProcessor, sources: list[DataSource]) -> dict[str, Any]:
    """Batch of few samples that cover all input and output media in the data; of ToyWorld if there is no data."""
    known = {("user", encoder.modality) for encoder in model.encoders.values()}
    known |= {("assistant", decoder.modality) for decoder in model.decoders.values()}
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
        batch = Collator(processor)([dataset[index] for index in chosen])
    if batch[BAD]:
        raise InputError(batch[BAD][0].reason)
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}


def main(arguments: list[str]) -> None:
    parser = new_parser("trace-shapes", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", help="a YAML file of a stage; dotted overrides may follow")
    what.add_argument("--checkpoint", metavar="DIR", help="a final/ folder")
    options, overrides = parser.parse_known_args(arguments)
    sources: list[DataSource] = []
    if options.checkpoint is None:
        config = parse_config([f"--config={options.config}", *overrides])
        sources = config.data.train
        model, processor = build(config)
    elif overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    else:
        model, processor = load_checkpoint(options.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    print(trace(model, move(make_batch(model, processor, sources), model.device)))
