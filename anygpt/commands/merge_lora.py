"""Merge trained tensors into the parts: LoRA into the weights, signal tokens into resized matrices.

    anygpt merge-lora --checkpoint runs/tiny/stage3/final --output runs/merged [--dtype float32]

The output is an ordinary composition (`MultimodalModel.from_pretrained`) without adapters; transformers can load its
`parts/language_model`, a language model with its tokenizer, by itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from anygpt import MultimodalModel, MultimodalProcessor
from anygpt.commands import new_parser
from anygpt.errors import InputError, reading
from anygpt.model.parts import is_peft, part_modules

DTYPES = ("float32", "bfloat16", "float16")


def merge(checkpoint: Path, output: Path, dtype: str | None) -> None:
    """Write the merged composition to `output` atomically.

    Raises:
        InputError: no saved model, nothing to merge, or `output` exists already.
    """
    if output.exists():
        raise InputError(f"--output {output} is there already; choose another folder")
    with reading(checkpoint):
        model = MultimodalModel.from_pretrained(checkpoint)
        processor = MultimodalProcessor.from_pretrained(checkpoint, model=model)
    if not model.signal_tokens.ids and not any(map(is_peft, part_modules(model).values())):
        raise InputError(f"{checkpoint} has neither an adapter nor signal tokens, so there is nothing to merge")
    if dtype is not None:
        model.language_model.to(getattr(torch, dtype))
    temporary = output.parent / f".{output.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, merge=True)
        processor.save_pretrained(temporary)
        temporary.rename(output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: list[str]) -> None:
    parser = new_parser("merge-lora", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's final/ or checkpoint-<step>/ folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the merged language model (default: its own; merging in bfloat16 rounds)"
    )
    options = parser.parse_args(arguments)
    merge(options.checkpoint, options.output, options.dtype)
    print(options.output)
