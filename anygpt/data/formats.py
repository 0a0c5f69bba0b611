"""Data files of several formats, read into `Sample`s without a conversion step.

A format is one entry of `FORMATS`: how the rows are found in the file, and a function that turns one row
into the project's own JSON form (`anygpt.data.schema.parse_sample`), where all checks are made.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anygpt.data.schema import MEDIA_TYPES, MediaRoot, Sample, check_keys, checked_text, parse_sample
from anygpt.errors import InputError


class Row(NamedTuple):
    """One row as it stands in the file. `value` is the parsed JSON, or the fault that kept it from being parsed."""

    source: str
    index: int
    value: Any


class Format(NamedTuple):
    """`rows(path)` yields the rows; `convert(value, where)` gives a row in the project's own form."""

    rows: Callable[[Path], Iterator[Row]]
    convert: Callable[[Any, str], Any]
    suffix: str
    media_by_type: bool  # look in images/, videos/ and audios/ too (see MediaRoot)


def read_samples(
    path: str | Path,
    format: str | None = None,
    media_root: str | Path | None = None,
    faults: list[InputError] | None = None,
) -> list[Sample]:
    """Reads one data file and checks every row and that every media file exists.

    Args:
        path: the data file.
        format: a key of `FORMATS`; None goes by the suffix (`.jsonl`: "jsonl", `.json`: "nextgpt").
        media_root: the folder that media paths are relative to and may not leave; None is the folder of
            `path`. For "nextgpt", names that are not there are looked for in its `images`, `videos` and
            `audios` (NExT-GPT keeps `cc3m.json` beside `cc3m/images`).
        faults: None makes the first fault an error. A list collects the faults instead, and the rows that
            have one are left out of the result.

    Returns:
        The samples in the order of the file. Rows without an id get `<file stem>-<row index>`, from 0.

    Raises:
        InputError: an unreadable or empty file, an unknown format; and, with `faults=None`, any row that is
            not right, a repeated id, or missing media (naming the first, and how many are missing in all).
    """
    path = Path(path)
    chosen = _choose_format(path, format)
    root = MediaRoot(path.parent if media_root is None else media_root, by_type=chosen.media_by_type)
    samples: list[Sample] = []
    missing: list[tuple[Sample, Path]] = []
    first_source: dict[str, str] = {}  # by sample id
    rows = 0
    for row in chosen.rows(path):
        rows += 1
        try:
            if isinstance(row.value, InputError):
                raise row.value
            sample = parse_sample(chosen.convert(row.value, row.source), row.source, f"{path.stem}-{row.index}", root)
            if sample.id in first_source:
                raise InputError(
                    f"{row.source}: the id {sample.id!r} was already used at {first_source[sample.id]}: "
                    "give every sample its own id, or none."
                )
            first_source[sample.id] = row.source
            absent = [part.path for _, part in sample.media() if not part.path.is_file()]
            missing += [(sample, file) for file in absent]
            if absent and faults is not None:
                raise _missing_error([(sample, file) for file in absent], root)
        except InputError as fault:
            if faults is None:
                raise
            faults.append(fault)
        else:
            samples.append(sample)
    if rows == 0:
        raise InputError(f"{path} holds no samples: it is empty.")
    if missing and faults is None:
        raise _missing_error(missing, root)
    return samples


def _choose_format(path: Path, name: str | None) -> Format:
    if not path.is_file():
        raise InputError(
            f"The data file {path} {'is not a file' if path.exists() else 'does not exist'}: check the path."
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"The data file {path} may not be read: change its permissions.")
    if name is None:
        for known in FORMATS.values():
            if path.suffix.lower() == known.suffix:
                return known
        raise InputError(f"The format of {path} cannot be told from its suffix: give format ({', '.join(FORMATS)}).")
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "check the spelling"
        raise InputError(f"The format {name!r} of {path} is not known: {hint} (known: {', '.join(FORMATS)})")
    return FORMATS[name]


def _missing_error(missing: list[tuple[Sample, Path]], root: MediaRoot) -> InputError:
    sample, file = missing[0]
    count = len({file for _, file in missing})
    total = "1 media file is missing" if count == 1 else f"{count} media files are missing in all"
    return InputError(
        f"{sample.source} (sample {sample.id!r}): {file} does not exist or is not a file ({total}): "
        f"put the files there, or set media_root (it is {root.folder})."
    )


# -- rows ------------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """One JSON value a line; blank lines are passed over. Read line by line, so files may be large."""
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, from Windows editors
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                value = _parse_json(line, source)
            except InputError as fault:
                value = fault
            yield Row(source, index, value)
            index += 1


