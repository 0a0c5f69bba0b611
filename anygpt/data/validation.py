"""A whole data file checked row by row; what is behind `scripts/validate_data.py`.

Memory stays the same however long the file is, but for 16 bytes a row, by which repetitions are found.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from anygpt.data.formats import iterate_samples, missing_error
from anygpt.data.media import DEFAULT_LIMITS, MediaLimits, read_media
from anygpt.data.schema import DataError, Sample
from anygpt.errors import InputError


@dataclass
class Report:
    """What was found.

    rows: all of them. samples: those without a fault. media: `{"user image": how many, …}`, of the samples whose rows
    are right. faults: by kind. repeated: conversations that had occurred before, word for word; not a fault.
    """

    rows: int = 0
    samples: int = 0
    media: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    repeated: int = 0


def validate(
    path: str | Path,
    format: str | None = None,
    media_root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    *,
    deep: bool = False,
    limits: MediaLimits = DEFAULT_LIMITS,
    on_fault: Callable[[InputError], None] = lambda fault: None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Report:
    """Checks a data file: form, media files, captions, placeholders, repeated ids.

    Args:
        path, format, media_root, columns, task: see `anygpt.data.formats.iterate_samples`.
        deep: also decode every medium.
        on_fault: called with each fault as it is found; none is kept.
        progress: wraps the rows, as `tqdm` does.

    Raises:
        InputError: what keeps the file from being read at all, before its first row.
    """
    report = Report()
    ids, conversations = array("Q"), array("Q")

    def count(fault: InputError) -> None:
        report.faults[fault.kind if isinstance(fault, DataError) else "structure"] += 1
        on_fault(fault)

    def rows() -> Iterator[Sample | InputError]:
        return iterate_samples(path, format, media_root, columns, task)

    for sample in progress(_until_broken(rows())):
        report.rows += 1
        if isinstance(sample, InputError):
            count(sample)
            continue
        ids.append(_hash(sample.id))
        conversations.append(_hash(sample.messages))
        faults = list(_media_faults(sample, deep, limits))
        report.media.update(f"{role} {part.type}" for role, part in sample.media())
        for fault in faults:
            count(fault)
        report.samples += not faults
    twice = _occur_twice(ids)
    if twice:
        for fault in _repeated_ids(_until_broken(rows()), twice):
            report.samples -= 1
            count(fault)
    report.repeated = len(conversations) - len(np.unique(np.frombuffer(conversations, np.uint64)))
    return report


def _until_broken(rows: Iterator[Sample | InputError]) -> Iterator[Sample | InputError]:
    """The rows, and in the end the fault that keeps the rest from being read."""
    started = False
    try:
        for row in rows:
            started = True
            yield row
    except InputError as fault:
        if not started:
            raise
        yield fault


def _media_faults(sample: Sample, deep: bool, limits: MediaLimits) -> Iterator[InputError]:
    missing = sample.missing_files()
    for file in missing:
        yield missing_error([(sample, file)])
    for role, part in sample.media() if deep else ():
        if part.path in missing:
            continue
        try:
            # One frame is kept; all are decoded to come to the end.
            read_media(part.type, part.path, num_frames=1, limits=limits)
        except InputError as error:
            yield DataError(f"{sample.source} (sample {sample.id!r}), {role} {part.type}: {error}", "not decodable")


def _hash(value: Hashable) -> int:
    return hash(value) % 2**64  # Python's own may be negative


def _occur_twice(hashes: array) -> set[int]:
    values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    return set(values[counts > 1].tolist())


def _repeated_ids(rows: Iterator[Sample | InputError], twice: set[int]) -> Iterator[DataError]:
    """Goes over the rows again, now that it is known which ids to look out for."""
    first: dict[str, str] = {}
    for sample in rows:
        if isinstance(sample, Sample) and _hash(sample.id) in twice:
            if sample.id in first:
                yield DataError(
                    f"{sample.source} (sample {sample.id!r}): the id was already used at {first[sample.id]}: "
                    "give every sample its own id, or none.",
                    "duplicates",
                )
            else:
                first[sample.id] = sample.source
