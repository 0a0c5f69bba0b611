"""NExT-GPT's JSON: its `*_comprehension` and `*_generation` files, and its instruction files."""

from typing import Annotated, Any

from anygpt.data.formats.turns import Turn, TurnsRow, count_error, count_markers, inputs, messages
from anygpt.data.rows import DataError, Text, at_least_one
from anygpt.errors import InputError
from anygpt.media.types import MEDIA


class NextGptTurn(Turn):
    """A turn; `caption` belongs to its medium."""

    caption: Text | None = None
    input_modality: Any = None
    output_modality: Any = None


class NextGptRow(TurnsRow):
    """A conversation; `*_caption_embeddings` (pickled arrays) and `source_data` are ignored."""

    conversations: Annotated[list[NextGptTurn], at_least_one("turn")]
    source_data: Any = None

    @classmethod
    def keys(cls) -> set[str]:
        forms = ("input_{}", "output_{}", "{}_captions", "{}_caption_embeddings")
        return super().keys() | {form.format(kind) for form in forms for kind in MEDIA}


def convert(row: NextGptRow, where: str) -> dict:
    """Convert one row.

    `<image>`, `<video>` and `<audio>` in the turns mark the places of the media: in a human turn the next of
    `input_<type>`, in a gpt turn the next of `output_<type>` with the next of `<type>_captions` (each a string or a
    list). Inputs of a type without markers open the first human turn, as in LLaVA. A turn's own `caption` is used if
    the row has none. A row with captions but no media (NExT-GPT's T-T+X and MosIT files, which rely on precomputed
    encodings) is an error, as it has no target to decode.
    """
    human = {kind: inputs(row, f"input_{kind}", kind, where) for kind in MEDIA}
    return messages(row, {"human": human, "gpt": {kind: _targets(row, kind, where) for kind in MEDIA}})


def _targets(row: NextGptRow, kind: str, where: str) -> list[dict]:
    files, captions = row.listed(f"output_{kind}"), row.listed(f"{kind}_captions")
    if captions and not files:
        raise InputError(
            f"{where} has '{kind}_captions' but no 'output_{kind}': a target is a {kind} file with its caption; "
            f"add the file names, or take the '<{kind}>' markers and captions out."
        )
    markers = count_markers(row, "gpt", kind)
    if markers != len(files):
        raise count_error(where, "gpt", kind, markers, f"'output_{kind}' names {len(files)} file(s)")
    if not captions:
        turns = (turn for turn in row.conversations if turn.speaker == "gpt" and turn.output_modality == kind)
        captions = [turn.caption for turn in turns if turn.caption]
    if len(captions) != len(files):
        raise DataError(
            f"{where}: 'output_{kind}' names {len(files)} file(s) and '{kind}_captions' holds {len(captions)} "
            "caption(s): give one caption a file.",
            "caption",
        )
    return [{"type": kind, "path": f, "caption": c} for f, c in zip(files, captions, strict=True)]
