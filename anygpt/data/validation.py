"""Row-by-row validation of a data file, used by `scripts/validate_data.py`.

Memory use is constant apart from 16 bytes per row, which detect repetitions.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from anygpt.data.collation import BAD, Collator
from anygpt.data.dataset import ConversationDataset
from anygpt.data.formats.base import DataSource
from anygpt.data.formats.reading import iterate_samples, missing_error
from anygpt.data.lengths import Lengths, refuse_reserved, usual_reserved_tokens
from anygpt.data.schema import DataError, Sample
from anygpt.errors import InputError
from anygpt.media.files import DEFAULT_LIMITS, MediaLimits
from anygpt.media.types import read_media

AHEAD = 32  # queued rows per worker
MAX_WORKERS = 1024


@dataclass
class Report:
    """Result of a validation.

    rows: all rows. samples: rows without a fault. media: `{"user image": count, …}` in well-formed rows. faults: counts
    by kind. repeated, repeated_ids: conversations and ids that had occurred before, which are not faults. tokens,
    longest: total and largest number of tokens.
    """

    rows: int = 0
    samples: int = 0
    media: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    repeated: int = 0
    repeated_ids: int = 0
    tokens: int = 0
    longest: int = 0


def validate(
    source: DataSource,
    *,
    deep: bool = False,
    limits: MediaLimits = DEFAULT_LIMITS,
    lengths: Lengths | None = None,
    max_tokens: int | None = None,
    num_workers: int = 0,
    on_fault: Callable[[InputError], None] = lambda fault: None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Report:
    """Validate a data file: structure, media files, captions, placeholders.

    Args:
        source: see `DataSource`.
        deep: also decode every medium and reject reserved tokens in texts; with `lengths`, also collate each row with
            the processors of the parts, as training does.
        limits: see `MediaLimits`.
        lengths: count tokens, with placeholders and signal spans expanded.
        max_tokens: rows with more tokens are faults.
        num_workers: worker processes; 0 works in this process.
        on_fault: called with each fault; faults are not stored.
        progress: wraps the rows, as `tqdm` does.

    Raises:
        InputError: the file cannot be read up to its first row.
    """
    report = Report()
    ids, conversations = array("Q"), array("Q")

    def count(fault: InputError) -> None:
        report.faults[fault.kind if isinstance(fault, DataError) else "structure"] += 1
        on_fault(fault)

    rows = _until_broken(iterate_samples(source))
    check = SampleCheck(deep, limits, lengths, max_tokens)
    for sample, (faults, tokens) in progress(_in_parallel(check, rows, num_workers)):
        report.rows += 1
        if isinstance(sample, InputError):
            count(sample)
            continue
        ids.append(_hash(sample.id))
        conversations.append(_hash(sample.messages))
        report.tokens += tokens
        report.longest = max(report.longest, tokens)
        report.media.update(f"{role} {part.type}" for role, part in sample.media())
        for fault in faults:
            count(fault)
        report.samples += not faults
    report.repeated, report.repeated_ids = (
        len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))) for hashes in (conversations, ids)
    )
    return report


def _until_broken(rows: Iterator[Sample | InputError]) -> Iterator[Sample | InputError]:
    """Yield the rows, then the fault, if any, that keeps the rest from being read."""
    started = False
    try:
        for row in rows:
            started = True
            yield row
    except InputError as fault:
        if not started:
            raise
        yield fault


@dataclass(frozen=True)
class SampleCheck:
    """Checks each sample by itself; arguments as in `validate`."""

    deep: bool
    limits: MediaLimits
    lengths: Lengths | None
    max_tokens: int | None

    def __call__(self, sample: Sample | InputError) -> tuple[list[InputError], int]:
        """Faults of a sample and its number of tokens (0 if not counted); nothing for a row that is itself a fault."""
        if isinstance(sample, InputError):
            return [], 0
        faults, tokens = list(self.media_faults(sample)), 0
        if faults:
            return faults, tokens
        try:
            tokens = max(self.usable(sample.worded(number)) for number in range(sample.wordings))
        except InputError as error:
            faults.append(DataError(str(error), "not usable"))
        if self.max_tokens is not None and tokens > self.max_tokens:
            text = f"{tokens:,} tokens with its media's, more than the {self.max_tokens:,} that are allowed"
            faults.append(DataError(f"{sample.name} has {text}: shorten it.", "too long"))
        return faults, tokens

    def usable(self, sample: Sample) -> int:
        """Number of tokens of a sample, 0 if not counted.

        Raises:
            InputError: training would reject the sample.
        """
        if self.lengths is not None and not self.deep:
            return self.lengths.of(sample)
        try:
            if self.lengths is None:
                refuse_reserved(usual_reserved_tokens() if self.deep else (), sample)
                return 0
        except InputError as error:
            raise InputError(f"{sample.name}: {error}") from error
        batch = Collator(self.lengths.processor)(
            [ConversationDataset([sample], self.lengths.num_frames, limits=self.limits)[0]]
        )
        for bad in batch[BAD]:
            raise InputError(bad.reason)
        return int(batch["attention_mask"].sum())

    def media_faults(self, sample: Sample) -> Iterator[InputError]:
        missing = sample.missing_files()
        for file in missing:
            yield missing_error([(sample, file)])
        for role, part in sample.media() if self.deep else ():
            if part.path in missing:
                continue
            try:
                read_media(part.type, part.path, num_frames=1, limits=self.limits, whole=True)
            except InputError as error:
                yield DataError(f"{sample.name}, {role} {part.type}: {error}", "not decodable")


Checked = tuple[Sample | InputError, tuple[list[InputError], int]]


def _in_parallel(check: SampleCheck, rows: Iterable[Sample | InputError], num_workers: int) -> Iterator[Checked]:
    """Yield each row with the result of the check, in order, reading at most `AHEAD` rows per worker ahead."""
    if not num_workers:
        yield from ((row, check(row)) for row in rows)
        return
    if num_workers > MAX_WORKERS:
        raise InputError(f"num_workers is {num_workers:,}, and {MAX_WORKERS:,} is the most: give one for each core.")
    waiting: deque = deque()
    with ProcessPoolExecutor(num_workers, initializer=_begin, initargs=(check, os.getpid())) as pool:
        for row in rows:
            waiting.append((row, pool.submit(_check_one, row)))
            if len(waiting) > AHEAD * num_workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(row: Sample | InputError, future: Future) -> Checked:
    try:
        return row, future.result()
    except BrokenProcessPool as error:
        place = row if isinstance(row, InputError) else f"{row.name}"
        raise InputError(
            f"{place}, or one of the rows behind it, ended the process that decoded it (its decoder crashed, or memory "
            "was full): check the rows from there on with --num-workers 0"
        ) from error


_CHECK: list[SampleCheck] = []  # set in each worker


def _begin(check: SampleCheck, parent: int) -> None:
    _CHECK[:] = [check]

    def end_with_the_parent() -> None:  # a killed parent cannot end its workers
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def _check_one(row: Sample | InputError) -> tuple[list[InputError], int]:
    return _CHECK[0](row)


def _hash(value: Hashable) -> int:
    return hash(value) % 2**64  # Python's hashes may be negative
