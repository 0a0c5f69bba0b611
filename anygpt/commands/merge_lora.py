"""Merge trained tensors into the parts: LoRA into the weights, signal tokens into resized matrices.

    anygpt merge-lora --checkpoint runs/tiny/stage3/final --output runs/merged [--dtype float32]

The output is an ordinary composition (`MultimodalModel.from_pretrained`) without adapters; transformers can load its
`parts/language_model`, a language model with its tokenizer, by itself.
"""

from pathlib import Path

import torch

from anygpt.chat.chat_model import load_checkpoint
from anygpt.commands import new_parser
from anygpt.errors import InputError, refusing
from anygpt.media.writing import replacing
from anygpt.model.parts import adapter_of, part_modules

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str]) -> None:
    parser = new_parser("merge-lora", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's final/ or checkpoint-<step>/ folder")
    add("--output", type=Path, required=True, help="folder to write")
    add("--dtype", choices=DTYPES, help="dtype of the language model (default: its own; merging in bfloat16 rounds)")
    options = parser.parse_args(arguments)
    output = options.output
    if output.exists():
        raise InputError(f"--output {output} already exists; choose another folder")
    model, processor = load_checkpoint(options.checkpoint)
    if not model.signal_tokens.ids and not any(map(adapter_of, part_modules(model).values())):
        raise InputError(f"{options.checkpoint} has neither an adapter nor signal tokens, so there is nothing to merge")
    if options.dtype is not None:
        model.language_model.to(getattr(torch, options.dtype))
    with refusing(f"--output {output} cannot be written", (OSError,)), replacing(output) as temporary:
        model.save_pretrained(temporary, merge=True)
        processor.save_pretrained(temporary)
    print(output)
