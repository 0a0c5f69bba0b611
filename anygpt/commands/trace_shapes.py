"""List the tensors between all parts, from input to decoder: name, shape, dtype and device, in order of computation.

    anygpt trace-shapes configs/tiny/stage3.yaml [--section.key value …]
    anygpt trace-shapes --checkpoint runs/quickstart/stage3/final

Traces one real forward pass on samples of the config's data that cover every input and output modality, or on synthetic
media if there is no data. The letters of shapes are explained in `anygpt/outputs.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anygpt import InputError, MultimodalModel, MultimodalProcessor
from anygpt.commands import new_parser
from anygpt.data.collation import BAD, NOT_FOR_MODEL, Collator, move
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.media.writing import write_audio, write_image, write_video
from anygpt.training.config import parse_config
from anygpt.training.loading import use_frames_of
from anygpt.training.setup import build

CONDITION = {".embeds": "(K, T, D)", ".pooled": "(K, P)", ".mask": "(K, T)", "": "(K, T, D)"}
SEQUENCE = {".inputs_embeds": "(B, S, H)", ".media_in": "(B,)", "": "(B, S)"}
COLUMNS = ("hop", "tensor", "shape", "dtype", "device", "in letters")


class Trace:
    """A table of tensors in the order in which they are added."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def add(self, hop: str, name: str, value: Any, letters: str | dict[str, str]) -> None:
        """Add a tensor, or all in a list, mapping or dataclass, with letters by place in it, `""` for the others."""
        by_place = letters if isinstance(letters, dict) else {"": letters}
        for suffix, tensor in tensors_in(value):
            letters = by_place.get(suffix, by_place[""])
            shape, dtype = str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch.")
            self.rows.append((hop, name + suffix, shape, dtype, str(tensor.device), letters))

    def __str__(self) -> str:
        """Aligned table; each hop is named once."""
        widths = [max(len(row[i]) for row in [COLUMNS, *self.rows]) for i in range(len(COLUMNS))]
        lines, before = [], None
        for row in [COLUMNS, tuple("─" * width for width in widths), *self.rows]:
            cells = ("", *row[1:]) if row[0] == before else row
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
            before = row[0]
        return "\n".join(lines)


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its place: `.key` of a mapping or field, `[i]` of a list."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict) or hasattr(value, "keys"):
        for key in value:
            yield from tensors_in(value[key], f"{name}.{key}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{name}[{index}]")


