"""Length of conversations in tokens, with placeholders and signal spans expanded."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from anygpt.data.schema import Message, Sample
from anygpt.encoders.families import FAMILIES
from anygpt.encoders.fitting import varies
from anygpt.errors import InputError
from anygpt.media.files import DEFAULT_LIMITS, MediaLimits, Place
from anygpt.media.types import MEDIA, media_type, read_media
from anygpt.processing.chat_template import tokenize_with_labels
from anygpt.sequence.merging import IGNORE
from anygpt.sequence.signal_tokens import token_names

CHARACTERS_PER_TOKEN = 4


class Lengths:
    """Counts the tokens that the collator would produce for a sample.

    If an encoder returns the same number of features for every input, they are counted on a blank medium; otherwise the
    medium is decoded. The processor must know its model; `num_frames` and `limits` are those of `read_video`.
    """

    def __init__(self, processor: Any, num_frames: int | None = None, limits: MediaLimits = DEFAULT_LIMITS):
        self.processor = processor
        self.num_frames = num_frames
        self.limits = limits
        self._same: dict[str, int] = {}

    def of(self, sample: Sample) -> int:
        return self.with_labels(sample)[0]

    def with_labels(self, sample: Sample) -> tuple[int, int]:
        """Number of tokens of a conversation, chat template included, and how many of them carry a label. An
        `InputError` says why training would refuse it."""
        counts: dict[str, list[int]] = {}
        try:
            refuse_reserved(reserved_tokens(self.processor), sample)
            refuse_sources(self.processor, sample)
            for role, part in sample.media():
                key = self.processor.key_of(role, part.type)
                if key in self.processor.spans:
                    counts.setdefault(key, []).append(self.processor.spans[key])
                elif role != "assistant":
                    counts.setdefault(key, []).append(self.features(part.type, part.path))
            (messages,) = expanded(self.processor, [sample], counts)
            ids, labels = tokenize_with_labels(self.processor.llm_tokenizer, messages)
        except InputError as error:
            raise InputError(sample.naming(error)) from error
        return len(ids), sum(label != IGNORE for label in labels)

    def features(self, modality: str, place: Place | None = None) -> int:
        """Number of features of a medium; of a blank one if it is not given."""
        if place is None or self.is_fixed(self.processor.encoder_key(modality)):
            if modality not in self._same:
                self._same[modality] = self._count(modality, media_type(modality).blank(self.num_frames))
            return self._same[modality]
        return self._count(modality, read_media(modality, place, self.num_frames, self.limits))

    def is_fixed(self, key: str) -> bool:
        config = self.processor.encoder_configs.get(key)
        family = FAMILIES.get(config.model_type) if config is not None else None
        return (
            family is not None
            and family.layout == "fixed"
            and key not in self.processor.num_feature_funcs
            and not varies(self.processor.encoder_processors[key], self.processor.fit[key])
        )

    def _count(self, modality: str, medium: Any) -> int:
        _, counts, _ = self.processor.process_media(self.processor.arrange_media([(modality, medium)]))
        ((count,),) = counts.values()
        return count

    def estimate(self, samples: Sequence[Sample], measured: int = 256) -> np.ndarray:
        """Approximate token counts, `(samples,)` int64: of media as if blank, of texts by a least-squares fit of tokens
        per character and message to `measured` counted rows."""
        media, known = np.zeros(len(samples), np.int64), np.ones((len(samples), 3))
        for i, sample in enumerate(samples):
            known[i, 0] = sum(len(p.text or "") for m in sample.messages for p in m.content)
            known[i, 1] = len(sample.messages)
            for role, part in sample.media():
                key = self.processor.key_of(role, part.type)
                signal = len(self.processor.signal_tokens[key]) if role == "assistant" else None
                media[i] += self.processor.spans.get(key) or signal or self.features(part.type)
        counted = {}
        for i in np.random.default_rng(0).permutation(len(samples))[:measured]:
            with suppress(InputError):  # training handles such rows itself
                counted[i] = self.of(samples[i]) - media[i]
        rows = list(counted)
        tokens = known[:, 0] / CHARACTERS_PER_TOKEN
        if rows:
            tokens = known @ np.linalg.lstsq(known[rows], np.array(list(counted.values()), float), rcond=None)[0]
        return np.maximum(1, np.rint(media + tokens)).astype(np.int64)


def reserved_tokens(processor: Any) -> list[str]:
    return [*processor.tokens.values(), *(t for tokens in processor.signal_tokens.values() for t in tokens)]


def usual_reserved_tokens() -> list[str]:
    """Reserved tokens of a model whose parts are named after their media types."""
    signals = (name for kind in MEDIA.values() for name in token_names(kind.name, kind.signal_tokens))
    return [*(f"<{kind.name}>" for kind in MEDIA.values()), *signals]


def refuse_sources(processor: Any, sample: Sample) -> None:
    """Raise an `InputError` for a target that names a source which its decoder cannot use."""
    for _, part in sample.media():
        targets = None if part.source is None else processor.targets.get(processor.decoder_key(part.type))
        if part.source is not None and (targets is None or not targets.reference):
            raise InputError(
                f"{sample.name}: a target of type {part.type!r} names its source, but the decoder takes no "
                "reference: leave it out, or take a decoder that edits"
            )


def refuse_reserved(reserved: Collection[str], sample: Sample) -> None:
    """Raise `InputError`, without the sample's name, for a text that contains a placeholder or signal token."""
    parts = (part for message in sample.messages for part in message.content if part.text)
    for text in (text for part in parts for text in (part.text, *part.others)):
        if found := next((token for token in reserved if token in text), None):
            raise InputError(
                f"the text contains {found!r}, which is a reserved token; write media as content parts, and leave the "
                "token out of the text"
            )


def expanded(
    processor: Any, samples: Sequence[Sample], counts: Mapping[str, list[int] | None]
) -> list[list[dict[str, str]]]:
    """Messages of samples as text: input media become one placeholder per feature, targets become signal spans."""

    def message(given: Message) -> dict[str, Any]:
        return {"role": given.role, "content": [{"type": part.type, "text": part.text} for part in given.content]}

    conversations = [processor.flatten_messages(list(map(message, sample.messages))) for sample in samples]
    contents = iter(processor.expand([m["content"] for messages in conversations for m in messages], counts))
    return [[m | {"content": next(contents)} for m in messages] for messages in conversations]
