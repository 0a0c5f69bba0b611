"""Writing the feature cache: runs each medium and caption of the datasets through the frozen parts once.

Existing entries are not recomputed, so an interrupted run resumes. Work is split by rank; data workers read and decode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anygpt.cache.keys import CAPTIONS, FEATURES, LATENTS, STATES, Entry, entries, store_key
from anygpt.cache.reading import fingerprint_caption, fingerprint_medium, fingerprint_row
from anygpt.cache.store import Store, StoreWriter, create_store
from anygpt.cache.text_states import read_text
from anygpt.data.collation import BAD, SAMPLE_IDS, Collator, move
from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.data.schema import Sample
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.media.types import media_type


@dataclass
class CacheWriter:
    """Creates or completes the stores that a training run on these datasets can use.

    Attributes:
        folder: `data.cache_dir`.
        model: on its device, in eval mode, with `requires_grad` set as in the run.
        processor: the model's.
        datasets: with the run's number of video frames.
        accelerator: provides the processes and the precision.
        precision: `train.mixed_precision`.
        batch_size: media or captions per batch.
        num_workers: decoding workers per process.
        on_bad_sample: "error" raises on unreadable media, "skip" counts them.
        leave_out: names of stores not to write.
        collator: the run's, for text rows; the default one drops no row.
        progress: `(batches, store name) -> batches`, a wrapper such as `tqdm`.
        say: called with each line of the progress report.
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
        """Write all stores.

        Returns:
            Counts of "written", "known" and "unreadable" entries in this process's share.

        Raises:
            InputError: a stale store, unreadable media (unless skipped), or an unknown name in `leave_out`.
        """
        wanted = entries(self.model)
        if unknown := sorted(set(self.leave_out) - {entry.name for entry in wanted}):
            names = ", ".join(entry.name for entry in wanted)
            raise InputError(f"there is no store {unknown[0]!r} to leave out; this model has {names}")
        counts: Counter = Counter()
        for entry in wanted:
            obstacle = entry.obstacle or self.no_use(entry)
            if obstacle:
                self.say(f"{entry.name}: left out: {obstacle}")
                continue
            found = self.write_store(entry)
            self.say(f"{entry.name}: " + ", ".join(f"{n:,} {what}" for what, n in found.items()))
            counts.update(found)
        return counts

    def no_use(self, entry: Entry) -> str | None:
        """The reason not to write a store that could be written, or None."""
        weights = self.model.loss_weights
        sub = "alignment" if entry.kind == CAPTIONS else "denoising"
        if entry.name in self.leave_out:
            return "as asked"
        if entry.kind == STATES:
            if not weights.wants_language_model:
                return "no loss looks at it"
            return None if self.text_rows() else "the data has nothing for it"
        if not (entry.kind == FEATURES or weights.wants(sub, entry.part) or weights.decoder):
            return "no loss looks at it"
        answered = entry.kind != FEATURES
        there = any((role == "assistant") == answered for _, _, role, _ in self.uses(entry.modality))
        return None if there else "the data has nothing for it"

    def write_store(self, entry: Entry) -> Counter:
        """Add this process's share of the missing entries to one store."""
        key = store_key(entry, self.model, self.processor, self.datasets[0].num_video_frames, self.precision)
        place = entry.place(Path(self.folder), key)
        if self.accelerator.is_main_process:
            create_store(place, key)
        self.accelerator.wait_for_everyone()
        store, writer = Store(place, key), StoreWriter(place)
        self.accelerator.wait_for_everyone()  # every process must list the same shards before any is added
        try:
            with torch.no_grad(), self.accelerator.autocast():
                writers = {CAPTIONS: self.write_captions, STATES: self.write_states}
                return writers.get(entry.kind, self.write_media)(entry, store, writer)
        finally:
            writer.flush()

    def write_captions(self, entry: Entry, store: Store, writer: StoreWriter) -> Counter:
        targets = (part for _, _, role, part in self.uses(entry.modality) if role == "assistant")
        captions = dict.fromkeys(caption for part in targets for caption in (part.caption, *part.others))
        mine = self.share(list(captions))
        lacking = [caption for caption in mine if fingerprint_caption(caption) not in store]
        batches = [lacking[i : i + self.batch_size] for i in range(0, len(lacking), self.batch_size)]
        for batch in self.progress(batches, entry.name):
            encoding = Condition.of(self.model.decoders[entry.part].module.encode_text(batch))
            parts = {name: value for name, value in vars(encoding).items() if value is not None}
            for i, caption in enumerate(batch):
                writer.add(fingerprint_caption(caption), {name: value[i] for name, value in parts.items()})
        return Counter(written=len(lacking), known=len(mine) - len(lacking))

    def write_states(self, entry: Entry, store: Store, writer: StoreWriter) -> Counter:
        loader = DataLoader(
            [LoadedSample(sample) for sample in self.share(self.text_rows())],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collator or Collator(self.processor),
        )
        counts: Counter = Counter(written=0, known=0)
        done: set[str] = set()
        for batch in self.progress(loader, entry.name):
            for fault in batch[BAD]:
                self.say(f"left out: {fault.reason}")
            if not batch[SAMPLE_IDS]:
                continue
            rows = [batch[name] for name in ("input_ids", "attention_mask", "labels")]
            ids, labels = ([x[held].tolist() for x, held in zip(y, rows[1].bool(), strict=True)] for y in rows[::2])
            by_name = {fingerprint_row(*row): i for i, row in enumerate(zip(ids, labels, strict=True))}
            fresh = {name: i for name, i in by_name.items() if name not in store and name not in done}
            counts.update(written=len(fresh), known=len(ids) - len(fresh), unreadable=len(batch[BAD]))
            if fresh:
                states = read_text(self.model, *(move(x[list(fresh.values())], self.model.device) for x in rows))
                for name, tensors in zip(fresh, states, strict=True):
                    writer.add(name, tensors)
            done.update(fresh)
        return counts

    def write_media(self, entry: Entry, store: Store, writer: StoreWriter) -> Counter:
        by_place: dict[Any, tuple] = {}
        for use in self.uses(entry.modality):
            if (use[2] == "assistant") == (entry.kind == LATENTS):
                by_place.setdefault(use[3].path, use)
        loader = DataLoader(
            MediaOf(self.share(list(by_place.values())), store),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=Preparation(entry, self.processor),
        )
        counts: Counter = Counter(written=0, known=0)
        done: set[str] = set()
        for batch in self.progress(loader, entry.name):
            if batch.faults and self.on_bad_sample == "error":
                raise InputError(batch.faults[0])
            for fault in batch.faults:
                self.say(f"left out: {fault}")
            counts.update(known=batch.known, unreadable=len(batch.faults))
            outputs = self.outputs(entry, batch) if batch.fingerprints else ()
            for fingerprint, output in zip(batch.fingerprints, outputs, strict=True):
                if fingerprint not in done:  # the same bytes under two names
                    writer.add(fingerprint, {entry.kind: output})
                    counts["written"] += 1
                done.add(fingerprint)
        return counts

    def outputs(self, entry: Entry, batch: Prepared) -> Iterable[Tensor]:
        """Features or latents, one tensor per medium; `(pieces, n, features)` if it has several pieces."""
        data = move(batch.data, self.model.device)
        if entry.kind == FEATURES:
            found = iter(self.model.encoders[entry.part].encode(self.model.assign_inputs(data)[entry.part]))
            grouped = ([next(found) for _ in range(count)] for count in batch.pieces)
            return [_joined(pieces) for pieces in grouped]
        decoder = self.model.decoders[entry.part].module
        return torch.stack(decoder.posterior(data.to(decoder.device, decoder.vae.dtype)), dim=1)

    def uses(self, modality: str) -> Iterator[tuple]:
        """Yield (dataset, sample, role, part) for every medium of a type."""
        for data in self.datasets:
            for sample in data.samples:
                yield from ((data, sample, role, part) for role, part in sample.media() if part.type == modality)

    def text_rows(self) -> list[Sample]:
        """Samples without input media, one per wording."""
        samples = (s.worded(i) for data in self.datasets for s in data.samples for i in range(s.wordings))
        return [sample for sample in samples if not any(role == "user" for role, _ in sample.media())]

    def share(self, items: list) -> list:
        return items[self.accelerator.process_index :: self.accelerator.num_processes]


