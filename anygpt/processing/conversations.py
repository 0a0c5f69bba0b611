"""Conversations: media parts become placeholders, signal spans and inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from anygpt.composition import Composition
from anygpt.decoders.targets import TargetProcessor
from anygpt.encoders.callbacks import EncoderCallbacks
from anygpt.encoders.projector import MultimodalProjectorConfig
from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.processing import chat_template as chat

FeatureCounter = Callable[[dict, dict], "int | list[int] | list[list[int]]"]


class ConversationProcessor(ProcessorMixin):
    """What a `MultimodalProcessor` knows of each encoder and decoder, and how it reads conversations."""

    llm_tokenizer: PreTrainedTokenizerBase
    injects: bool  # whether features replace placeholders, rather than precede the text
    # by encoder key
    encoder_processors: dict[str, Any]
    num_feature_funcs: dict[str, FeatureCounter]
    tokens: dict[str, str]  # the placeholders
    fit: dict[str, str | None]
    modalities: dict[str, str]
    # by encoder key, empty without a model
    encoder_configs: dict[str, PreTrainedConfig]
    encoder_callbacks: dict[str, EncoderCallbacks | None]
    projector_configs: dict[str, MultimodalProjectorConfig]
    # by decoder key: the tokens of a span, the media type, and the target format
    signal_tokens: dict[str, list[str]]
    makes: dict[str, str]
    targets: dict[str, TargetProcessor]

    @property
    def token_ids(self) -> dict[str, int]:
        """`{encoder key: id of its placeholder}`."""
        return {key: self.llm_tokenizer.convert_tokens_to_ids(token) for key, token in self.tokens.items()}

    @property
    def signal_token_ids(self) -> dict[str, list[int]]:
        """`{decoder key: ids of its signal tokens}`."""
        return {key: self.llm_tokenizer.convert_tokens_to_ids(names) for key, names in self.signal_tokens.items()}

    def register(self, model: Composition) -> None:
        """Set the token ids and tokenizer of a model, which then injects features."""
        model.set_token_ids(self.token_ids)
        model.signal_tokens.set_ids(self.signal_token_ids)
        model.tokenizer = self.llm_tokenizer

    def encoder_key(self, modality: str) -> str:
        """The encoder that reads a media type; raises `InputError` if there is none."""
        return _key_of(modality, self.modalities, "encoder reads")

    def decoder_key(self, modality: str) -> str:
        """The decoder that makes a media type; raises `InputError` if there is none."""
        return _key_of(modality, self.makes, "decoder makes")

    def media_argument(self, key: str) -> str:
        """The name of the media argument of an encoder's processor (`images`, `raw_speech`, …)."""
        return next(iter(inspect.signature(self.encoder_processors[key].__call__).parameters))

    def apply_chat_template(self, conversation: Sequence[Any], **kwargs: Any) -> str | list[str] | BatchFeature:
        """Render one conversation or several, with media content parts, as text by the tokenizer's template.

        A user's or system's media part becomes its placeholder, an assistant's the signal span of its decoder. `kwargs`
        go to the template (`add_generation_prompt=True`).

        With `tokenize=True`, return a batch for the model instead. Users' media parts must then hold their medium under
        their type, `{"type": "image", "image": PIL.Image}`, a clip as uint8 `(F, H, W, 3)` or `data.Video`, a sound as
        `(waveform, sampling rate)` or `data.Audio`. Media in an assistant's parts are inputs of the user's next turn.
        """
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = conversation if several else [conversation]
        if not kwargs.pop("tokenize", False):
            texts = [chat.render(self.llm_tokenizer, self.flatten_messages(one), **kwargs) for one in conversations]
            return texts if several else texts[0]
        # passed by transformers' pipeline; nothing else is supported here
        for name in ("return_tensors", "return_dict", "processor_kwargs"):
            kwargs.pop(name, None)
        reads = {*self.modalities, *self.modalities.values()}
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
        texts = [chat.render(self.llm_tokenizer, self.flatten_messages(one), **kwargs) for one in conversations]
        return self(self.arrange_media(media), {"text": texts})

    def arrange_media(self, media: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
        """Convert `(media type, medium)` pairs to `encoder_inputs`, in the form that each encoder's processor takes.

        Sounds are mixed to mono and resampled to the feature extractor's rate.
        """
        inputs: dict[str, dict[str, Any]] = {}
        for modality, medium in media:
            key = self.encoder_key(modality)
            name = self.media_argument(key)
            arguments = inputs.setdefault(key, {name: []})
            kind, own = MEDIA.get(self.modalities[key]), self.encoder_processors[key]
            if kind is not None and kind.heard:
                arguments["sampling_rate"] = own.sampling_rate
            arguments[name].append(medium if kind is None else kind.to_input(medium, own))
        return inputs

    def flatten_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Convert contents to strings: media parts to placeholders and signal spans, texts with `chat.plain`."""
        special = [token.content for token in self.llm_tokenizer.added_tokens_decoder.values() if token.special]

        def text_of(role: str, part: Mapping[str, Any]) -> str:
            if part["type"] == "text":
                return chat.plain(part["text"], special)
            if role == "assistant":
                return "".join(self.signal_tokens[self.decoder_key(part["type"])])
            return self.tokens[self.encoder_key(part["type"])]

        turns = ((message["role"], chat.parts_of(message["content"])) for message in messages)
        return [{"role": role, "content": "".join(text_of(role, part) for part in parts)} for role, parts in turns]


def _key_of(modality: str, modalities: Mapping[str, str], what: str) -> str:
    for key, value in modalities.items():
        if modality in (key, value):
            return key
    raise InputError(f"no {what} {modality!r}; there are {sorted(set(modalities.values())) or 'none'}")
