"""Conversations: media parts become placeholders, signal spans and inputs."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from anygpt.composition import Composition
from anygpt.decoders.targets import TargetProcessor
from anygpt.encoders.callbacks import EncoderCallbacks
from anygpt.encoders.projector import MultimodalProjectorConfig
from anygpt.errors import InputError
from anygpt.media.types import MEDIA, media_type
from anygpt.processing import chat_template as chat

FeatureCounter = Callable[[dict, dict], "int | list[int] | list[list[int]]"]


class ConversationProcessor(ProcessorMixin):
    """What a `MultimodalProcessor` knows of each encoder and decoder, and how it reads conversations."""

    llm_tokenizer: PreTrainedTokenizerBase
    injects: bool  # whether features replace placeholders, rather than precede the text
    # by encoder key; placeholders and modalities also by tokenizer key
    encoder_processors: dict[str, Any]
    num_feature_funcs: dict[str, FeatureCounter]
    tokens: dict[str, str]  # the placeholders
    fit: dict[str, str | None]
    modalities: dict[str, str]
    # by encoder key, empty without a model
    encoder_configs: dict[str, PreTrainedConfig]
    encoder_callbacks: dict[str, EncoderCallbacks | None]
    projector_configs: dict[str, MultimodalProjectorConfig]
    # by decoder and tokenizer key: the named tokens of a span, and the media type that it makes
    signal_tokens: dict[str, list[str]]
    makes: dict[str, str]
    targets: dict[str, TargetProcessor]  # by decoder key
    # by tokenizer key: the tokens of a medium, which its placeholder stands for, and the format that it encodes
    spans: dict[str, int]
    coded: dict[str, TargetProcessor]

    @property
    def token_ids(self) -> dict[str, int]:
        """`{encoder key: id of its placeholder}`."""
        tokens = {key: token for key, token in self.tokens.items() if key not in self.spans}
        return {key: self.llm_tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()}

    @property
    def signal_token_ids(self) -> dict[str, list[int]]:
        """`{decoder or tokenizer key: ids of its signal tokens}`, without codes."""
        return {key: self.llm_tokenizer.convert_tokens_to_ids(names) for key, names in self.signal_tokens.items()}

    def register(self, model: Composition) -> None:
        """Set the token ids and tokenizer of a model, which then injects features.

        Codes get the ids after those of tokenizer and model. Nothing that is saved depends on these ids.
        """
        model.set_token_ids(self.token_ids)
        ids, first = self.signal_token_ids, max(self.llm_tokenizer.get_vocab().values()) + 1
        first = max(first, model.get_input_embeddings().weight.shape[0])
        starts: dict[str, int] = {}
        for key, grid in model.signal_tokens.grids.items():
            start = starts.setdefault(model.signal_tokens.owners[key], first)
            ids[key].append(start)
            first = max(first, start + grid.size)
        model.signal_tokens.set_ids(ids)
        model.tokenizer = self.llm_tokenizer
        model.end_of_turn = chat.end_of_turn(self.llm_tokenizer)

    def encoder_key(self, modality: str) -> str:
        """The encoder that reads a media type; raises `InputError` if there is none."""
        return _key_of(modality, self.modalities, "encoder reads")

    def decoder_key(self, modality: str) -> str:
        """The decoder that makes a media type; raises `InputError` if there is none."""
        return _key_of(modality, self.makes, "decoder makes")

    def key_of(self, role: str, modality: str, named: str | None = None) -> str:
        """The encoder, decoder or tokenizer of a media part; raises `InputError` if there is none. If several
        make a type, the assistant's part may name one."""
        if role != "assistant":
            return self.encoder_key(modality)
        return named if named in self.makes else self.decoder_key(modality)

    def media_argument(self, key: str) -> str:
        """The name of the media argument of an encoder's processor (`images`, `raw_speech`, …)."""
        if key in self.spans:
            return "media"
        return next(iter(inspect.signature(self.encoder_processors[key].__call__).parameters))

    def apply_chat_template(self, conversation: Sequence[Any], **kwargs: Any) -> str | list[str] | BatchFeature:
        """Render one conversation or several, with media content parts, as text by the tokenizer's template.

        A user's or system's media part becomes its placeholder, an assistant's the signal span of its decoder, or its
        tokenizer's placeholder. `kwargs` go to the template (`add_generation_prompt=True`).

        With `tokenize=True`, return a batch for the model instead. Users' media parts must then hold their medium under
        their type, `{"type": "image", "image": PIL.Image}`, a clip as uint8 `(F, H, W, 3)` or `data.Video`, a sound as
        `(waveform, sampling rate)` or `data.Audio`. Media in an assistant's parts are inputs of the user's next turn;
        where they have a media tokenizer, they become codes in their place.
        """
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = conversation if several else [conversation]
        if not kwargs.pop("tokenize", False):
            texts = [chat.render(self.llm_tokenizer, self.flatten_messages(one), **kwargs) for one in conversations]
            return texts if several else texts[0]
        # passed by transformers' pipeline; nothing else is supported here
        for name in ("return_tensors", "return_dict", "processor_kwargs"):
            kwargs.pop(name, None)
        read = {key: self.modalities[key] for key in self.encoder_processors}
        reads = {*read, *read.values()}
        conversations = [chat.feed_back(messages, reads) for messages in conversations]
        media = []
        for message in (m for messages in conversations for m in messages):
            for part in (p for p in chat.parts_of(message["content"]) if p["type"] != "text"):
                key = self.key_of(message["role"], part["type"], part.get("key"))
                if message["role"] == "assistant" and key not in self.spans:
                    continue
                if part["type"] not in part:
                    raise InputError(
                        f"a media part has the keys {sorted(part)}; with tokenize=True it must hold its medium under "
                        f"{part['type']!r}"
                    )
                media.append((key, part[part["type"]]))
        texts = [chat.render(self.llm_tokenizer, self.flatten_messages(one), **kwargs) for one in conversations]
        return self(self.arrange_media(media), {"text": texts})

    def arrange_media(self, media: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
        """Convert `(media type or key, medium)` pairs to `encoder_inputs`, in the form that each processor takes.

        Sounds are mixed to mono and resampled to the feature extractor's rate.
        """
        inputs: dict[str, dict[str, Any]] = {}
        for modality, medium in media:
            key = self.encoder_key(modality)
            name = self.media_argument(key)
            arguments = inputs.setdefault(key, {name: []})
            kind, own = MEDIA.get(self.modalities[key]), self.encoder_processors.get(key)
            if own is None:
                arguments[name].append(media_type(self.modalities[key]).to_target(medium))
                continue
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
            key = self.key_of(role, part["type"], part.get("key"))
            signal = role == "assistant" and key not in self.spans
            return "".join(self.signal_tokens[key]) if signal else self.tokens[key]

        def flat(message: Mapping[str, Any]) -> dict[str, Any]:
            parts = chat.parts_of(message["content"])
            return {**message, "content": "".join(text_of(message["role"], part) for part in parts)}

        return [flat(message) for message in messages]


def _key_of(modality: str, modalities: Mapping[str, str], what: str) -> str:
    for key, value in modalities.items():
        if modality in (key, value):
            return key
    raise InputError(f"no {what} {modality!r}; there are {sorted(set(modalities.values())) or 'none'}")
