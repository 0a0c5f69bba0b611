"""Conversations for a `MultimodalProcessor`: media parts become placeholders, signal spans and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from transformers import BatchFeature, PreTrainedTokenizerBase

from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.processing import chat_template as chat


class Processor(Protocol):
    """The members of `MultimodalProcessor` that are used here."""

    llm_tokenizer: PreTrainedTokenizerBase
    encoder_processors: dict[str, Any]
    modalities: dict[str, str]
    tokens: dict[str, str]
    signal_tokens: dict[str, list[str]]
    makes: dict[str, str]

    def media_argument(self, key: str) -> str: ...

    def __call__(self, encoder_inputs: Mapping[str, Any], llm_inputs: Mapping[str, Any]) -> BatchFeature: ...


def apply_chat_template(
    processor: Processor,
    conversation: Sequence[Any],
    **kwargs: Any,
) -> str | list[str] | BatchFeature:
    """Render one conversation or several, with media content parts, as text by the tokenizer's template.

    A user's or system's media part becomes its placeholder, an assistant's the signal span of its decoder. `kwargs` go
    to the template (`add_generation_prompt=True`).

    With `tokenize=True`, return a batch for the model instead. Users' media parts must then hold their medium under
    their type, `{"type": "image", "image": PIL.Image}`, a clip as uint8 `(F, H, W, 3)` or `data.Video`, a sound as
    `(waveform, sampling rate)` or `data.Audio`. Media in an assistant's parts are inputs of the user's next turn.
    """
    if kwargs.pop("tokenize", False):
        # passed by transformers' pipeline; nothing else is supported here
        for name in ("return_tensors", "return_dict", "processor_kwargs"):
            kwargs.pop(name, None)
        return _batch_of_conversations(processor, conversation, **kwargs)
    if conversation and not isinstance(conversation[0], Mapping):
        return [apply_chat_template(processor, one, **kwargs) for one in conversation]
    return chat.render(processor.llm_tokenizer, flatten_messages(processor, conversation), **kwargs)


def _batch_of_conversations(processor: Processor, conversation: Sequence[Any], **kwargs: Any) -> BatchFeature:
    conversations = [conversation] if isinstance(conversation[0], Mapping) else conversation
    reads = {*processor.modalities, *processor.modalities.values()}
    conversations = [chat.feed_back(messages, reads) for messages in conversations]
    media = []
    for message in (m for messages in conversations for m in messages if m["role"] != "assistant"):
        parts = [] if isinstance(message["content"], str) else message["content"]
        for part in (p for p in parts if p["type"] != "text"):
            if part["type"] not in part:
                raise InputError(
                    f"a media part has the keys {sorted(part)}; with tokenize=True it must hold its medium under "
                    f"{part['type']!r}"
                )
            media.append((part["type"], part[part["type"]]))
    texts = [chat.render(processor.llm_tokenizer, flatten_messages(processor, c), **kwargs) for c in conversations]
    return processor(arrange_media(processor, media), {"text": texts})


def inputs_by_modality(
    processor: Processor, text: Any, media: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert `text` and `{media type: one or a list}` to `encoder_inputs` and `llm_inputs`."""
    given = {name: value if isinstance(value, list) else [value] for name, value in media.items() if value is not None}
    pairs = [(name, value) for name, values in given.items() for value in values]
    return arrange_media(processor, pairs), {"text": text}


def arrange_media(processor: Processor, media: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Convert `(media type, medium)` pairs to `encoder_inputs`, in the form that each encoder's processor takes.

    Sounds are mixed to mono and resampled to the feature extractor's rate.
    """
    inputs: dict[str, dict[str, Any]] = {}
    for modality, medium in media:
        key = encoder_key(processor, modality)
        name = processor.media_argument(key)
        arguments = inputs.setdefault(key, {name: []})
        kind, own = MEDIA.get(processor.modalities[key]), processor.encoder_processors[key]
        if kind is not None and kind.heard:
            arguments["sampling_rate"] = own.sampling_rate
        arguments[name].append(medium if kind is None else kind.to_input(medium, own))
    return inputs


def flatten_messages(processor: Processor, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Convert contents to strings: media parts to placeholders and signal spans, texts with `chat.plain`."""
    special = [token.content for token in processor.llm_tokenizer.added_tokens_decoder.values() if token.special]
    return [
        {
            "role": message["role"],
            "content": "".join(
                _part_text(processor, message["role"], part, special) for part in chat.parts_of(message["content"])
            ),
        }
        for message in messages
    ]


def _part_text(processor: Processor, role: str, part: Mapping[str, Any], special: Iterable[str]) -> str:
    if part["type"] == "text":
        return chat.plain(part["text"], special)
    if role == "assistant":
        return "".join(processor.signal_tokens[decoder_key(processor, part["type"])])
    return processor.tokens[encoder_key(processor, part["type"])]


def encoder_key(processor: Processor, modality: str) -> str:
    return _key_of(modality, processor.modalities, "encoder reads")


def decoder_key(processor: Processor, modality: str) -> str:
    return _key_of(modality, processor.makes, "decoder makes")


def _key_of(modality: str, modalities: Mapping[str, str], what: str) -> str:
    for key, value in modalities.items():
        if modality in (key, value):
            return key
    raise InputError(f"no {what} {modality!r}; there are {sorted(set(modalities.values())) or 'none'}")
