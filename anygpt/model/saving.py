"""Saving a composition, the tensors that no source supplies, and pushing it to the hub with a model card.

A folder holds::

    config.json               the composition; source and fingerprint of each frozen part
    model.safetensors         projectors, signal tokens, layer mixes
    adapters/<part>/          PEFT adapters, in PEFT's own format; a decoder's as `<key>_denoiser`
    parts/<part>/             parts that have no source, or changed since they were loaded, as a whole
    tokenizer and processor   written by `MultimodalProcessor.save_pretrained`

With `save_pretrained(merge=True)` there are no adapters, and `parts/language_model` is a causal language model whose
own matrices hold the signal tokens' rows.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import ModelCardData, save_torch_state_dict
from huggingface_hub.repocard import metadata_load
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from anygpt.composition import Composition
from anygpt.decoders.base import DiffusionDecoder
from anygpt.encoders.module import base_model
from anygpt.encoders.video import VideoEncoder
from anygpt.errors import InputError, refusing
from anygpt.model.configuration import MultimodalConfig
from anygpt.model.loading import load_source, read_config
from anygpt.model.parts import (
    adapter_name,
    adapter_of,
    fingerprint,
    own_state,
    own_tensors,
    part_modules,
    source_of,
    unwrapped,
)
from anygpt.parts.manifest import MANIFEST
from anygpt.parts.publishing import PUSH_ARGUMENTS, check_push, let_umask_decide, push
from anygpt.parts.source import Source
from anygpt.sequence.signal_tokens import SignalTokens
from anygpt.tokenizers.base import MediaTokenizer

SHARD = "50GB"
CARD = """---
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


def save_pretrained(
    model: Composition,
    folder: str | Path,
    *,
    merge: bool = False,
    standalone: bool = False,
    portable: bool = False,
    max_shard_size: int | str = SHARD,
    push_to_hub: bool = False,
    **hub: Any,
) -> None:
    """Write the composition into `folder`.

    A part with a source is saved as a reference to it if its tensors are those of the source; other parts are written
    whole under `parts/`. File permissions follow the umask.

    Args:
        folder: created if missing.
        merge: merge adapters into their parts, and write the language model whole, with the signal tokens' rows in
            its own matrices and the tokenizer beside it. Works on copies of the adapted parts and the language model.
        standalone: write every part whole, so that loading needs no other files.
        portable: write those parts whole whose sources are local folders.
        max_shard_size: of each file of tensors, in bytes or as `5GB`.
        push_to_hub: upload afterwards, with the arguments of `push_to_hub` in `hub`; `repo_id` defaults to the folder's
            name.
    """
    if unknown := sorted(set(hub) - {"repo_id", *PUSH_ARGUMENTS} if push_to_hub else hub):
        raise InputError(f"save_pretrained has no argument {unknown[0]!r}")
    with refusing(f"max_shard_size is {max_shard_size!r}; expected bytes, or a size such as '5GB'"):
        convert_file_size_to_int(max_shard_size)  # before anything is written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # it describes the previous content
    config = MultimodalConfig.of(model)
    for name, part in part_modules(model).items():
        entry = config.parts[name]
        if merge:
            part = _merge_adapter(part)
        adapter = adapter_of(part)
        entry["adapter"] = adapter is not None
        if merge and name == "language_model" and model.signal_tokens.ids:
            entry["vocab_size"] = part.get_input_embeddings().weight.shape[0]
            part = _write_signal_rows(part, model.signal_tokens, (model.token_ids or {}).values())
        entry["fingerprint"] = fingerprint(part)
        source = source_of(part)
        whole = standalone or source is None or (portable and Path(source.folder).exists())
        if whole or not _supplies(part, entry):
            entry["source"], entry["dtypes"] = None, _dtypes(part)
            _save_part(part, folder / "parts" / name, max_shard_size)
        if adapter is not None:
            adapter.save_pretrained(folder / "adapters" / adapter_name(name), save_embedding_layers=False)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
        if merge and (folder / "parts/language_model").is_dir():
            model.tokenizer.save_pretrained(folder / "parts/language_model")
    config.save_pretrained(folder)
    tensors = {name: tensor.cpu() for name, tensor in own_tensors(model).items()}
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    if not tensors:  # save_torch_state_dict then writes no file
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    let_umask_decide(folder)
    if push_to_hub:
        push(folder, **{"repo_id": folder.name} | hub)


