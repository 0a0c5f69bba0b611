"""Row-by-row validation of a data file, in constant memory apart from 16 bytes per row that detect repetitions."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from anygpt.data.collation import BAD, Collator
from anygpt.data.dataset import ConversationDataset
from anygpt.data.formats.base import DataSource
from anygpt.data.formats.reading import iterate_samples, missing_error
from anygpt.data.lengths import Lengths, refuse_reserved, usual_reserved_tokens
from anygpt.data.rows import DataError
from anygpt.data.schema import Sample
from anygpt.data.workers import end_with_parent
from anygpt.errors import InputError
from anygpt.media.files import DEFAULT_LIMITS, MediaLimits
from anygpt.media.types import read_media

MAX_WORKERS = 1024
AHEAD = 32  # rows that a worker checks before they are asked for


@dataclass
class Report:
    """Counts of a validation: `samples` are rows without a fault, `media` are `{"user image": count, …}`, `faults` are
    by kind; repeated conversations and ids do not count as faults."""

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
        deep: also decode every medium and reject reserved tokens in texts; with `lengths`, also collate each row with
            the processors of the parts, as training does.
        lengths: counts tokens, with placeholders and signal spans expanded; rows of more than `max_tokens` are faults.
        num_workers: worker processes, each of which reads the whole file and checks its share of the rows.
        on_fault: called with each fault; faults are not stored.
        progress: wraps the rows, as `tqdm` does.
    """
    if num_workers > MAX_WORKERS:
        raise InputError(f"num_workers is {num_workers:,}, and {MAX_WORKERS:,} is the most: give one for each core")
    next(iterate_samples(source), None)  # raises if nothing in the file can be read
    report = Report()
    ids, conversations = array("Q"), array("Q")
    rows = CheckedRows(source, deep, limits, lengths, max_tokens)
    for row in progress(_checked(rows, num_workers)):
        report.rows += 1
        report.samples += not row.faults
        report.tokens += row.tokens
        report.longest = max(report.longest, row.tokens)
        report.media.update(row.media)
        if row.hashes:
            ids.append(row.hashes[0])
            conversations.append(row.hashes[1])
        for fault in row.faults:
            report.faults[fault.kind if isinstance(fault, DataError) else "structure"] += 1
            on_fault(fault)
    report.repeated, report.repeated_ids = (
        len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))) for hashes in (conversations, ids)
    )
    return report


def _checked(rows: "CheckedRows", num_workers: int) -> Iterator["CheckedRow"]:
    done, ahead = 0, AHEAD if num_workers else None
    options: dict[str, Any] = {"num_workers": num_workers, "prefetch_factor": ahead, "worker_init_fn": end_with_parent}
    try:
        for row in DataLoader(rows, batch_size=None, **options):
            yield row
            done += 1
    except RuntimeError as error:
        if isinstance(error, InputError) or "DataLoader worker" not in str(error):
            raise
        row = next(islice(iterate_samples(rows.source), done, None))
        raise InputError(
            f"{row.name if isinstance(row, Sample) else row}, or one of the rows behind it, ended the process that "
            "decoded it (its decoder crashed, or memory was full): check the rows from there on with --num-workers 0"
        ) from error


@dataclass
class CheckedRow:
    """What `validate` counts of a row; `hashes` are those of its id and conversation (None if it is not a sample)."""

    faults: list[InputError]
    tokens: int = 0
    media: list[str] = field(default_factory=list)
    hashes: tuple[int, int] | None = None


@dataclass
class CheckedRows(IterableDataset):
    """A worker's share of a file's rows, each checked by itself; attributes as the arguments of `validate`."""

    source: DataSource
    deep: bool
    limits: MediaLimits
    lengths: Lengths | None
    max_tokens: int | None

    def __iter__(self) -> Iterator[CheckedRow]:
        worker = get_worker_info()
        share, shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for row in islice(_to_the_end(iterate_samples(self.source)), share, None, shares):
            yield CheckedRow([row]) if isinstance(row, InputError) else self.check(row)

    def check(self, sample: Sample) -> CheckedRow:
        missing, tokens = sample.missing_files(), 0
        faults: list[InputError] = [missing_error([(sample, file)]) for file in missing]
        for role, part in sample.media() if self.deep else ():
            if part.path not in missing:
                try:
                    read_media(part.type, part.path, num_frames=1, limits=self.limits, whole=True)
                except InputError as error:
                    faults.append(DataError(f"{sample.name}, {role} {part.type}: {error}", "not decodable"))
        if not faults:
            try:
                tokens = max(self.usable(sample.worded(number)) for number in range(sample.wordings))
            except InputError as error:
                faults.append(DataError(sample.naming(error), "not usable"))
            if self.max_tokens is not None and tokens > self.max_tokens:
                text = f"{tokens:,} tokens including its media's, more than the {self.max_tokens:,} that are allowed"
                faults.append(DataError(f"{sample.name} has {text}: shorten it", "too long"))
        id_hash, messages_hash = (xxhash.xxh3_64_intdigest(x.encode()) for x in (sample.id, repr(sample.messages)))
        media = [f"{role} {part.type}" for role, part in sample.media()]
        return CheckedRow(faults, tokens, media, (id_hash, messages_hash))

    def usable(self, sample: Sample) -> int:
        """Number of tokens of a sample, 0 if not counted; an `InputError` if training would reject it."""
        if self.lengths is not None and not self.deep:
            return self.lengths.of(sample)
        if self.lengths is not None:
            loaded = ConversationDataset([sample], self.lengths.num_frames, limits=self.limits)[0]
            batch = Collator(self.lengths.processor)([loaded])
            for bad in batch[BAD]:
                raise InputError(bad.reason)
            return int(batch["attention_mask"].sum())
        if self.deep:
            refuse_reserved(usual_reserved_tokens(), sample)
        return 0


def _to_the_end(rows: Iterator[Sample | InputError]) -> Iterator[Sample | InputError]:
    """The rows, and last the fault that keeps the rest of the file from being read, if there is one."""
    try:
        yield from rows
    except InputError as fault:
        yield fault
