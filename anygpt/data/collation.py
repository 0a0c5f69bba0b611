"""Collation of loaded samples into a batch for `MultimodalModel.forward`, with labels on the assistant's turns."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from anygpt.cache.reading import STATES, Cached, FeatureCache, StaleCache
from anygpt.cache.text_states import TextStates
from anygpt.data.dataset import BadSample, LoadedSample
from anygpt.data.lengths import expanded, refuse_reserved, refuse_sources, reserved_tokens
from anygpt.decoders.conditions import Condition
from anygpt.encoders.module import FEATURES
from anygpt.errors import InputError
from anygpt.media.types import media_type
from anygpt.processing.chat_template import tokenize_with_labels
from anygpt.processing.processor import MultimodalProcessor, stack_rows
from anygpt.sequence.merging import IGNORE
from anygpt.tokenizers.module import CODES

# Keys for the training loop; everything else in a batch is passed to the model.
SAMPLE_IDS, TARGET_IDS, BAD, CUT = "sample_ids", "target_ids", "bad_samples", "cut_samples"
NOT_FOR_MODEL = (SAMPLE_IDS, TARGET_IDS, BAD, CUT)


class Collator:
    """Builds batches in the data workers: encoder processors, target transforms and the tokenizer run here.

    A batch holds the arguments of `MultimodalModel.forward` and `sample_ids` (one per row), `target_ids` (`{decoder
    key: one id per target}`, which seed the noise), `bad_samples` and `cut_samples` (ids).

    Rows have at most `max_length` tokens, with placeholders and signal spans expanded. With `cut`, the last turns of a
    longer one are dropped, otherwise (or if its first turns do not fit) the row. The processor must know its model.
    """

    def __init__(self, processor: MultimodalProcessor, max_length: int | None = None, cut: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.cut = cut
        self.cache: FeatureCache | None = None
        tokenizer = processor.llm_tokenizer
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def __call__(self, items: Sequence[LoadedSample | BadSample]) -> dict[str, Any]:
        """Batch with `(B, S)` ids, mask and labels, padded on the right; encoder inputs and targets in row order."""
        bad = [item for item in items if isinstance(item, BadSample)]
        good = [item for item in items if isinstance(item, LoadedSample)]
        found = self.arguments(good) if good else self.nothing()
        if isinstance(found, list):
            return self([*bad, *found])
        ids = {SAMPLE_IDS: [item.sample.id for item in good], CUT: [item.sample.id for item in good if item.cut]}
        return ids | {BAD: bad} | found

    def arguments(self, items: Sequence[LoadedSample]) -> dict[str, Any] | list[LoadedSample | BadSample]:
        """Arguments of the model, and target ids; or new samples if some have to be cut or left out."""
        try:
            for item in items:
                refuse_reserved(reserved_tokens(self.processor), item.sample)
                refuse_sources(self.processor, item.sample)
            data, counts = self.encoder_inputs(items)
            targets, target_ids = self.decoder_targets(items)
        except InputError as error:
            if len(items) == 1:
                return [BadSample.of(items[0].sample, error)]
            alone = [self.arguments([item]) for item in items]
            if all(isinstance(found, dict) for found in alone):
                raise
            return [item if isinstance(found, dict) else found[0] for item, found in zip(items, alone, strict=True)]
        conversations = expanded(self.processor, [item.sample for item in items], counts)
        rows = [self.fit(*row) for row in zip(items, conversations, strict=True)]
        if not all(isinstance(row, tuple) for row in rows):
            return [item if isinstance(row, tuple) else row for item, row in zip(items, rows, strict=True)]
        states = [state for *_, state in rows]
        return (
            ({} if None in states else {"text_states": TextStates.join(states)})
            | data
            | self.texts([(ids, labels) for ids, labels, _ in rows])
            | {"decoder_targets": targets, TARGET_IDS: target_ids}
        )

    def texts(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """`(B, S)` ids, mask and labels of rows of ids and labels, padded on the right."""
        ids, labels = zip(*rows, strict=True)
        mask = stack_rows([[1] * len(row) for row in ids], 0)
        return {"input_ids": stack_rows(ids, self.pad_id), "attention_mask": mask, "labels": stack_rows(labels, IGNORE)}

    def nothing(self) -> dict[str, Any]:
        """A row without loss for an empty batch: every process must take part in each step."""
        return {TARGET_IDS: {}, "decoder_targets": {}} | self.texts([([self.pad_id], [IGNORE])])

    def fit(
        self, item: LoadedSample, messages: list[dict[str, str]]
    ) -> tuple[list[int], list[int], dict[str, Tensor] | None] | LoadedSample | BadSample:
        """Ids, labels and cached language model states of a row (None if the model must run); if it is too long, the
        sample without its last turns, or a bad sample.

        `messages` have their placeholders expanded. Rows are cut after an assistant turn only, never within a signal
        span or a run of placeholders.
        """
        try:
            ids, labels = tokenize_with_labels(self.processor.llm_tokenizer, messages)
        except InputError as error:
            return BadSample.of(item.sample, error)
        if self.max_length is None or len(ids) <= self.max_length:
            states = None
            try:
                if self.cache is not None and not item.inputs:
                    states = self.cache.get(STATES, "text", (ids, labels))
            except StaleCache as error:
                if not item.cut:  # the cache holds whole rows, and a cut row may have lost its input media
                    return BadSample.of(item.sample, error, "stale")
            return ids, labels, states
        ends = [i + 1 for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"] if self.cut else []
        for end in reversed(ends):
            if len(tokenize_with_labels(self.processor.llm_tokenizer, messages[:end])[0]) <= self.max_length:
                return item.first_messages(end)
        but = " and its first turn does not fit either" if self.cut else ""
        reason = (
            f"{item.sample.name} has {len(ids):,} tokens including its media's, more than "
            f"data.max_length = {self.max_length:,}{but}: shorten it, raise the limit, or set data.on_long_sample"
        )
        return BadSample(item.sample.id, reason, "long")

    def encoder_inputs(self, items: Sequence[LoadedSample]) -> tuple[dict[str, Any], dict[str, list[int] | None]]:
        """Arguments of encoders and tokenizers (features and codes where cached), and the tokens of each input."""
        spans, media = self.processor.spans, []
        for role, kind, medium in (one for item in items for one in item.in_order()):
            key = self.processor.key_of(role, kind)
            if role != "assistant" or key in spans:
                media.append((key, medium))
        fresh = (pair for pair in media if not isinstance(pair[1], Cached))
        data, counts, _ = self.processor.process_media(self.processor.arrange_media(fresh))
        cached: dict[str, list[list[Tensor]]] = {}
        for key, medium in media:
            if isinstance(medium, Cached):
                pieces = list(medium.values) if medium.values.ndim == 3 else [medium.values]
                cached.setdefault(key, []).append(pieces)
        for key, pieces in cached.items():
            assert key not in counts, f"only some of the {key} inputs come from the cache"
            if key in spans:
                data[f"{key}.{CODES}"] = torch.cat([torch.stack(item) for item in pieces])
                counts[key] = [spans[key]] * len(pieces)
                continue
            features = [piece for item in pieces for piece in item]
            same = len({len(piece) for piece in features}) == 1
            data[f"{key}.{FEATURES}"] = torch.stack(features) if same else features
            after = self.processor.projector_configs[key].features_after
            counts[key] = [sum(after(len(piece)) for piece in item) for item in pieces]
        return data, counts

    def decoder_targets(self, items: Sequence[LoadedSample]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
        """Captions and targets of each decoder in span order, and target ids; cached `conditions` and `posterior`."""
        raw: dict[str, dict[str, list[Any]]] = {}
        cached: dict[str, dict[str, list[Any]]] = {}
        ids: dict[str, list[str]] = {}
        for item in items:
            for modality, captions in item.captions.items():
                key, kind = self.processor.decoder_key(modality), media_type(modality)
                ids.setdefault(key, []).extend(f"{item.sample.id}/{modality}/{i}" for i in range(len(captions)))
                if key not in self.processor.targets:
                    continue
                target, stored = raw.setdefault(key, {"captions": []}), cached.setdefault(key, {})
                target["captions"] += captions
                for one in item.references.get(modality, ()):  # one for each target, or none
                    target.setdefault("references", []).append(None if one is None else kind.to_target(one))
                for medium in item.targets.get(modality, ()):  # none if the dataset does not decode targets
                    if isinstance(medium, Cached):
                        stored.setdefault("posterior", []).append(medium.values)
                    else:
                        target.setdefault(kind.plural, []).append(kind.to_target(medium))
                if modality in item.conditions:
                    stored.setdefault("conditions", []).extend(item.conditions[modality])
        targets = self.processor.process_targets(raw)
        for key, found in cached.items():
            targets[key] |= {name: _stack(values) for name, values in found.items()}
        return targets, ids


def _stack(values: list[Tensor] | list[Condition]) -> Tensor | Condition:
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    parts = zip(*((value.embeds, value.pooled, value.mask) for value in values), strict=True)
    return Condition(*(None if part[0] is None else torch.stack(part) for part in parts))


def move(batch: Any, device: Any) -> Any:
    """Move the tensors of a nested batch to a device; other values stay as they are."""
    return send_to_device(batch, device, non_blocking=True)
