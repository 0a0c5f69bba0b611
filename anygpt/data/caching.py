"""Writing the feature cache: each medium and caption of the datasets runs through the frozen parts once."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from anygpt.cache.reading import CAPTIONS, CODES, FEATURES, LATENTS, STATES, Entry, entries, fingerprint, store_key
from anygpt.cache.store import Store, StoreWriter, create_store
from anygpt.cache.text_states import read_text
from anygpt.data.collation import BAD, Collator, move
from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.data.workers import end_with_parent
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.losses.terms import is_read
from anygpt.media.types import media_type


@dataclass
class CacheWriter:
    """Creates or completes the stores that a training run on these datasets can use.

    Work is split by rank, and stored entries are not computed again, so that an interrupted run resumes. The
    model is on its device, in eval mode, with `requires_grad` set as in the run; datasets and `collator` are the run's.
    `progress` wraps `(batches, store name)`, as `tqdm` does, and `say` is called with each line of the report.
    """

    folder: str | Path
    model: Any
    processor: Any
    datasets: Sequence[ConversationDataset]
    accelerator: Accelerator
    precision: str = "no"
    batch_size: int = 8
    num_workers: int = 0
    on_bad_sample: str = "error"
    leave_out: Sequence[str] = ()
    collator: Collator | None = None
    progress: Callable[[Any, str], Iterable] = lambda batches, name: batches
    say: Callable[[str], None] = lambda line: None

    def write(self) -> Counter:
        """Write all stores; returns counts of "written", "known" and "unreadable" entries in this process's share."""
        counts: Counter = Counter()
        for entry in entries(self.model):
            contents = self.contents(entry)
            obstacle = entry.obstacle or self.no_use(entry) or (None if contents else "the data has nothing for it")
            if obstacle:
                self.say(f"{entry.name}: left out: {obstacle}")
                continue
            found = self.write_store(entry, contents)
            self.say(f"{entry.name}: " + ", ".join(f"{n:,} {what}" for what, n in found.items()))
            counts.update(found)
        return counts

    def no_use(self, entry: Entry) -> str | None:
        weights = self.model.loss_weights
        if entry.name in self.leave_out:
            return "as asked"
        if entry.kind == STATES:
            used = weights.wants_language_model
        else:
            part = "captions" if entry.kind == CAPTIONS else "media"
            used = entry.kind in (FEATURES, CODES) or is_read(part, weights, entry.part)
        return None if used else "no loss looks at it"

    def contents(self, entry: Entry) -> list:
        """What to store tensors for: captions, samples in each wording, or media as `(dataset, sample, role, part)`."""
        samples = [(data, sample) for data in self.datasets for sample in data.samples]
        if entry.kind == STATES:
            worded = (sample.worded(i) for _, sample in samples for i in range(sample.wordings))
            return [sample for sample in worded if not any(role == "user" for role, _ in sample.media())]
        uses = [
            (data, sample, role, part)
            for data, sample in samples
            for role, part in sample.media()
            if part.type == entry.modality
            and (entry.kind == CODES or (role == "assistant") == (entry.kind != FEATURES))
        ]
        if entry.kind == CAPTIONS:
            return list(dict.fromkeys(text for *_, part in uses for text in (part.caption, *part.others)))
        return list({use[3].path: use for use in uses}.values())

    def write_store(self, entry: Entry, contents: list) -> Counter:
        key = store_key(entry, self.model, self.processor, self.datasets[0].num_video_frames, self.precision)
        place = entry.place(Path(self.folder), key)
        if self.accelerator.is_main_process:
            create_store(place, key)
        self.accelerator.wait_for_everyone()
        store, writer = Store(place, key), StoreWriter(place)
        self.accelerator.wait_for_everyone()  # every process must list the same shards before any is added
        counts, done = Counter(written=0, known=0), set()
        batches = DataLoader(
            contents[self.accelerator.process_index :: self.accelerator.num_processes],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=end_with_parent,
            collate_fn=Preparation(entry, store, self.processor, self.collator or Collator(self.processor)),
        )
        try:
            with torch.no_grad(), self.accelerator.autocast():
                for batch in self.progress(batches, entry.name):
                    if batch.faults and entry.kind != STATES and self.on_bad_sample == "error":
                        raise InputError(batch.faults[0])
                    for fault in batch.faults:
                        self.say(f"left out: {fault}")
                    counts.update(known=batch.known, unreadable=len(batch.faults))
                    if batch.names and not done.issuperset(batch.names):
                        for name, tensors in zip(batch.names, self.outputs(entry, batch), strict=True):
                            if name not in done:  # the same content may occur in several batches
                                writer.add(name, tensors)
                                counts["written"] += 1
                            done.add(name)
        finally:
            writer.flush()
        return counts

    def outputs(self, entry: Entry, batch: "Prepared") -> Iterator[dict[str, Tensor]]:
        """Yield the tensors to store for each content of a batch; those of split media have a first axis for pieces."""
        data = move(batch.data, self.model.device)
        if entry.kind == STATES:
            yield from read_text(self.model, *data)
        elif entry.kind == FEATURES:
            found = iter(self.model.encoders[entry.part].encode(self.model.assign_inputs(data)[entry.part]))
            for count in batch.pieces:
                yield {FEATURES: _joined([next(found) for _ in range(count)])}
        elif entry.kind == CAPTIONS:
            encoding = vars(Condition.of(self.model.decoders[entry.part].module.encode_text(data)))
            for i in range(len(data)):
                yield {name: value[i] for name, value in encoding.items() if value is not None}
        elif entry.kind == CODES:
            yield from ({CODES: one} for one in self.model.tokenizers[entry.part].module.encode(data))
        else:
            decoder = self.model.decoders[entry.part].module
            posterior = torch.stack(decoder.posterior(data.to(decoder.device, decoder.vae.dtype)), dim=1)
            yield from ({LATENTS: one} for one in posterior)


