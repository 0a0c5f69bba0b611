"""The model card of a composition: its parts, what was trained, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from anygpt.errors import InputError
from anygpt.model.loading import part_entries, read_config
from anygpt.parts.source import Source

_TEXT = """---
{data}
---

# {title}

An any-to-any composition of pretrained parts, made with AnyGPT: it reads {inputs} and answers with {outputs}.

| part | class | from | revision | licence |
|---|---|---|---|---|
{parts}

{trained}

```python
from anygpt import MultimodalModel, MultimodalProcessor

model = MultimodalModel.from_pretrained("{repo_id}")
processor = MultimodalProcessor.from_pretrained("{repo_id}", model=model)
```

Parts that are named by id are downloaded from their own repositories, under their own licences.
"""


def write_card(folder: Path, repo_id: str) -> None:
    """Write the card of a saved composition as its `README.md`."""
    config = read_config(folder)
    rows, bases = [], []
    for name, entry in part_entries(config).items():
        source = Source(**entry["source"]) if entry["source"] else None
        origin, revision, licence = f"this repository, `parts/{name}`", "", "see its origin"
        if source is not None:
            bases.append(source.path)
            origin, revision = f"[{source.path}](https://huggingface.co/{source.path})", source.revision or "main"
            licence = _licence(source)
        adapter = " and an adapter" if entry["adapter"] else ""
        rows.append(f"| {name} | {entry['class'].rpartition('.')[2]}{adapter} | {origin} | {revision} | {licence} |")
    data = ModelCardData(library_name="anygpt", pipeline_tag="any-to-any", base_model=bases or None)
    media = [[entry["modality"] for entry in entries.values()] for entries in (config.encoders, config.decoders)]
    (folder / "README.md").write_text(
        _TEXT.format(
            data=data.to_yaml(),
            title=repo_id.rpartition("/")[2],
            inputs=_listed(media[0]),
            outputs=_listed(media[1]),
            parts="\n".join(rows),
            trained=_trained(config.trained),
            repo_id=repo_id,
        )
    )


def _listed(media: list[str]) -> str:
    return ", ".join(["text", *dict.fromkeys(media)])


def _licence(source: Source) -> str:
    try:
        card = source.place.file("README.md")
        return str((metadata_load(card) or {}).get("license", "unknown")) if card else "unknown"
    except (InputError, OSError, ValueError):
        return "unknown"


def _trained(notes: dict[str, Any] | None) -> str:
    if not notes:
        return "Nothing is noted of its training."
    losses = ", ".join(f"{name} {value:.4g}" for name, value in notes["losses"].items())
    return (
        f"Trained in {notes['stage']} for {notes['updates']} updates: {', '.join(notes['parts'])}. "
        f"At the end: {losses or 'no loss was taken'}."
    )
