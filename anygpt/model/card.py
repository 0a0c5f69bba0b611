"""The model card of a composition: its parts, what was trained, and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from anygpt.errors import InputError
from anygpt.model.loading import read_config
from anygpt.parts.source import Source

_TEXT = """---
{data}
---

# {title}

An any-to-any composition of pretrained parts, made with AnyGPT: it reads {reads} and answers with {makes}.

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
    for name, entry in config.parts.items():
        row = [f"this repository, `parts/{name}`", "", "see its origin"]
        if entry["source"]:
            source = Source(**entry["source"])
            bases.append(source.path)
            origin = f"[{source.path}](https://huggingface.co/{source.path})"
            row = [origin, source.revision or "main", _licence(source)]
        kind = entry["class"].rpartition(".")[2] + (" and an adapter" if entry["adapter"] else "")
        rows.append(f"| {' | '.join([name, kind, *row])} |")
    reads, makes = (
        ", ".join(["text", *dict.fromkeys(entry["modality"] for entry in entries.values())])
        for entries in (config.encoders, config.decoders)
    )
    data = ModelCardData(library_name="anygpt", pipeline_tag="any-to-any", base_model=bases or None)
    trained = "Nothing is noted of its training."
    if notes := config.trained:
        losses = ", ".join(f"{name} {value:.4g}" for name, value in notes["losses"].items())
        trained = (
            f"Trained in {notes['stage']} for {notes['updates']} updates: {', '.join(notes['parts'])}. "
            f"At the end: {losses or 'no loss was taken'}."
        )
    title, parts = repo_id.rpartition("/")[2], "\n".join(rows)
    (folder / "README.md").write_text(
        _TEXT.format(
            data=data.to_yaml(), title=title, reads=reads, makes=makes, parts=parts, trained=trained, repo_id=repo_id
        )
    )


def _licence(source: Source) -> str:
    try:
        card = source.place.file("README.md")
        return str((metadata_load(card) or {}).get("license", "unknown")) if card else "unknown"
    except (InputError, OSError, ValueError):
        return "unknown"
