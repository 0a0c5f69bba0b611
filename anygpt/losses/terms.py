"""What the losses of a batch are computed from, and its sub-terms, each declared once in `SUB_TERMS`.

Formulas and weights: `anygpt.losses.formulas`. Shape legend: `anygpt.outputs`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from anygpt.composition import Composition, Reading
from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.conditions import Condition
from anygpt.encoders.contrast import info_nce
from anygpt.errors import InputError
from anygpt.losses.formulas import (
    MEDIA_OUT,
    TERMS,
    TEXT,
    LossWeights,
    caption_alignment,
    dropped,
    route,
    sum_by_term,
)
from anygpt.losses.labels import Labels
from anygpt.outputs import LossTerm
from anygpt.sequence.merging import IGNORE, Merged
from anygpt.sequence.signal_tokens import Spans
from anygpt.tokenizers.base import MediaTokenizer


@dataclass
class Pairs:
    """Rows `(P,)` that hold both an encoder's features and the features or text they are contrasted with."""

    model: Composition
    merged: Merged
    key: str
    rows: Tensor
    has: ClassVar[frozenset[str]] = frozenset()

    def info_nce(self) -> Tensor:
        # Training gathers over all processes, including those without pairs. In evaluation the number of batches may
        # differ by process, so nothing is gathered.
        weights = self.model.loss_weights
        ours, bound = self._pool(self.key), self._pool(weights.binding)
        return info_nce(ours, bound, weights.temperature, gather=self.model.training)

    def _pool(self, key: str) -> Tensor:
        """Mean-pool each row's features of an encoder, or its answer's embeddings (detached), to `(P, H)`."""
        held = _features_in(self.model, self.merged, key)[self.rows, :, None]
        features = self.merged.inputs_embeds[self.rows].float()
        features = features if key in (self.model.token_ids or {}) else features.detach()
        return (features * held).sum(dim=1) / held.sum(dim=1)


@dataclass
class Target:
    """The `K` targets of one decoder, or media of a tokenizer, at rows `(K,)` int64; captions and media may be missing,
    or already encoded.

    `given` is the decoder's entry of `decoder_targets` (see `MultimodalModel.forward`), `condition` the projected
    condition, `generator` one generator per target; both are None while losses are only counted.
    """

    key: str
    rows: Tensor
    given: Mapping[str, Any]
    decoder: DiffusionDecoder | MediaTokenizer
    weights: LossWeights
    condition: Condition | None = None
    generator: list[Generator] | None = None

    @cached_property
    def has(self) -> frozenset[str]:
        """What sub-terms may need: `captions`, `media`, `pooled`, `mask`, and the names of networks that train."""
        kinds = {"captions": ("captions", "conditions"), "media": ("media", "posterior")}
        found = {kind for kind, names in kinds.items() if any(self.given.get(name) is not None for name in names)}
        parts = {"pooled": self.decoder.pooled_dim, "mask": self.decoder.masked}
        return frozenset(found | set(self.decoder.trains) | {name for name, there in parts.items() if there})

    @cached_property
    def dropped(self) -> list[bool]:
        """Which captions are replaced by the empty one, if only the decoder's own training uses them."""
        trains = self.weights.decoder and self.has.issuperset(("captions", "media"))
        alone = trains and not is_read("captions", replace(self.weights, decoder=0.0), self.key)
        return dropped(self.weights.caption_dropout if alone else 0.0, len(self.rows), self.generator)

    @cached_property
    def encoding(self) -> Condition:
        given = self.given.get("conditions")
        encoding = Condition.of(self.decoder.encode_text(self.captions) if given is None else given)
        if given is not None and any(self.dropped):
            encoding = encoding.replaced(self.dropped, Condition.of(self.decoder.encode_text([""])))
        return encoding if self.condition is None else encoding.to(self.condition.embeds.device)

    @property
    def captions(self) -> list[str] | None:
        captions = self.given.get("captions")
        return captions and ["" if empty else text for text, empty in zip(captions, self.dropped, strict=True)]

    @cached_property
    def reference(self) -> Tensor | None:
        """The references, some replaced by zeros where the decoder trains."""
        given = self.given.get("references")
        if given is None or not self.weights.decoder:
            return given
        drawn = dropped(self.weights.reference_dropout, len(given), self.generator)
        return given * ~torch.tensor(drawn, device=given.device).view(-1, *[1] * (given.dim() - 1))

    @cached_property
    def reconstructions(self) -> dict[str, Tensor]:
        return self.decoder.reconstruction_losses(self.given["media"], self.generator)

    @cached_property
    def latents(self) -> Tensor:
        generator = self.generator if self.weights.latents == "samples" else None
        if self.given.get("posterior") is not None:
            mean, std = self.given["posterior"].to(self.decoder.device).unbind(1)
            return self.decoder.sample_posterior(mean, std, generator)
        return self.decoder.encode_media(self.given["media"], generator=generator)

    def alignment(self) -> Tensor:
        real = self.encoding.real if self.decoder.masked else None
        return caption_alignment(self.condition.embeds, self.encoding.embeds, self.weights.alignment_kind, real)

    def mask_alignment(self) -> Tensor:
        """Binary cross-entropy of the projected mask, averaged over the tokens."""
        real = self.encoding.real.float()
        return F.binary_cross_entropy_with_logits(self.condition.mask.float(), real, reduction="none").mean(dim=-1)

    def pooled_alignment(self) -> Tensor:
        pooled = (self.condition.pooled[:, None], self.encoding.pooled[:, None])
        return caption_alignment(*pooled, self.weights.alignment_kind)

    def denoising(self, condition: Condition) -> Tensor:
        options = {"generator": self.generator, "snr_gamma": self.weights.snr_gamma, "reference": self.reference}
        return self.decoder.denoising_loss(condition, self.latents, **options)


