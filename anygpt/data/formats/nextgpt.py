"""NExT-GPT's JSON: its `*_comprehension` and `*_generation` files, and its instruction files."""

from typing import Any

from anygpt.data.formats import turns as common
from anygpt.data.schema import MEDIA_TYPES, DataError, check_keys
from anygpt.errors import InputError

TURN_KEYS = ("from", "value", "caption", "input_modality", "output_modality")
KEYS = (
    "id",
    "conversations",
    *(f"{side}_{kind}" for kind in MEDIA_TYPES for side in ("input", "output")),
    *(f"{kind}_captions" for kind in MEDIA_TYPES),
    # NExT-GPT's own text encodings (pickled arrays) and notes on where a row comes from: not needed, not read.
    *(f"{kind}_caption_embeddings" for kind in MEDIA_TYPES),
    "source_data",
)


def convert(row: Any, where: str) -> dict:
    """One row in the project's own form.

    `<image>`, `<video>` and `<audio>` in the turns' values say where the media stand: in a human turn the
    next of `input_<type>`, in a gpt turn the next of `output_<type>` with the next of `<type>_captions`
    (each one string, or a list). Where no human turn has a marker of a type, its inputs are put at the
    start of the first human turn (a habit of LLaVA). A turn's own `caption` repeats the row's, and is used
    where the row has none. A row with captions but no media (NExT-GPT's T-T+X and MosIT files, which rely
    on encodings made beforehand) is an error, as there is no target to decode.
    """
    check_keys(row, KEYS, where)
    turns = common.checked_turns(row, TURN_KEYS, where)
    media = {
        "human": {kind: common.inputs(row, f"input_{kind}", turns, kind, where) for kind in MEDIA_TYPES},
        "gpt": {kind: _targets(row, turns, kind, where) for kind in MEDIA_TYPES},
    }
    return common.with_id(row, common.messages(turns, media))


def _targets(row: dict, turns: list[dict], kind: str, where: str) -> list[dict]:
    files = common.listed(row, f"output_{kind}", where)
    captions = common.listed(row, f"{kind}_captions", where)
    if captions and not files:
        raise InputError(
            f"{where} has '{kind}_captions' but no 'output_{kind}': a target is a {kind} file with its caption; "
            f"add the file names, or take the '<{kind}>' markers and captions out."
        )
    markers = common.count_markers(turns, "gpt", kind)
    if markers != len(files):
        raise common.count_error(where, "gpt", kind, markers, f"'output_{kind}' names {len(files)} file(s)")
    if not captions:
        captions = [
            t["caption"] for t in turns if t["from"] == "gpt" and t.get("output_modality") == kind and t.get("caption")
        ]
    if len(captions) != len(files):
        raise DataError(
            f"{where}: 'output_{kind}' names {len(files)} file(s) and '{kind}_captions' holds {len(captions)} "
            "caption(s): give one caption a file.",
            "caption",
        )
    return [{"type": kind, "path": f, "caption": c} for f, c in zip(files, captions, strict=True)]