def push_to_hub(
    model: Composition, repo_id: str, *, standalone: bool = False, max_shard_size: int | str = SHARD, **options: Any
) -> str:
    """Upload the composition with a model card to `name` or `owner/name`; returns the URL of the commit.

    Parts from local folders are uploaded whole. `options` are those of `push`; the others as in `save_pretrained`.
    """
    check_push(options)
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, standalone=standalone, portable=True, max_shard_size=max_shard_size)
        _write_card(Path(folder), repo_id)
        return push(folder, repo_id, **options)


def _write_card(folder: Path, repo_id: str) -> None:
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
        CARD.format(
            data=data.to_yaml(), title=title, reads=reads, makes=makes, parts=parts, trained=trained, repo_id=repo_id
        )
    )


def _licence(source: Source) -> str:
    try:
        card = source.place.file("README.md")
        return str((metadata_load(card) or {}).get("license", "unknown")) if card else "unknown"
    except (InputError, OSError, ValueError):
        return "unknown"


def _supplies(part: nn.Module, entry: dict[str, Any]) -> bool:
    """Whether loading the part's source again would give the part in its current state."""
    inner = base_model(part)
    if not hasattr(inner, "anygpt_fingerprint"):
        # A part that the caller loaded may have been changed before (resized embeddings, a merged adapter), or be of
        # another class than ours, so compare it once with its source.
        try:
            source = load_source(entry)
        except InputError:
            return False
        inner.anygpt_fingerprint = source.anygpt_fingerprint
        if isinstance(inner, DiffusionDecoder):
            inner.anygpt_state_beside_tensors = source.anygpt_state_beside_tensors
    if isinstance(inner, DiffusionDecoder) and inner.anygpt_state_beside_tensors != inner.state_beside_tensors:
        return False
    return inner.anygpt_fingerprint == entry["fingerprint"]


def _dtypes(part: nn.Module) -> dict[str, list[str]]:
    """Names of a part's floating-point tensors by dtype; an empty list if there is only one dtype."""
    inner = base_model(part)
    found: dict[str, list[str]] = {}
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        if tensor.is_floating_point():
            found.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(unwrapped(name))
    return found if len(found) > 1 else {dtype: [] for dtype in found}


def _save_part(part: nn.Module, folder: Path, max_shard_size: int | str) -> None:
    if isinstance(part, DiffusionDecoder):
        part.without_adapter().save_pretrained(folder, max_shard_size=max_shard_size)
        return
    if isinstance(part, MediaTokenizer):
        part.save_pretrained(folder)
        return
    inner, state = base_model(part), own_state(part)
    if isinstance(inner, VideoEncoder):
        prefix = f"{VideoEncoder.base_model_prefix}."
        inner, state = inner.image_encoder, {name.removeprefix(prefix): t for name, t in state.items()}
    inner.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def _merge_adapter(part: nn.Module) -> nn.Module:
    """A copy of a part with its adapter merged into its weights; the part itself if it has no adapter."""
    if adapter_of(part) is None:
        return part
    is_decoder = isinstance(part, DiffusionDecoder)
    merged = part.without_adapter(merge=True) if is_decoder else copy.deepcopy(part).merge_and_unload()
    merged.anygpt_source = None  # its source has other weights
    return merged


@torch.no_grad()
def _write_signal_rows(
    language_model: PreTrainedModel, signal: SignalTokens, other_ids: Iterable[int]
) -> PreTrainedModel:
    """A copy of a language model whose matrices hold the signal tokens' rows, so that it needs no `SignalTokens`.

    Logits equal those inside `SignalTokens.attached`, except for tokens that are never generated (placeholders, learned
    queries), whose output rows are zero and which the generation config suppresses. Embedding and head are untied.
    """
    model = copy.deepcopy(language_model)
    model.anygpt_source = None
    before = model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    unsaid = sorted({*other_ids, *signal.query_ids})
    size = max([before - 1, *unsaid, *(i for key in signal.ids for i in signal.row_ids(key))]) + 1
    if size > before:
        model.resize_token_embeddings(size, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight[before:] = 0
    head.weight[before:] = 0
    for key in signal.ids:
        said = signal.row_ids(key)[: len(signal.output_rows[key])]
        embedding.weight[signal.row_ids(key)] = signal.input_rows[key].to(embedding.weight)
        head.weight[said] = signal.output_rows[key].to(head.weight)
        if getattr(head, "bias", None) is not None:
            head.bias[said] = 0
    if model.generation_config is not None and unsaid:
        model.generation_config.suppress_tokens = unsaid
    return model