@dataclass
class Prepared:
    """A batch prepared by a data worker: fingerprints of what to compute, the part's inputs, the number of pieces of
    each medium that can have several, the number of contents already stored, and messages about unreadable ones."""

    names: list[str]
    data: Any = None
    pieces: list[int] = field(default_factory=list)
    known: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Preparation:
    """Collate function that reads, decodes and preprocesses contents that the store does not have yet."""

    entry: Entry
    store: Store
    processor: Any
    collator: Collator

    def __call__(self, contents: Sequence[Any]) -> Prepared:
        fresh: dict[str, Any] = {}
        faults = []
        for content in contents:
            try:
                name, read = self.named(content)
                if name not in self.store and name not in fresh:
                    fresh[name] = read()
            except OSError as error:
                _, sample, _, part = content
                faults.append(f"{sample.name}: {part.path} cannot be read: {error.strerror or error}")
            except InputError as error:
                faults.append(str(error))
        data, pieces = self.inputs(list(fresh.values())) if fresh else (None, [])
        return Prepared(list(fresh), data, pieces, len(contents) - len(faults) - len(fresh), faults)

    def named(self, content: Any) -> tuple[str, Callable[[], Any]]:
        """Fingerprint of a content, and how to read it."""
        if self.entry.kind == CAPTIONS:
            return fingerprint(content), lambda: content
        if self.entry.kind == STATES:
            batch = self.collator([LoadedSample(content)])
            for fault in batch[BAD]:
                raise InputError(fault.reason)
            row = tuple(batch[name][0].tolist() for name in ("input_ids", "labels"))
            return fingerprint(row), lambda: row
        data, sample, role, part = content
        return fingerprint(part.path), lambda: data.decode(sample, role, part.type, part.path)

    def inputs(self, contents: list[Any]) -> tuple[Any, list[int]]:
        """Input of the part, and the number of pieces per medium."""
        kind, part = self.entry.modality, self.entry.part
        if self.entry.kind == CAPTIONS:
            return contents, []
        if self.entry.kind == STATES:
            return list(self.collator.texts(contents).values()), []
        if self.entry.kind in (LATENTS, CODES):
            targets = self.processor.coded if self.entry.kind == CODES else self.processor.targets
            return targets[part]([media_type(kind).to_target(medium) for medium in contents]), []
        arranged = self.processor.arrange_media((kind, medium) for medium in contents)
        pieces = self.processor.pieces(part, arranged[part]) or [[medium] for medium in contents]
        return self.processor.process_media(arranged)[0], [len(found) for found in pieces]


def _joined(pieces: list[Tensor]) -> Tensor:
    """Stack pieces of equal length, which may be projected separately; concatenate others."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.stack(pieces) if len({len(piece) for piece in pieces}) == 1 else torch.cat(pieces)