@dataclass
class LossBatch:
    """Everything in a batch that has a loss: the term of each row, the label tokens, the signal spans by decoder, the
    contrastive pairs by encoder, and the generation targets by decoder."""

    terms: list[str]
    labels: Labels
    spans: dict[str, Spans]
    pairs: dict[str, Pairs] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)

    @property
    def nll(self) -> tuple[Tensor, Tensor]:
        """Rows and positions `(M,)` where logits are needed."""
        return self.labels.rows, self.labels.positions


def find_losses(
    model: Composition,
    merged: Merged,
    targets: Mapping[str, Mapping[str, Any]] | None = None,
    media: Mapping[str, Tensor] = {},
) -> LossBatch:
    """Find labels, spans, pairs and targets in a merged batch, and `media` of tokenizers, without computing any loss.

    Labels on learned queries are left out, since the model never emits them, and so is a row's first token: padding
    predicts nothing. Unknown decoders, and more or fewer targets than signal spans, are an `InputError`.
    """
    ids, labels, signals, weights = merged.input_ids, merged.labels, model.signal_tokens, model.loss_weights
    spans = {key: signals.find_spans(ids, key) for key in signals.ids if key in model.decoder_keys}
    for key in set(spans) & set(signals.grids) if labels is not None else ():  # a user's codes have no targets
        answered = labels[spans[key].rows, spans[key].positions[:, 0]] != IGNORE
        spans[key] = Spans(spans[key].rows[answered], spans[key].positions[answered])
    media_in, media_out = merged.media_in, torch.zeros_like(merged.media_in)
    for found in spans.values():
        media_out[found.rows] = True
    for begin in (signals.ids[key][0] for key in signals.ids if key in model.tokenizer_keys):
        answered = torch.zeros_like(ids, dtype=torch.bool) if labels is None else labels == begin
        media_in, media_out = media_in | ((ids == begin) & ~answered).any(dim=1), media_out | answered.any(dim=1)
    if labels is None or not reads_labels(weights):
        labels = torch.full_like(ids, IGNORE)
    labelled = (labels != IGNORE) & ~_is_one_of(ids, signals.query_ids)
    rows, positions = (labelled[:, 1:] & merged.attention_mask[:, :-1].bool()).nonzero(as_tuple=True)
    values = labels[rows, positions + 1]
    alone = ~(media_in | media_out)
    batch = LossBatch(route(media_in, media_out), Labels(model, merged, alone, rows, positions, values), spans)
    if weights.encoder and model.token_ids is not None:
        known = (*model.token_ids, TEXT)
        if weights.binding not in known:
            raise InputError(
                f"loss.binding is {weights.binding!r}, which is not an encoder; expected one of {', '.join(known)}"
            )
        bound = _features_in(model, merged, weights.binding).any(dim=1)
        for key, token in model.token_ids.items():
            if key != weights.binding:
                rows = (bound & (ids == token).any(dim=1)).nonzero()[:, 0]
                batch.pairs[key] = Pairs(model, merged, key, rows)
    for key, given in (targets or {}).items():
        _check_target(model, key, given, spans)
        batch.targets[key] = Target(key, spans[key].rows, given, model.decoders[key].module, weights)
    for key, one in media.items():
        if key in batch.targets:
            raise InputError(f"the {key!r} tokenizer trains, so give no targets for the decoder that reads its codes")
        rows = torch.zeros(len(one), dtype=torch.long, device=ids.device)  # any rows: its sub-term has no row terms
        batch.targets[key] = Target(key, rows, {"media": one}, model.tokenizers[key].module, weights)
    return batch