def _json_rows(path: Path) -> Iterator[Row]:
    """The elements of one JSON list, named `file.json[0]`, `file.json[1]`, …"""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        return
    values = _parse_json(content, str(path))
    if not isinstance(values, list):
        raise InputError(f"{path} must hold one JSON list of rows, and holds a {type(values).__name__}.")
    for index, value in enumerate(values):
        yield Row(f"{path}[{index}]", index, value)


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f"{where}:{line}" if b"\n" in content.rstrip() else where
        raise InputError(f"{place} is not UTF-8 (byte {content[error.start]:#04x}): save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if b"\n" in content.rstrip() else where
        raise InputError(f"{place} is not valid JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise InputError(f"{where} is not JSON that can be read: {error}.") from error


# -- NExT-GPT --------------------------------------------------------------------------------------------

NEXTGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
NEXTGPT_TURN_KEYS = ("from", "value", "caption", "input_modality", "output_modality")
NEXTGPT_KEYS = (
    "id",
    "conversations",
    *(f"{side}_{kind}" for kind in MEDIA_TYPES for side in ("input", "output")),
    *(f"{kind}_captions" for kind in MEDIA_TYPES),
    # NExT-GPT's own text encodings (pickled arrays) and notes on where a row comes from: not needed, not read.
    *(f"{kind}_caption_embeddings" for kind in MEDIA_TYPES),
    "source_data",
)
# One line break that sets a marker off from the text belongs to the marker; other white space is text.
MARKER = re.compile(r"\n?<(image|video|audio)>\n?")


def _convert_nextgpt(row: Any, where: str) -> dict:
    """One row of NExT-GPT's JSON (its `*_comprehension`, `*_generation` and LLaVA/Alpaca instruction files).

    `<image>`, `<video>` and `<audio>` in the turns' values say where the media stand: in a human turn the
    next of `input_<type>`, in a gpt turn the next of `output_<type>` with the next of `<type>_captions`
    (each one string, or a list). Where no human turn has a marker of a type, its inputs are put at the
    start of the first human turn (a habit of LLaVA). A turn's own `caption` repeats the row's, and is used
    where the row has none. A row with captions but no media (NExT-GPT's T-T+X and MosIT files, which rely
    on encodings made beforehand) is an error, as there is no target to decode.
    """
    check_keys(row, NEXTGPT_KEYS, where)
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: 'conversations' must be a list of at least one turn.")
    for i, turn in enumerate(turns):
        check_keys(turn, NEXTGPT_TURN_KEYS, f"{where}.conversations[{i}]")
        if turn.get("from") not in tuple(NEXTGPT_ROLES):
            raise InputError(
                f"{where}.conversations[{i}]: 'from' is {turn.get('from')!r}, and must be one of "
                f"{', '.join(NEXTGPT_ROLES)}."
            )
        checked_text(turn.get("value"), f"{where}.conversations[{i}]: 'value'")
    inputs = {kind: _nextgpt_inputs(row, turns, kind, where) for kind in MEDIA_TYPES}
    targets = {kind: _nextgpt_targets(row, turns, kind, where) for kind in MEDIA_TYPES}
    unmarked = [
        part
        for kind in MEDIA_TYPES
        if inputs[kind] and not _count_markers(turns, "human", kind)
        for part in inputs[kind]
    ]
    media = {"human": inputs, "gpt": targets}
    messages = []
    for turn in turns:
        content, position = [], 0
        if turn["from"] == "human":
            content, unmarked = unmarked, []
        for marker in MARKER.finditer(turn["value"]) if turn["from"] in media else ():
            content.append({"type": "text", "text": turn["value"][position : marker.start()]})
            content.append(media[turn["from"]][marker[1]].pop(0))
            position = marker.end()
        content.append({"type": "text", "text": turn["value"][position:]})
        content = [part for part in content if part["type"] != "text" or part["text"]]
        messages.append({"role": NEXTGPT_ROLES[turn["from"]], "content": content})
    return {"messages": messages} | ({"id": row["id"]} if "id" in row else {})


def _nextgpt_inputs(row: dict, turns: list[dict], kind: str, where: str) -> list[dict]:
    files = _listed(row, f"input_{kind}", where)
    markers = _count_markers(turns, "human", kind)
    if markers not in (len(files), 0) or (files and not any(turn["from"] == "human" for turn in turns)):
        raise _count_error(where, "human", kind, markers, f"'input_{kind}' names {len(files)} file(s)")
    return [{"type": kind, "path": file} for file in files]


def _nextgpt_targets(row: dict, turns: list[dict], kind: str, where: str) -> list[dict]:
    files, captions = _listed(row, f"output_{kind}", where), _listed(row, f"{kind}_captions", where)
    if captions and not files:
        raise InputError(
            f"{where} has '{kind}_captions' but no 'output_{kind}': a target is a {kind} file with its caption; "
            f"add the file names, or take the '<{kind}>' markers and captions out."
        )
    markers = _count_markers(turns, "gpt", kind)
    if markers != len(files):
        raise _count_error(where, "gpt", kind, markers, f"'output_{kind}' names {len(files)} file(s)")
    if not captions:
        captions = [
            t["caption"] for t in turns if t["from"] == "gpt" and t.get("output_modality") == kind and t.get("caption")
        ]
    if len(captions) != len(files):
        raise InputError(
            f"{where}: 'output_{kind}' names {len(files)} file(s) and '{kind}_captions' holds {len(captions)} "
            "caption(s): give one caption a file."
        )
    return [{"type": kind, "path": f, "caption": c} for f, c in zip(files, captions, strict=True)]


def _count_markers(turns: list[dict], speaker: str, kind: str) -> int:
    return sum(turn["value"].count(f"<{kind}>") for turn in turns if turn["from"] == speaker)


def _count_error(where: str, speaker: str, kind: str, markers: int, files: str) -> InputError:
    return InputError(
        f"{where}: its {speaker} turns hold {markers} '<{kind}>' marker(s), but {files}: give one marker a file."
    )


def _listed(row: dict, key: str, where: str) -> list[str]:
    """The strings under `key`, which may hold one, a list, or be absent."""
    value = row.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [checked_text(v, f"{where}: {key!r}") for v in values]


FORMATS: dict[str, Format] = {
    "jsonl": Format(_jsonl_rows, lambda value, where: value, suffix=".jsonl", media_by_type=False),
    "nextgpt": Format(_json_rows, _convert_nextgpt, suffix=".json", media_by_type=True),
}
