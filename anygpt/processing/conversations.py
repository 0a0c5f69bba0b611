"""The half of `MultimodalProcessor` that is about conversations: media parts to placeholders, spans and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase

from anygpt.decoders.targets import TargetProcessor
from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.processing import chat_template as chat


class Conversations:
    """A mixin of that class alone."""

    # From the other half.
    llm_tokenizer: PreTrainedTokenizerBase
    encoder_processors: dict[str, Any]
    modalities: dict[str, str]
    tokens: dict[str, str]
    signal_tokens: dict[str, list[str]]
    targets: dict[str, TargetProcessor]

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]], **kwargs: Any
    ) -> str | list[str] | BatchFeature:
        """A conversation, or several, with media content parts as text, through the tokenizer's template.

        A user's or system's media part becomes its placeholder, an assistant's the signal span of its decoder.
        `kwargs` go to the template (`add_generation_prompt=True`).

        With `tokenize=True` the result is a batch for the model instead: users' media parts must then hold their
        medium under their type, `{"type": "image", "image": PIL.Image}`, a clip as uint8 `(F, H, W, 3)` or
        `data.Video`, a sound as `(waveform, sampling rate)` or `data.Audio`. An assistant's media parts that hold
        theirs are inputs of the user's next turn.
        """
        if kwargs.pop("tokenize", False):
            # transformers' pipeline names what is the only way here
            for name in ("return_tensors", "return_dict", "processor_kwargs"):
                kwargs.pop(name, None)
            return self._batch_of_conversations(conversation, **kwargs)
        if conversation and not isinstance(conversation[0], Mapping):
            return [self.apply_chat_template(one, **kwargs) for one in conversation]
        return chat.render(self.llm_tokenizer, self.flatten_messages(conversation), **kwargs)

    def _batch_of_conversations(self, conversation: Sequence[Any], **kwargs: Any) -> BatchFeature:
        conversations = [conversation] if isinstance(conversation[0], Mapping) else conversation
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
        texts = [chat.render(self.llm_tokenizer, self.flatten_messages(c), **kwargs) for c in conversations]
        return self(self.arrange_media(media), {"text": texts})

    def arrange_media(self, media: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
        """`(media type, medium)` pairs as `encoder_inputs`: sorted by encoder, in the form that its processor takes.

        Sounds are mixed to mono and resampled to what the encoder's feature extractor wants.
        """
        inputs: dict[str, dict[str, Any]] = {}
        for modality, medium in media:
            key = self.encoder_key(modality)
            name = self.media_argument(key)
            arguments = inputs.setdefault(key, {name: []})
            kind, processor = MEDIA.get(self.modalities[key]), self.encoder_processors[key]
            if kind is not None and kind.heard:
                arguments["sampling_rate"] = processor.sampling_rate
            arguments[name].append(medium if kind is None else kind.to_input(medium, processor))
        return inputs

    def flatten_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Messages whose content is one string, media parts written as placeholders and signal spans.

        Special tokens within texts are broken up (`chat.plain`).
        """
        special = [token.content for token in self.llm_tokenizer.added_tokens_decoder.values() if token.special]
        return [
            {
                "role": message["role"],
                "content": "".join(
                    self._part_text(message["role"], part, special) for part in chat.parts_of(message["content"])
                ),
            }
            for message in messages
        ]

    def _part_text(self, role: str, part: Mapping[str, Any], special: Iterable[str]) -> str:
        if part["type"] == "text":
            return chat.plain(part["text"], special)
        if role == "assistant":
            return "".join(self.signal_tokens[self.decoder_key(part["type"])])
        return self.tokens[self.encoder_key(part["type"])]

    def encoder_key(self, modality: str) -> str:
        """The encoder that reads a media type."""
        return self._key_of(modality, self.modalities, "encoder reads")

    def decoder_key(self, modality: str) -> str:
        """The decoder that makes a media type."""
        return self._key_of(modality, {k: t.modality for k, t in self.targets.items()}, "decoder makes")

    @staticmethod
    def _key_of(modality: str, modalities: Mapping[str, str], what: str) -> str:
        for key, value in modalities.items():
            if modality in (key, value):
                return key
        raise InputError(f"no {what} {modality!r}; there are {sorted(set(modalities.values())) or 'none'}")

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.llm_tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.llm_tokenizer.batch_decode(*args, **kwargs)