@contextmanager
def watched(owner: Any, method: str, see: Any) -> Iterator[None]:
    """Call `see(arguments, result)` after each call of a method of this object."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        see(args, result)
        return result

    object.__setattr__(owner, method, call)
    try:
        yield
    finally:
        object.__delattr__(owner, method)


@torch.no_grad()
def trace(model: MultimodalModel, batch: dict[str, Any]) -> Trace:
    """Run one forward pass and record the output of every hop."""
    table = Trace()
    text = ("input_ids", "attention_mask", "labels")
    for name in text:
        table.add("processor", name, batch.get(name), "(B, S)")
    for name, value in batch.items():
        if name not in (*text, "decoder_targets"):
            table.add("processor", name, value, "(items, …)")
    for key, target in batch["decoder_targets"].items():
        table.add("processor", f"targets of {key}", target.get("media"), "(K, …)")

    def language_model(args: tuple, result: tuple) -> None:
        table.add("language model", "logits", result[0], "(B, S, V') or, at labels, (1, M, V')")
        table.add("language model", "hidden_states", result[1], "(B, S, H)")

    def spans(args: tuple, result: dict[str, Tensor]) -> None:
        table.add("language model", "last states", args[2], "(B, S, H)")
        for key, state in result.items():
            table.add("signal tokens", f"positions of {key}", args[1][key].positions, "(K, N)")
            table.add("signal tokens", f"states of {key}", state, "(K, N, H)")

    with ExitStack() as stack:

        def watch(owner: Any, method: str, hop: str, name: str, letters: str | dict[str, str]) -> None:
            stack.enter_context(watched(owner, method, lambda _, result: table.add(hop, name, result, letters)))

        def hook(module: torch.nn.Module, hop: str, name: str, letters: str | dict[str, str], given: str = "") -> None:
            def see(module: Any, args: tuple, output: Any) -> None:
                if given:
                    table.add(hop, given, args[0], letters)
                table.add(hop, name, output, letters)

            stack.callback(module.register_forward_hook(see).remove)

        for key, encoder in model.encoders.items():
            hook(
                encoder.module,
                f"{key} encoder",
                "output",
                {".pooler_output": "(items, width)", "": "(items, n, width)"},
            )
            hook(encoder.projector, f"{key} projector", "output", "(items, n, H)")
            hook(encoder, f"{key} projector", "features", "(items, n, H)")
        watch(model, "embed", "token embeddings", "text", SEQUENCE)
        watch(model, "merge", "merge", "sequence", SEQUENCE)
        stack.enter_context(watched(model, "run_language_model", language_model))
        stack.enter_context(watched(model, "read_spans", spans))
        for key, decoder in model.decoders.items():
            hook(decoder.projector, f"{key} output projector", "projected", CONDITION)
            watch(decoder, "condition", f"{key} output projector", "condition", CONDITION)
            watch(decoder.module, "encode_text", f"{key} decoder", "encoding of captions", CONDITION)
            watch(decoder.module, "encode_media", f"{key} decoder", "latents of targets", "(K, C, …)")
            hook(decoder.module.denoiser, f"{key} decoder", "prediction", "(K, C, …)", given="noisy latents")
        output = model(**batch)
    table.add("losses", "sum", {name: term.total for name, term in (output.losses or {}).items()}, "()")
    table.add("losses", "loss", output.loss, "()")
    return table


# ------------------------------------------------------------------------------------------------------------ a batch


def make_samples(model: MultimodalModel, folder: Path) -> Path:
    """Write synthetic media and rows to `folder`: one row per encoder, with its input, and one per decoder."""
    write_image(folder / "medium.png", Image.effect_noise((64, 48), 40).convert("RGB"))
    frames = np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    write_video(folder / "medium.mp4", frames, fps=8)
    write_audio(folder / "medium.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32), 16_000)
    names = {"image": "medium.png", "video": "medium.mp4", "audio": "medium.wav"}
    kinds = [encoder.modality for encoder in model.encoders.values()] + [d.modality for d in model.decoders.values()]
    if unknown := sorted(set(kinds) - set(names)):
        raise InputError(f"media of the kind {', '.join(unknown)} cannot be made up; give a config with data")
    said = {"type": "text", "text": "a red circle"}
    turns = [([{"type": e.modality, "path": names[e.modality]}, said], [said]) for e in model.encoders.values()]
    turns += [
        ([said], [{"type": d.modality, "path": names[d.modality], "caption": "a red circle"}])
        for d in model.decoders.values()
    ]
    with (folder / "rows.jsonl").open("w") as file:
        for index, (user, assistant) in enumerate(turns or [([said], [said])]):
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            file.write(json.dumps({"id": str(index), "messages": messages}) + "\n")
    return folder / "rows.jsonl"


def make_batch(model: MultimodalModel, processor: MultimodalProcessor, sources: list[DataSource]) -> dict[str, Any]:
    """Batch of few samples that cover all input and output media in the data; synthetic if there is no data."""
    with tempfile.TemporaryDirectory() as folder:
        if not sources or not all(Path(source.path).exists() for source in sources):
            print("no data: the media are made up\n")
            sources = [DataSource(path=str(make_samples(model, Path(folder))))]
        dataset = ConversationDataset.from_files(sources)
        use_frames_of(dataset, processor)
        dataset.on_bad_sample = "error"
        chosen, covered = [], set()
        for index, sample in enumerate(dataset.samples):
            kinds = {(role, part.type) for role, part in sample.media()}
            if kinds - covered or not chosen:
                chosen.append(index)
                covered |= kinds
        batch = Collator(processor)([dataset[index] for index in chosen])
    if batch[BAD]:
        raise InputError(batch[BAD][0].reason)
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}


def load(arguments: list[str]) -> tuple[MultimodalModel, MultimodalProcessor, list[DataSource]]:
    """Load the model of a config (with overrides) or of a checkpoint, and the config's data."""
    parser = new_parser("trace-shapes", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", help="a YAML file of a stage; dotted overrides may follow")
    what.add_argument("--checkpoint", metavar="DIR", help="a final/ folder")
    options, overrides = parser.parse_known_args(arguments)
    if options.checkpoint is None:
        config = parse_config([f"--config={options.config}", *overrides])
        return *build(config), config.data.train
    if overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    model = MultimodalModel.from_pretrained(options.checkpoint)
    processor = MultimodalProcessor.from_pretrained(options.checkpoint)
    processor.register(model)
    return model, processor, []


def main(arguments: list[str]) -> None:
    model, processor, sources = load(arguments)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    print(trace(model, move(make_batch(model, processor, sources), model.device)))