def _is_one_of(input_ids: Tensor, ids: list[int]) -> Tensor:
    return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device, dtype=input_ids.dtype))


def _features_in(model: Composition, merged: Merged, key: str) -> Tensor:
    """`(B, S)` bool mask of an encoder's features or, for `text`, of all labelled tokens but signal tokens."""
    if key in (model.token_ids or {}):
        return merged.input_ids == model.token_ids[key]
    if merged.labels is None:
        return torch.zeros_like(merged.input_ids, dtype=torch.bool)
    signals = [i for span in model.signal_tokens.ids.values() for i in span]
    return (merged.labels != IGNORE) & ~_is_one_of(merged.input_ids, signals)


def _check_target(model: Composition, key: str, given: Mapping[str, Any], spans: Mapping[str, Spans]) -> None:
    if key not in model.decoder_keys:
        raise InputError(f"there are targets for {key!r}; the decoders are {list(model.decoder_keys)}")
    if key not in spans:
        raise InputError(
            f"there are targets for {key!r}, but the model does not know its signal tokens' ids; build the "
            "MultimodalProcessor with model=, or call model.signal_tokens.set_ids"
        )
    for name, values in given.items():
        if values is not None and len(values) != len(spans[key]):
            raise InputError(
                f"the batch has {len(spans[key])} {key!r} signal spans but {len(values)} {name}; each span needs "
                "one, in the order of the batch"
            )


@dataclass(frozen=True)
class SubTerm:
    """One declared sub-term, logged as `<term of the row>/<name>[/<key>]`, or as `<name>/<key>` where `name` includes
    the term.

    Attributes:
        of: the class it applies to: `Labels` of a batch, `Pairs` of an encoder or `Target` of a decoder.
        values: computes one value per row of such an object, `(M,)` float32.
        terms: the row terms it is logged under; empty where `name` includes the term.
        needs: what the object must have, see `Target.has`.
        everywhere: compute it even without rows, because it communicates between processes.
    """

    name: str
    of: type
    values: Callable[[Any], Tensor]
    terms: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    everywhere: bool = False

    def suffix(self, key: str) -> str:
        """The name with the key of an encoder or decoder, or without for text (`""`)."""
        return f"{self.name}/{key}" if key else self.name

    def names(self, key: str) -> list[str]:
        return [f"{term}/{self.suffix(key)}" for term in self.terms] or [self.suffix(key)]


SUB_TERMS = (  # in the order of computation, which fixes the order of draws from a target's generator
    SubTerm("nll", Labels, Labels.nll, TERMS),
    SubTerm("retention", Labels, Labels.retention, TERMS[:1], everywhere=True),
    SubTerm("encoder/info_nce", Pairs, Pairs.info_nce, everywhere=True),
    SubTerm("alignment", Target, Target.alignment, MEDIA_OUT, needs=("captions",)),
    SubTerm("pooled_alignment", Target, Target.pooled_alignment, MEDIA_OUT, needs=("captions", "pooled")),
    SubTerm("mask_alignment", Target, Target.mask_alignment, MEDIA_OUT, needs=("captions", "mask")),
    SubTerm("reconstruction/vae", Target, lambda one: one.reconstructions["vae"], needs=("media", "vae")),
    SubTerm("reconstruction/vocoder", Target, lambda one: one.reconstructions["vocoder"], needs=("media", "vocoder")),
    SubTerm(
        "reconstruction/tokenizer", Target, lambda one: one.reconstructions["tokenizer"], needs=("media", "tokenizer")
    ),
    SubTerm("denoising", Target, lambda target: target.denoising(target.condition), MEDIA_OUT, needs=("media",)),
    SubTerm("decoder/denoising", Target, lambda target: target.denoising(target.encoding), needs=("captions", "media")),
)


