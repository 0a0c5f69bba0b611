"""Write the README's table of supported parts, from the lists that the tests run through."""

from __future__ import annotations

from pathlib import Path

from decoder_families import FAMILIES
from tiny_parts import ENCODERS, LANGUAGE_MODELS

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support matrix -->\n", "\n<!-- end of support matrix -->"

TESTED = (
    "tested at tiny sizes with random weights: each encoder with each language model, each decoder against its pipeline"
)


def table() -> str:
    """Markdown, one line a modality."""
    rows = [
        (f"{modality} encoders", [encoder.label for encoder in ENCODERS if encoder.modality == modality])
        for modality in ("image", "video", "audio")
    ]
    rows.append(("language models", [language_model.label for language_model in LANGUAGE_MODELS]))
    first = ["Stable Diffusion", "Stable Diffusion XL", "Stable Diffusion 3", "Zeroscope", "AudioLDM"]
    edit = ["InstructPix2Pix", "FLUX.1 Kontext"]  # in test_editing.py
    rows.append(("decoders", [*first, *(family.label for family in FAMILIES.values()), *edit]))
    lines = [f"| {what} | {', '.join(labels)} |" for what, labels in rows]
    return "\n".join([f"| parts | {TESTED} |", "|---|---|", *lines])


if __name__ == "__main__":
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])
