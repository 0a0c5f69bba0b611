"""`MultimodalProcessor`: raw media and text to a batch, and ids to text. Shape legend: `anygpt.outputs`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase

from anygpt.composition import Composition
from anygpt.encoders import fitting
from anygpt.encoders.families import FAMILIES
from anygpt.encoders.module import count_features
from anygpt.errors import InputError, refusing
from anygpt.media.types import AUDIO, IMAGE, MEDIA, VIDEO, media_type
from anygpt.model.language_models import with_padding
from anygpt.processing import files, repeatable
from anygpt.processing.chat_template import Rendered
from anygpt.processing.conversations import ConversationProcessor, FeatureCounter


class MultimodalProcessor(ConversationProcessor):
    """The processors of all encoders and the tokenizer, combined.

    Args:
        encoder_processors: image processors and feature extractors by encoder key.
        llm_tokenizer: the language model's tokenizer; placeholders and signal tokens are added to it.
        model: supplies the numbers of features of known encoder families, and the decoders' target formats; the token
            ids are registered with it, so that it injects.
        num_feature_calculation_funcs: by encoder key, a function of the encoder processor's inputs and outputs that
            returns the features of every input (int), of each input (list), or of each input by row (list of lists).
            Not needed for the families of `anygpt.encoders.FAMILIES` if a model is given.
        predefined_tokens: placeholder token by encoder key; `<key>` by default.
        num_features_calculation_funcs: alias of `num_feature_calculation_funcs`.
        fit: by encoder key, the treatment of media that do not fit the encoder (see `anygpt.encoders.fitting`): `crop`
            (the library's own), `pad`, `stretch` or `tile` pictures, `split` or `refuse` long sounds.

    Raises:
        InputError: the keys of `encoder_processors` differ from the model's, or another argument has an unknown key.
    """

    save_pretrained = files.save_pretrained
    push_to_hub = files.push_to_hub
    from_pretrained = classmethod(files.from_pretrained)  # type: ignore[var-annotated]

    def __init__(
        self,
        encoder_processors: Mapping[str, Any],
        llm_tokenizer: PreTrainedTokenizerBase,
        model: Composition | None = None,
        num_feature_calculation_funcs: Mapping[str, FeatureCounter] | None = None,
        predefined_tokens: Mapping[str, str] | None = None,
        *,
        num_features_calculation_funcs: Mapping[str, FeatureCounter] | None = None,
        fit: Mapping[str, str | None] | None = None,
    ):
        self.encoder_processors = dict(encoder_processors)
        self.llm_tokenizer = with_padding(llm_tokenizer)
        self.num_feature_funcs = dict(num_feature_calculation_funcs or {}) | dict(num_features_calculation_funcs or {})
        self.tokens = {key: f"<{key}>" for key in self.encoder_processors} | dict(predefined_tokens or {})
        given = (("feature function", self.num_feature_funcs), ("placeholder token", self.tokens), ("fit", fit or {}))
        for what, names in given:
            if unknown := sorted(set(names) - set(self.encoder_processors)):
                raise InputError(f"a {what} is given for {unknown}; the processors are {list(self.encoder_processors)}")
        self.modalities = {key: key for key in self.encoder_processors}
        self.encoder_configs, self.encoder_callbacks, self.projector_configs = {}, {}, {}
        self.signal_tokens, self.makes, self.targets, self.spans, self.coded = {}, {}, {}, {}, {}
        self.injects = model is not None
        if model is not None:
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
            self.describe_targets(model)
        self.fit = fitting.checked(self.modalities, fit or {})
        if model is not None:
            self.spans = {key: len(grid) for key, grid in model.signal_tokens.grids.items()}
            self.tokens |= {key: self.signal_tokens[key][0] for key in self.spans}
            self.modalities |= {key: tokenizer.modality for key, tokenizer in model.tokenizers.items()}
        new = list(dict.fromkeys([*self.tokens.values(), *itertools.chain.from_iterable(self.signal_tokens.values())]))
        # With the default, a second call would drop the tokenizer's existing special tokens.
        self.llm_tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
        if model is not None:
            self.register(model)

    def describe_targets(self, model: Composition) -> None:
        """Read the target formats, which depend on what currently trains in the decoders."""
        self.makes = {key: maker.modality for key, maker in model.makers.items()}
        self.targets = {key: decoder.module.targets for key, decoder in model.decoders.items()}
        self.coded = {key: tokenizer.module.targets for key, tokenizer in model.tokenizers.items()}

    tokenizer = property(lambda self: self.llm_tokenizer)
    chat_template = property(lambda self: self.llm_tokenizer.chat_template)

    def post_process_multimodal_output(
        self,
        generated: Mapping[str, Any] | torch.Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **_: Any,
    ) -> list[Any]:
        """The text of each row, or its first medium of the type `generation_mode` (None if it has none).

        Args:
            generated: the fields of a `GenerationOutput`, as transformers' pipeline passes them, or `(B, S)` ids.
        """
        if generation_mode in (None, "text"):
            ids = generated if isinstance(generated, torch.Tensor) else generated["sequences"]
            return self.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        media = [[s.content for s in row.segments if s.type == generation_mode] for row in generated["answers"]]
        return [found[0] if found else None for found in media]

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
            encoder_inputs: `{encoder key: arguments of its processor}`. Media may be one, a list, or a list per row.
                For tokenizers `{tokenizer key: {"media": [media]}}`, in the form of targets.
            llm_inputs: arguments of the tokenizer; `text` is a string or a list, which is padded by default. No special
                tokens are added if it comes from a chat template or begins with the BOS token.
            return_tensors: framework of the tensors; PyTorch by default.
            decoder_targets: `{decoder key: {"captions": [str], "images": [media]}}` (or another plural), in the order
                of the signal spans; either may be missing. Audio is given as `(waveform, sampling rate)`. A decoder
                that edits also takes `"references"`, media or None.
            text, images, videos, audio: the short form of transformers' processors, in place of `encoder_inputs` and
                `llm_inputs`; other media types by their plurals.
            kwargs: passed to every processor that accepts them.

        Returns:
            The arguments of `MultimodalModel.forward`. An encoder argument whose name processors share is written
            `<key>.<name>`. `references` are for `generate`: the last picture of each row.

        Raises:
            InputError: numbers of placeholders and inputs that differ; names key, row and both counts.
        """
        if text is not None:
            media = {IMAGE.name: images, VIDEO.name: videos, AUDIO.name: audio}
            media |= {kind.name: kwargs.pop(kind.plural) for kind in MEDIA.values() if kind.plural in kwargs}
            several = {name: given if isinstance(given, list) else [given] for name, given in media.items()}
            pairs = [(name, one) for name, given in several.items() for one in given if one is not None]
            encoder_inputs, llm_inputs = self.arrange_media(pairs), {"text": text}
        llm_inputs = dict(llm_inputs or {})
        data, counts, per_row = self.process_media(encoder_inputs or {}, return_tensors, **kwargs)
        text = llm_inputs.pop("text", None)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            bos = self.llm_tokenizer.bos_token
            if all(isinstance(one, Rendered) or (bos and one.startswith(bos)) for one in texts):  # has special tokens
                llm_inputs = {"add_special_tokens": False} | llm_inputs
            expanded = self.expand(texts, counts, per_row)
            one = isinstance(text, str) and return_tensors is None
            options = {"return_tensors": return_tensors, "padding": len(texts) > 1}
            options |= repeatable.accepted(self.llm_tokenizer.__call__, kwargs) | llm_inputs
            data |= dict(self.llm_tokenizer(expanded[0] if one else expanded, **options))
            if references := self.find_references(texts, encoder_inputs or {}):
                data["references"] = references
        if decoder_targets:
            data["decoder_targets"] = self.process_targets(decoder_targets)
        return BatchFeature(data)

    def process_media(
        self, encoder_inputs: Mapping[str, Mapping[str, Any]], return_tensors: str | None = "pt", **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, list[int] | None], dict[str, list[int]]]:
        """Convert encoder inputs to tensors by argument name; also returns the numbers of features of each input by key
        (None if unknown), and the number of media of each row for keys given as one list per row."""
        if unknown := sorted(set(encoder_inputs) - set(self.tokens)):
            raise InputError(
                f"inputs are given for {unknown}, which no encoder reads; the encoders are {list(self.tokens)}"
            )
        outputs: dict[str, dict[str, Any]] = {}
        counts: dict[str, list[int] | None] = {}
        per_row: dict[str, list[int]] = {}
        pieces_per_row: dict[str, list[int]] = {}
        data: dict[str, Any] = {}
        for key in self.spans:
            media, rows = _flatten(encoder_inputs.get(key, {}).get("media", []))
            if media:
                data[f"{key}.media"], counts[key] = self.coded[key](media), [self.spans[key]] * len(media)
                per_row |= {} if rows is None else {key: rows}
        for key, inputs in encoder_inputs.items():
            if key in self.spans:
                continue
            processor, inputs = self.encoder_processors[key], dict(inputs)
            name = self.media_argument(key)
            if name in inputs:
                inputs[name], rows = _flatten(inputs[name])
                if rows is not None:
                    per_row[key] = rows
                if isinstance(inputs[name], list) and not inputs[name]:
                    continue
            parts = self.pieces(key, inputs)
            if parts is not None:
                inputs[name] = [piece for pieces in parts for piece in pieces]
            family = FAMILIES.get(self.encoder_configs[key].model_type) if key in self.encoder_configs else None
            options = {"return_tensors": return_tensors, **(family.processor_options if family else {})}
            options |= repeatable.accepted(processor.__call__, kwargs) | inputs
            # processors raise anything for media that they cannot take
            with refusing(f"the {key!r} encoder's {type(processor).__name__} refuses it"):
                outputs[key] = repeatable.call(processor, options, name)
            counts[key] = self.count_features(key, inputs, outputs[key])
            if counts[key] is not None and min(counts[key], default=1) < 1:
                raise InputError(f"the {key!r} encoder gives no features of it: it is too small or too thin")
            if parts is not None:
                lengths = [len(pieces) for pieces in parts]
                counts[key] = counts[key] and _sums(counts[key], lengths)
                if key in per_row:
                    pieces_per_row[key] = _sums(lengths, per_row[key])
        for key, output in outputs.items():
            others = [getattr(own, "model_input_names", ()) for k, own in self.encoder_processors.items() if k != key]
            others += [other for k, other in outputs.items() if k != key]
            shared = {*self.llm_tokenizer.model_input_names}.union(*others)
            data |= {f"{key}.{name}" if name in shared else name: value for name, value in output.items()}
        if per_row and not self.injects:
            data["items_per_row"] = per_row | pieces_per_row
        return data, counts, per_row

    def pieces(self, key: str, inputs: Mapping[str, Any]) -> list[list[Any]] | None:
        """The pieces into which each medium of an encoder's inputs is split, or None if they are not split."""
        media = inputs.get(self.media_argument(key))
        kind = MEDIA.get(self.modalities[key])
        return None if media is None else fitting.pieces(kind, media, self.encoder_processors[key], self.fit[key])

    def count_features(self, key: str, inputs: dict, outputs: dict) -> list[int] | None:
        """The numbers of features of each input; None if neither a function nor a known family can tell."""
        if key in self.num_feature_funcs:
            counts = self.num_feature_funcs[key](inputs, outputs)
            if isinstance(counts, (int, np.integer)):
                # counts the media themselves, because a processor may pack them into one axis
                media = inputs.get(self.media_argument(key))
                listed = isinstance(media, list) and not isinstance(media[0], (int, float, np.number))
                return [int(counts)] * len(media if listed else next(iter(outputs.values())))
            return [int(c) for row in counts for c in np.atleast_1d(row)]
        if key not in self.encoder_configs:
            return None
        known = (self.encoder_configs[key], self.encoder_callbacks[key], self.projector_configs[key])
        return count_features(*known, outputs)

    def expand(
        self,
        texts: Sequence[str],
        counts: Mapping[str, list[int] | None],
        per_row: Mapping[str, list[int]] | None = None,
    ) -> list[str]:
        """Repeat each placeholder once for each feature of its input; their numbers must be the same."""
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
            by_row = rows is not None and len(rows) == len(in_rows)
            if (rows != in_rows) if by_row else (sum(in_rows) != len(given)):
                where = ", ".join(f"row {row}: {count}" for row, count in enumerate(in_rows))
                raise InputError(
                    f"{key!r}: the text has {sum(in_rows)} {token} placeholders ({where}) but {len(given)} inputs were "
                    f"given{f', in rows {rows}' if by_row else ''}; write one placeholder for each input"
                )
            numbers = iter(given)
            for row, text in enumerate(texts):
                head, *tails = text.split(token)
                texts[row] = head + "".join(token * next(numbers) + tail for tail in tails)
        return texts

    def find_references(
        self, texts: Sequence[str], encoder_inputs: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, list[Any]]:
        """The last medium that each row shows, or None, by decoder that can edit it."""
        found: dict[str, list[Any]] = {}
        for key in (key for key, target in self.targets.items() if target.editable):
            for shown in set(self.tokens) & set(encoder_inputs):
                media, rows = _flatten(encoder_inputs[shown].get(self.media_argument(shown)))
                if media is None or self.modalities[shown] != self.makes[key]:
                    continue
                media = media if isinstance(media, list) else [media]
                rows = rows or [text.count(self.tokens[shown]) for text in texts]
                ends = itertools.accumulate(rows)
                found[key] = [media[end - 1] if count else None for end, count in zip(ends, rows, strict=True)]
        return found

    def process_targets(self, decoder_targets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Convert targets to `{decoder key: {"captions": [str], "media": tensor, "references": tensor}}`."""
        processed: dict[str, dict[str, Any]] = {}
        for key, target in decoder_targets.items():
            if key not in self.targets:
                raise InputError(
                    f"there are targets for {key!r}; the decoders are {list(self.targets)} (build the processor with "
                    "model= to make them known)"
                )
            media_name = media_type(self.makes[key]).plural
            if unknown := sorted(set(target) - {"captions", media_name, "references"}):
                raise InputError(f"{key!r} targets have the keys {unknown}; expected 'captions' and {media_name!r}")
            captions, media, references = (target.get(name) for name in ("captions", media_name, "references"))
            if captions is not None and media is not None and len(captions) != len(media):
                raise InputError(f"{key!r} targets have {len(captions)} captions but {len(media)} {media_name}")
            processed[key] = {} if captions is None else {"captions": list(captions)}
            if media is not None:
                processed[key]["media"] = self.targets[key](list(media))
            if references is not None:
                if not self.targets[key].reference:
                    raise InputError(f"{key!r} targets have references, but this decoder takes none; leave them out")
                targets = next((given for given in (captions, media) if given is not None), references)
                if not isinstance(references, (list, tuple)) or len(references) != len(targets):
                    raise InputError(
                        f"{key!r} targets have the references {references!r:.80}; expected a list of media or None, "
                        "one for each target"
                    )
                if any(one is not None for one in references):
                    processed[key]["references"] = self.targets[key].or_zeros(list(references))
        return processed


def _flatten(media: Any) -> tuple[Any, list[int] | None]:
    """Flatten one list per row into one list and the number of inputs of each row; return anything else as it is."""
    if isinstance(media, tuple):
        media = list(media)
    nested = isinstance(media, list) and media and all(isinstance(row, (list, tuple)) for row in media)
    if not nested or any(isinstance(item, (int, float, np.number)) for row in media for item in row):
        return media, None
    return [item for row in media for item in row], [len(row) for row in media]


def _sums(values: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return [int(group.sum()) for group in torch.tensor(values).split(list(lengths))]


def stack_rows(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Pad ragged rows on the right with `fill` to `(B, S)` int64."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=fill)
