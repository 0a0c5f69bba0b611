"""Print the README's table of supported parts, from the lists that the tests run through."""

from __future__ import annotations

from decoder_families import FAMILIES
from tiny_parts import ENCODERS, LANGUAGE_MODELS


def table() -> str:
    """Markdown, one line a modality."""
    rows = [
        (f"{modality} encoders", [encoder.label for encoder in ENCODERS if encoder.modality == modality])
        for modality in ("image", "video", "audio")
    ]
    rows.append(("language models", [language_model.label for language_model in LANGUAGE_MODELS]))
    first = ["Stable Diffusion", "Stable Diffusion XL", "Stable Diffusion 3", "Zeroscope", "AudioLDM"]
    rows.append(("decoders", [*first, *(family.label for family in FAMILIES.values())]))
    lines = [f"| {what} | {', '.join(labels)} |" for what, labels in rows]
    return "\n".join(["| parts | tested in every combination |", "|---|---|", *lines])


if __name__ == "__main__":
    print(table())