def reads_labels(weights: LossWeights) -> bool:
    """Whether a sub-term of `Labels` has a weight."""
    return any(weights.of(name) for sub in SUB_TERMS if sub.of is Labels for name in sub.names(""))


def is_read(part: str, weights: LossWeights, key: str = "") -> bool:
    """Whether a sub-term with a weight needs this part of a decoder's targets (see `Target.has`); without a key, of any
    decoder's."""
    return any(weights.of(name) for sub in SUB_TERMS if part in sub.needs for name in sub.names(key))


def wanted(batch: LossBatch, weights: LossWeights) -> Iterator[tuple[SubTerm, str, Labels | Pairs | Target]]:
    """Yield each sub-term that applies to the batch and has a weight, with the key (`""` for the labels) and the object
    it applies to."""
    things: list[tuple[str, Labels | Pairs | Target]] = [("", batch.labels)]
    for key, thing in (*things, *batch.pairs.items(), *batch.targets.items()):
        for sub in SUB_TERMS:
            applies = (
                isinstance(thing, sub.of) and thing.has.issuperset(sub.needs) and (len(thing.rows) or sub.everywhere)
            )
            if applies and any(weights.of(name) for name in sub.names(key)):
                yield sub, key, thing


def compute_losses(
    model: Composition,
    batch: LossBatch,
    reading: Reading,
    conditions: Mapping[str, Condition],
    generators: Mapping[str, list[Generator]] | None,
) -> dict[str, LossTerm]:
    """Compute every sub-term that has a weight, by full name; `generators` are `{decoder key: one generator
    per target}`."""
    batch.labels.reading = reading
    for key, target in batch.targets.items():
        target.condition, target.generator = conditions.get(key), (generators or {}).get(key)
        _ = target.dropped, target.reference  # dropout is the first draw from the generators
    losses: dict[str, LossTerm] = {}
    for sub, key, thing in wanted(batch, model.loss_weights):
        losses |= sum_by_term(sub.values(thing), thing.rows, batch.terms, sub.suffix(key), sub.terms)
    return losses


def count_losses(model: Composition, batch: Mapping[str, Any]) -> dict[str, int]:
    """Count what `forward` would sum in each sub-term, for a batch with injected features, without running the model.

    The training loop adds up the counts over micro-batches and ranks before the first backward of an update.
    """
    ids, labels, _ = model.write_codes(batch["input_ids"], batch.get("labels"), batch, needed=False)
    mask = batch.get("attention_mask")
    media = _is_one_of(ids, list((model.token_ids or {}).values()))
    labels = None if labels is None else labels.masked_fill(media, IGNORE)
    merged = Merged(ids.new_empty(0), ids, torch.ones_like(ids) if mask is None else mask, labels, media.any(dim=1))
    found = find_losses(model, merged, batch.get("decoder_targets"), model.trained_media(batch))
    counts: dict[str, int] = {}
    for sub, key, thing in wanted(found, model.loss_weights):
        nothing = torch.zeros(len(thing.rows), device=thing.rows.device)
        sums = sum_by_term(nothing, thing.rows, found.terms, sub.suffix(key), sub.terms)
        counts |= {name: term.count for name, term in sums.items()}
    return counts


def loss_names(model: Composition) -> list[str]:
    """Every sub-term that a batch can have, in a fixed order, so that processes can reduce them by index."""
    keys: dict[type, Iterable[str]] = {Labels: ("",), Pairs: model.encoder_keys, Target: model.decoder_keys}
    names = [name for sub in SUB_TERMS for key in keys[sub.of] for name in sub.names(key)]
    return list(dict.fromkeys([*names, *(f"reconstruction/tokenizer/{key}" for key in model.tokenizer_keys)]))