@dataclass(frozen=True)
class Prepared:
    """A batch of media prepared by a data worker.

    fingerprints: of the media to compute. data: their part's input. pieces: pieces per medium. known: media already in
    the store. faults: messages about unreadable media.
    """

    fingerprints: list[str]
    data: Any
    pieces: list[int]
    known: int
    faults: list[str]


class MediaOf(Dataset):
    """Decodes media (see `CacheWriter.uses`) that the store does not have yet."""

    def __init__(self, uses: Sequence[tuple], store: Store):
        self.uses = uses
        self.store = store

    def __len__(self) -> int:
        return len(self.uses)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        """Fingerprint and medium; the medium is None if already stored, an `InputError` if unreadable."""
        data, sample, role, part = self.uses[index]
        try:
            fingerprint = fingerprint_medium(part.path)
            return fingerprint, None if fingerprint in self.store else data.decode(sample, role, part.type, part.path)
        except OSError as error:
            reason = f"{part.path} cannot be read: {error.strerror or error}"
            return "", InputError(f"{sample.source} (sample {sample.id!r}): {reason}")
        except InputError as error:
            return "", error


class Preparation:
    """Collate function that preprocesses media in the workers."""

    def __init__(self, entry: Entry, processor: Any):
        self.entry = entry
        self.processor = processor

    def __call__(self, items: Sequence[tuple[str, Any]]) -> Prepared:
        faults = [str(medium) for _, medium in items if isinstance(medium, InputError)]
        known = sum(medium is None for _, medium in items)
        fresh = {name: medium for name, medium in items if medium is not None and not isinstance(medium, InputError)}
        if not fresh:
            return Prepared([], None, [], known, faults)
        data, pieces = self.prepare(list(fresh.values()))
        return Prepared(list(fresh), data, pieces, known, faults)

    def prepare(self, media: list[Any]) -> tuple[Any, list[int]]:
        """Input of the part, and the number of pieces per medium."""
        kind, part = media_type(self.entry.modality), self.entry.part
        if self.entry.kind == LATENTS:
            return self.processor.targets[part]([kind.to_target(medium) for medium in media]), [1] * len(media)
        arranged = self.processor.arrange_media((kind.name, medium) for medium in media)
        pieces = self.processor.pieces(part, arranged[part]) or [[medium] for medium in media]
        return self.processor.process_media(arranged)[0], [len(found) for found in pieces]


def _joined(pieces: list[Tensor]) -> Tensor:
    """Stack pieces of equal length, which may be projected separately; concatenate others."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.stack(pieces) if len({len(piece) for piece in pieces}) == 1 else torch.cat(pieces)
