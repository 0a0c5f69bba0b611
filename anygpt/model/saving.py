"""Saving a composition: the tensors that no source supplies.

A folder holds::

    config.json               the composition; source and fingerprint of each frozen part
    model.safetensors         projectors, signal tokens, layer mixes
    adapters/<part>/          PEFT adapters, in PEFT's own format
    parts/<part>/             whole parts that have no source, or changed since they were loaded
    tokenizer and processor   written by `MultimodalProcessor.save_pretrained`

With `save_pretrained(merge=True)` there are no adapters, and `parts/language_model` is a causal language model whose
own matrices hold the signal tokens' rows.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

from anygpt.composition import Composition
from anygpt.decoders.base import DiffusionDecoder
from anygpt.encoders.module import base_model
from anygpt.encoders.video import VideoEncoder
from anygpt.errors import InputError
from anygpt.model.card import write_card
from anygpt.model.configuration import MultimodalConfig
from anygpt.model.loading import load_source, own_tensors, part_entries, part_modules
from anygpt.model.parts import Source, fingerprint, is_peft, own_state, source_of
from anygpt.model.standalone import merge_adapter, write_signal_rows
from anygpt.parts.manifest import MANIFEST
from anygpt.parts.publishing import let_umask_decide, push

SHARD = "50GB"


class KnownSources:
    """Fingerprints of parts at construction, which tell whether their sources still supply them."""

    def __init__(self, model: Composition):
        self.fingerprints = {
            name: getattr(base_model(part), "anygpt_fingerprint", None) or fingerprint(part)
            for name, part in part_modules(model).items()
            if source_of(part) is not None
        }
        self._same: dict[str, bool] = {}

    def supply(self, name: str, part: nn.Module, entry: dict[str, Any]) -> bool:
        """Whether loading the part's source again would give the part in its current state."""
        if entry["fingerprint"] != self.fingerprints.get(name):
            return False
        if name not in self._same:
            # A part that the caller loaded may have been changed before (resized embeddings, a merged adapter), or be
            # of another class than ours, so compare it once with its source.
            ours = hasattr(base_model(part), "anygpt_source")
            try:
                same = ours or fingerprint(load_source(Source(**entry["source"]), entry)) == entry["fingerprint"]
            except InputError:
                same = False
            self._same[name] = same
        return self._same[name]


def save_pretrained(
    model: Composition,
    folder: str | Path,
    *,
    merge: bool = False,
    standalone: bool = False,
    portable: bool = False,
    max_shard_size: int | str = SHARD,
    push_to_hub: bool = False,
    safe_serialization: bool = True,
    is_main_process: bool = True,
    **hub: Any,
) -> None:
    """Write the composition into `folder`.

    A part with a source is saved as a reference to it if its tensors are unchanged since the model was made; other
    parts are written whole under `parts/`. File permissions follow the umask.

    Args:
        folder: created if missing.
        merge: merge adapters into their parts, and write the language model whole, with the signal tokens' rows in
            its own matrices and the tokenizer beside it. Works on copies of the adapted parts and the language model.
        standalone: write every part whole, so that loading needs no other files.
        portable: write parts whole whose sources are local folders.
        max_shard_size: of each file of tensors.
        push_to_hub: upload afterwards, with the arguments of `push_to_hub` in `hub`; `repo_id` defaults to the folder's
            name.
        safe_serialization: only True.
        is_main_process: False writes nothing.

    Raises:
        InputError: an unknown argument.
    """
    if unknown := sorted(set(hub) - set(PUSH_ARGUMENTS if push_to_hub else ())):
        raise InputError(f"save_pretrained has no argument {unknown[0]!r}")
    if not safe_serialization:
        raise InputError("safe_serialization can only be True: nothing is ever pickled")
    if not is_main_process:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # it describes the previous content
    config = MultimodalConfig.of(model)
    modules = part_modules(model)
    if merge:
        modules = {name: merge_adapter(part) for name, part in modules.items()}
    for name, entry in part_entries(config).items():
        part = modules[name]
        entry["adapter"] = is_peft(part)
        if merge and name == "language_model" and model.signal_tokens.ids:
            entry["vocab_size"] = part.get_input_embeddings().weight.shape[0]
            part = write_signal_rows(part, model.signal_tokens, (model.token_ids or {}).values())
        entry["fingerprint"] = fingerprint(part)
        source = source_of(part)
        whole = standalone or source is None or (portable and not source.is_hub_id)
        if whole or not model.sources.supply(name, part_modules(model)[name], entry):
            entry["source"] = None
            entry["dtypes"] = _dtypes(part)
            _save_part(part, folder / "parts" / name, max_shard_size)
        if entry["adapter"]:
            part.save_pretrained(folder / "adapters" / name, save_embedding_layers=False)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
        if merge and (folder / "parts/language_model").is_dir():
            model.tokenizer.save_pretrained(folder / "parts/language_model")
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in own_tensors(model).items()}
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    if not tensors:  # save_torch_state_dict then writes no file
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    let_umask_decide(folder)
    if push_to_hub:
        push(folder, **{"repo_id": folder.name} | hub)


PUSH_ARGUMENTS = ("repo_id", "private", "token", "revision", "commit_message", "commit_description", "create_pr")


def push_to_hub(
    model: Composition, repo_id: str, *, standalone: bool = False, max_shard_size: int | str = SHARD, **options: Any
) -> str:
    """Upload the composition with a model card; parts from local folders are uploaded whole.

    Args:
        repo_id: `name` or `owner/name`; created if missing.
        standalone, max_shard_size: as in `save_pretrained`.
        options: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`.

    Returns:
        The URL of the commit.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, standalone=standalone, portable=True, max_shard_size=max_shard_size)
        write_card(Path(folder), repo_id)
        return push(folder, repo_id, **options)


def _dtypes(part: nn.Module) -> dict[str, list[str]]:
    """Names of a part's floating-point tensors by dtype; an empty list if there is only one dtype."""
    inner = base_model(part)
    found: dict[str, list[str]] = {}
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        if tensor.is_floating_point():
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            found.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(name)
    return found if len(found) > 1 else {dtype: [] for dtype in found}


def _save_part(part: nn.Module, folder: Path, max_shard_size: int | str) -> None:
    if isinstance(part, DiffusionDecoder):
        part.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    inner, state = base_model(part), own_state(part)
    if isinstance(inner, VideoEncoder):
        prefix = f"{VideoEncoder.base_model_prefix}."
        inner, state = inner.image_encoder, {name.removeprefix(prefix): t for name, t in state.items()}
    inner.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
