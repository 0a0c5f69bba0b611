"""`MultimodalProcessor`: raw media and text to a batch of the model, and back to text.

Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase

from anygpt import chat
from anygpt.audio import resample, to_mono
from anygpt.data.media import Audio, Video
from anygpt.decoders.targets import TargetProcessor, target_processor_from_dict
from anygpt.encoders.callbacks import EncoderCallbacks
from anygpt.encoders.families import FAMILIES
from anygpt.encoders.module import count_features
from anygpt.encoders.projector import MultimodalProjectorConfig
from anygpt.encoders.video import VideoFrameProcessor
from anygpt.errors import InputError
from anygpt.parts import build_callback, callback_dict, import_class
from anygpt.transformers_api import TransformersProcessor

if TYPE_CHECKING:
    from anygpt.modeling import MultimodalModel

CONFIG = "processor_config.json"
FeatureCounter = Callable[[dict, dict], "int | list[int] | list[list[int]]"]


class MultimodalProcessor(TransformersProcessor):
    """Processors of all encoders and the tokenizer as one, with the placeholders between them.

    Args:
        encoder_processors: image processors and feature extractors by encoder key.
        llm_tokenizer: the language model's tokenizer; placeholders and signal tokens are added to it, and its other
            special tokens are kept.
        model: its encoders tell how many features each input gives, its decoders what targets they want; the token
            ids are registered with it, so that it injects.
        num_feature_calculation_funcs: `(inputs, outputs) -> int | list[int] | list[list[int]]` by encoder key, of the
            encoder processor's inputs and outputs: features of every input, of each input, or of each input by row.
            Automatic for the families of `anygpt.encoders.FAMILIES` when a model is given.
        predefined_tokens: placeholder token by encoder key; `<key>` where not named.
        num_features_calculation_funcs: another spelling of `num_feature_calculation_funcs`.

    Raises:
        InputError: an encoder of the model without processor, or the other way round.
    """

    def __init__(
        self,
        encoder_processors: Mapping[str, Any],
        llm_tokenizer: PreTrainedTokenizerBase,
        model: MultimodalModel | None = None,
        num_feature_calculation_funcs: Mapping[str, FeatureCounter] | None = None,
        predefined_tokens: Mapping[str, str] | None = None,
        *,
        num_features_calculation_funcs: Mapping[str, FeatureCounter] | None = None,
    ):
        self.encoder_processors = dict(encoder_processors)
        self.llm_tokenizer = llm_tokenizer
        self.num_feature_funcs = dict(num_feature_calculation_funcs or {}) | dict(num_features_calculation_funcs or {})
        self.tokens = {key: f"<{key}>" for key in self.encoder_processors} | dict(predefined_tokens or {})
        for what, names in (("feature function", self.num_feature_funcs), ("placeholder token", self.tokens)):
            unknown = sorted(set(names) - set(self.encoder_processors))
            if unknown:
                raise InputError(f"a {what} is given for {unknown}; the processors are {list(self.encoder_processors)}")
        self.modalities = {key: key for key in self.encoder_processors}
        self.encoder_configs: dict[str, PreTrainedConfig] = {}
        self.encoder_callbacks: dict[str, EncoderCallbacks | None] = {}
        self.projector_configs: dict[str, MultimodalProjectorConfig] = {}
        self.signal_tokens: dict[str, list[str]] = {}
        self.targets: dict[str, TargetProcessor] = {}
        self.injects = model is not None
        if model is not None:
            self._describe(model)
        self._add_tokens()
        if model is not None:
            self.register(model)

    def _describe(self, model: MultimodalModel) -> None:
        if set(model.encoder_keys) != set(self.encoder_processors):
            raise InputError(
                f"the model has the encoders {sorted(model.encoder_keys)}, but processors are given for "
                f"{sorted(self.encoder_processors)}"
            )
        self.modalities = {key: encoder.modality for key, encoder in model.encoders.items()}
        self.encoder_configs = {key: encoder.config for key, encoder in model.encoders.items()}
        self.encoder_callbacks = {key: encoder.callbacks for key, encoder in model.encoders.items()}
        self.projector_configs = {key: encoder.projector.config for key, encoder in model.encoders.items()}
        self.signal_tokens = model.signal_tokens.names
        self.targets = {key: decoder.module.targets for key, decoder in model.decoders.items()}

    def _add_tokens(self) -> None:
        names = [*self.tokens.values(), *(name for names in self.signal_tokens.values() for name in names)]
        # By default a second call would drop the special tokens that the tokenizer already has.
        self.llm_tokenizer.add_special_tokens({"extra_special_tokens": names}, replace_extra_special_tokens=False)

    @property
    def token_ids(self) -> dict[str, int]:
        """`{encoder key: id of its placeholder}`."""
        return {key: self.llm_tokenizer.convert_tokens_to_ids(token) for key, token in self.tokens.items()}

    @property
    def signal_token_ids(self) -> dict[str, list[int]]:
        """`{decoder key: ids of its signal tokens}`."""
        return {key: self.llm_tokenizer.convert_tokens_to_ids(names) for key, names in self.signal_tokens.items()}

    def register(self, model: MultimodalModel) -> None:
        """Tell a model the token ids and the tokenizer. It injects from then on."""
        model.set_token_ids(self.token_ids)
        model.signal_tokens.set_ids(self.signal_token_ids)
        model.tokenizer = self.llm_tokenizer

    # ------------------------------------------------------------------------------------------------------- a batch

    def __call__(
        self,
        encoder_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        llm_inputs: Mapping[str, Any] | None = None,
        return_tensors: str | None = "pt",
        decoder_targets: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        text: str | list[str] | None = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Run every processor on its inputs, expand the placeholders, and tokenize.

        Args:
            encoder_inputs: `{encoder key: arguments of its processor}`. Media may be one, a list, or a list a row.
            llm_inputs: arguments of the tokenizer; `text` is a string or a list, padded if it is a list and nothing
                else is said.
            return_tensors: framework of the tensors; PyTorch by default.
            decoder_targets: `{decoder key: {"captions": [str], "images" | "videos" | "audios": [media]}}`, in the order
                of the signal spans; either may be missing. Audio is given as `(waveform, sampling rate)`.
            text, images, videos, audio: the shorter form that transformers' own processors have, in place of
                `encoder_inputs` and `llm_inputs`.
            kwargs: given to every processor that accepts them.

        Returns:
            Everything that `MultimodalModel.forward` takes. An encoder argument whose name two processors share is
            written `<key>.<name>`.

        Raises:
            InputError: placeholders and inputs that do not match, with key, row and both counts.
        """
        if text is not None:
            media = {"images": images, "videos": videos, "audio": audio}
            encoder_inputs, llm_inputs = self.inputs_by_modality(text, media)
        llm_inputs = dict(llm_inputs or {})
        data, counts, per_row = self.process_media(encoder_inputs or {}, return_tensors, **kwargs)
        text = llm_inputs.pop("text", None)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            expanded = self.expand(texts, counts, per_row)
            options = _accepted(self.llm_tokenizer.__call__, kwargs) | {"padding": len(texts) > 1} | llm_inputs
            tokens = self.llm_tokenizer(
                expanded[0] if isinstance(text, str) and return_tensors is None else expanded,
                return_tensors=return_tensors,
                **options,
            )
            data |= dict(tokens)
        if decoder_targets:
            data["decoder_targets"] = self.process_targets(decoder_targets)
        if per_row and not self.injects:
            data["items_per_row"] = per_row
        return BatchFeature(data)

    def process_media(
        self, encoder_inputs: Mapping[str, Mapping[str, Any]], return_tensors: str | None = "pt", **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, list[int] | None], dict[str, list[int]]]:
        """Encoder inputs to tensors.

        Returns:
            The tensors by argument name; features of each input by key (None where nothing can tell them); and, for
            keys given as one list a row, how many inputs each row has.
        """
        unknown = sorted(set(encoder_inputs) - set(self.encoder_processors))
        if unknown:
            raise InputError(
                f"inputs are given for {unknown}, which no encoder reads; the encoders are "
                f"{list(self.encoder_processors)}"
            )
        outputs: dict[str, dict[str, Any]] = {}
        counts: dict[str, list[int] | None] = {}
        per_row: dict[str, list[int]] = {}
        for key, inputs in encoder_inputs.items():
            processor, inputs = self.encoder_processors[key], dict(inputs)
            name = self.media_argument(key)
            if name in inputs:
                inputs[name], rows = _flatten(inputs[name])
                if rows is not None:
                    per_row[key] = rows
                if isinstance(inputs[name], list) and not inputs[name]:
                    continue
            options = self._family_options(key) | _accepted(processor.__call__, kwargs) | inputs
            outputs[key] = dict(processor(**{"return_tensors": return_tensors} | options))
            counts[key] = self.count_features(key, inputs, outputs[key])
        names = [name for output in outputs.values() for name in output]
        data = {}
        for key, output in outputs.items():
            others = [set(getattr(p, "model_input_names", ())) for k, p in self.encoder_processors.items() if k != key]
            others.append(set(self.llm_tokenizer.model_input_names))
            for name, value in output.items():
                shared = names.count(name) > 1 or any(name in other for other in others)
                data[f"{key}.{name}" if shared else name] = value
        return data, counts, per_row

    def media_argument(self, key: str) -> str:
        """Name of the argument under which an encoder's processor takes its media (`images`, `raw_speech`, …)."""
        return next(iter(inspect.signature(self.encoder_processors[key].__call__).parameters))

    def count_features(self, key: str, inputs: dict, outputs: dict) -> list[int] | None:
        """Features of each input, in order; None if neither a function nor a known family can tell."""
        if key in self.num_feature_funcs:
            counts = self.num_feature_funcs[key](inputs, outputs)
            if isinstance(counts, (int, np.integer)):
                # the media themselves tell how many there are: a processor may pack them into one axis
                media = inputs.get(self.media_argument(key))
                listed = isinstance(media, list) and not isinstance(media[0], (int, float, np.number))
                return [int(counts)] * len(media if listed else next(iter(outputs.values())))
            return [int(c) for row in counts for c in np.atleast_1d(row)]
        if key not in self.encoder_configs:
            return None
        return count_features(
            self.encoder_configs[key], self.encoder_callbacks[key], self.projector_configs[key], outputs
        )

    def _family_options(self, key: str) -> dict[str, Any]:
        """Arguments without which an encoder's processor leaves out what its family needs."""
        config = self.encoder_configs.get(key)
        family = FAMILIES.get(config.model_type) if config is not None else None
        return dict(family.processor_options) if family is not None else {}

    def expand(
        self,
        texts: Sequence[str],
        counts: Mapping[str, list[int] | None],
        per_row: Mapping[str, list[int]] | None = None,
    ) -> list[str]:
        """Write each placeholder as often as its input has features.

        Raises:
            InputError: a row has other than as many placeholders as inputs.
        """
        texts = list(texts)
        for key, token in self.tokens.items():
            in_rows = [text.count(token) for text in texts]
            given = counts.get(key, [])
            if not any(in_rows) and not self.injects:
                continue  # prepending needs no placeholders
            if given is None:
                raise InputError(
                    f"nothing tells how many features the {key!r} encoder gives; build the processor with model= (for "
                    f"a known encoder family) or with num_feature_calculation_funcs={{{key!r}: …}}"
                )
            rows = (per_row or {}).get(key)
            _check_placeholders(key, token, in_rows, len(given), rows)
            numbers = iter(given)
            for row, text in enumerate(texts):
                head, *tails = text.split(token)
                texts[row] = head + "".join(token * next(numbers) + tail for tail in tails)
        return texts

    def process_targets(self, decoder_targets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Captions and media for the decoders: `{decoder key: {"captions": [str], "media": tensor}}`."""
        processed: dict[str, dict[str, Any]] = {}
        for key, target in decoder_targets.items():
            if key not in self.targets:
                raise InputError(
                    f"there are targets for {key!r}; the decoders are {list(self.targets)} (build the processor with "
                    "model= to make them known)"
                )
            media_name = f"{self.targets[key].modality}s"
            unknown = sorted(set(target) - {"captions", media_name})
            if unknown:
                raise InputError(f"{key!r} targets have the keys {unknown}; expected 'captions' and {media_name!r}")
            captions, media = target.get("captions"), target.get(media_name)
            if captions is not None and media is not None and len(captions) != len(media):
                raise InputError(f"{key!r} targets have {len(captions)} captions but {len(media)} {media_name}")
            processed[key] = {}
            if captions is not None:
                processed[key]["captions"] = list(captions)
            if media is not None:
                processed[key]["media"] = self.targets[key](list(media))
        return processed

    # ------------------------------------------------------------------------------------------------------- text

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
        # The template writes what begins a text, so the tokenizer must not write it a second time.
        return self(self.arrange_media(media), {"text": texts, "add_special_tokens": False})

    def arrange_media(self, media: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
        """`(media type, medium)` pairs as `encoder_inputs`: sorted by encoder, in the form that its processor takes.

        Sounds are mixed to mono and resampled to what the encoder's feature extractor wants.
        """
        inputs: dict[str, dict[str, Any]] = {}
        for modality, medium in media:
            key = self.encoder_key(modality)
            name = self.media_argument(key)
            arguments = inputs.setdefault(key, {name: []})
            if modality == "audio":
                wanted = arguments["sampling_rate"] = self.encoder_processors[key].sampling_rate
                medium = (medium.waveform, medium.sampling_rate) if isinstance(medium, Audio) else medium
                # a waveform without a rate has the encoder's own, as transformers' processors take it
                waveform, rate = medium if isinstance(medium, tuple) else (medium, wanted)
                medium = resample(to_mono(waveform), rate, wanted)
            arguments[name].append(medium.frames if isinstance(medium, Video) else medium)
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

    # ------------------------------------------------------------------------------------------------------- files

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write tokenizer, encoder processors (under `processors/<key>/`) and `processor_config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.llm_tokenizer.save_pretrained(folder)
        encoders = {}
        for key, processor in self.encoder_processors.items():
            frames = processor.num_frames if isinstance(processor, VideoFrameProcessor) else None
            inner = processor.image_processor if frames else processor
            inner.save_pretrained(folder / "processors" / key)
            config = self.encoder_configs.get(key)
            encoders[key] = {
                "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
                "num_frames": frames,
                "modality": self.modalities[key],
                "token": self.tokens[key],
                "own_feature_function": key in self.num_feature_funcs,
                "encoder_config": None if config is None else config.to_dict(),
                "projector": None if config is None else self.projector_configs[key].to_diff_dict(),
                "callbacks": callback_dict(self.encoder_callbacks.get(key)),
            }
        decoders = {
            key: {"tokens": self.signal_tokens[key], "targets": targets.to_dict()}
            for key, targets in self.targets.items()
        }
        content = {
            "processor_class": type(self).__name__,
            "injects": self.injects,
            "encoders": encoders,
            "decoders": decoders,
        }
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: MultimodalModel | None = None,
        num_feature_calculation_funcs: Mapping[str, FeatureCounter] | None = None,
        **_: Any,
    ) -> MultimodalProcessor:
        """Give a saved processor back; with `model`, the token ids are registered there.

        Raises:
            InputError: no processor there, or a feature function of your own, which cannot be saved, is not given.
        """
        folder = Path(folder)
        path = folder / CONFIG
        if not path.is_file():
            raise InputError(f"{folder} holds no saved processor: there is no {CONFIG}; expected a run's final/ folder")
        content = json.loads(path.read_text())
        functions = dict(num_feature_calculation_funcs or {})
        lacking = [key for key, e in content["encoders"].items() if e["own_feature_function"] and key not in functions]
        if lacking:
            raise InputError(
                f"the processor in {folder} was saved with feature functions of your own for {lacking}, which cannot "
                "be saved; give them again with num_feature_calculation_funcs="
            )
        processors = {}
        for key, entry in content["encoders"].items():
            inner = import_class(entry["class"]).from_pretrained(folder / "processors" / key)
            frames = entry["num_frames"]
            processors[key] = VideoFrameProcessor(inner, frames) if frames else inner
        self = cls.__new__(cls)
        self.encoder_processors = processors
        self.llm_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.num_feature_funcs = functions
        self.tokens = {key: entry["token"] for key, entry in content["encoders"].items()}
        self.modalities = {key: entry["modality"] for key, entry in content["encoders"].items()}
        self.encoder_configs = {
            key: _config_from_dict(entry["encoder_config"])
            for key, entry in content["encoders"].items()
            if entry["encoder_config"] is not None
        }
        self.encoder_callbacks = {key: build_callback(e["callbacks"]) for key, e in content["encoders"].items()}
        self.projector_configs = {
            key: MultimodalProjectorConfig(**content["encoders"][key]["projector"]) for key in self.encoder_configs
        }
        self.signal_tokens = {key: entry["tokens"] for key, entry in content["decoders"].items()}
        self.targets = {key: target_processor_from_dict(e["targets"]) for key, e in content["decoders"].items()}
        self.injects = content["injects"]
        if model is not None:
            self.register(model)
        return self


def _config_from_dict(content: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(**content)


def _accepted(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that a processor names in its signature, or in the `TypedDict` of its keyword arguments."""
    owner = getattr(function, "__self__", None)
    names = set(inspect.signature(function).parameters)
    names |= set(getattr(getattr(owner, "valid_kwargs", None), "__annotations__", ()))
    return {name: value for name, value in options.items() if name in names}


def _flatten(media: Any) -> tuple[Any, list[int] | None]:
    """One list a row becomes one list, with the number of inputs of each row; everything else stays as it is."""
    if isinstance(media, tuple):
        media = list(media)
    nested = isinstance(media, list) and media and all(isinstance(row, (list, tuple)) for row in media)
    if not nested or any(isinstance(item, (int, float, np.number)) for row in media for item in row):
        return media, None
    return [item for row in media for item in row], [len(row) for row in media]


def _check_placeholders(key: str, token: str, in_rows: list[int], inputs: int, rows: list[int] | None) -> None:
    if rows is not None and len(rows) == len(in_rows):
        bad = next((row for row, (have, want) in enumerate(zip(in_rows, rows, strict=True)) if have != want), None)
        if bad is not None:
            raise InputError(
                f"{key!r}: row {bad} has {in_rows[bad]} {token} placeholders but {rows[bad]} inputs; write one "
                "placeholder for each input"
            )
    elif sum(in_rows) != inputs:
        where = ", ".join(f"row {row}: {count}" for row, count in enumerate(in_rows))
        raise InputError(
            f"{key!r}: the text has {sum(in_rows)} {token} placeholders ({where}) but {inputs} inputs were given; "
            "write one placeholder for each input"
        )


def stack_rows(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """`(B, S)` int64 of ragged rows, padded on the right with `fill`."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long)
