"""The sub-terms of the loss, each declared once in `SUB_TERMS` with its name, rows, requirements and formula.

Counting, naming, weighting and computing all iterate over that list. Formulas, weights and the table of terms:
`anygpt.losses.formulas`. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from anygpt.composition import Composition, Reading
from anygpt.decoders.conditions import Condition
from anygpt.losses.batch import Labels, LossBatch, Pairs, Target, find_losses
from anygpt.losses.formulas import MEDIA_OUT, TERMS, LossWeights, sum_by_term
from anygpt.outputs import LossTerm
from anygpt.sequence.merging import IGNORE, Merged


@dataclass(frozen=True)
class SubTerm:
    """One declared sub-term.

    Attributes:
        name: logged as `<term of the row>/<name>[/<key>]`, or as `<name>/<key>` where `name` includes the term.
        of: the class it applies to: `Labels` of a batch, `Pairs` of an encoder or `Target` of a decoder.
        values: computes one value a row of such an object, `(M,)` float32.
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


SUB_TERMS = (
    SubTerm("nll", Labels, Labels.nll, TERMS),
    SubTerm("encoder/info_nce", Pairs, Pairs.info_nce, everywhere=True),
    SubTerm("alignment", Target, Target.alignment, MEDIA_OUT, needs=("captions",)),
    SubTerm("pooled_alignment", Target, Target.pooled_alignment, MEDIA_OUT, needs=("captions", "pooled")),
    SubTerm("mask_alignment", Target, Target.mask_alignment, MEDIA_OUT, needs=("captions", "mask")),
    SubTerm("reconstruction/vae", Target, lambda target: target.reconstructions["vae"], needs=("media", "vae")),
    SubTerm(
        "reconstruction/vocoder", Target, lambda target: target.reconstructions["vocoder"], needs=("media", "vocoder")
    ),
    SubTerm("denoising", Target, lambda target: target.denoising(target.condition), MEDIA_OUT, needs=("media",)),
    SubTerm("decoder/denoising", Target, lambda target: target.denoising(target.encoding), needs=("captions", "media")),
)
"""In the order of computation, which fixes the order of draws from a target's generator."""


def wanted(batch: LossBatch, weights: LossWeights) -> Iterator[tuple[SubTerm, str, Labels | Pairs | Target]]:
    """Yield each sub-term that applies to the batch and has a weight, with the key and the object it applies to."""
    for key, thing in batch:
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
    """Compute every sub-term that has a weight, by full name.

    Args:
        batch, reading: what `find_losses` found, and the language model's output for it.
        conditions: the projected condition of each decoder's spans.
        generators: `{decoder key: one generator a target}`.
    """
    batch.labels.reading = reading
    for key, target in batch.targets.items():
        target.condition, target.generator = conditions.get(key), (generators or {}).get(key)
        _ = target.captions  # caption dropout is the first draw from the generators
    losses: dict[str, LossTerm] = {}
    for sub, key, thing in wanted(batch, model.loss_weights):
        losses |= sum_by_term(sub.values(thing), thing.rows, batch.terms, sub.suffix(key), sub.terms)
    return losses


def count_losses(model: Composition, batch: Mapping[str, Any]) -> dict[str, int]:
    """Count what `forward` would sum in each sub-term, for a batch with injected features, without running the model.

    A training loop adds the counts up over micro-batches and ranks before the first backward of an update.
    """
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    placeholders = torch.tensor(list((model.token_ids or {}).values()), dtype=ids.dtype, device=ids.device)
    media = torch.isin(ids, placeholders)
    labels = None if labels is None else labels.masked_fill(media, IGNORE)
    merged = Merged(ids.new_empty(0), ids, torch.ones_like(ids) if mask is None else mask, labels, media.any(dim=1))
    found = find_losses(model, merged, batch.get("decoder_targets"))
    counts: dict[str, int] = {}
    for sub, key, thing in wanted(found, model.loss_weights):
        nothing = torch.zeros(len(thing.rows), device=thing.rows.device)
        sums = sum_by_term(nothing, thing.rows, found.terms, sub.suffix(key), sub.terms)
        counts |= {name: term.count for name, term in sums.items()}
    return counts


def loss_names(model: Composition) -> list[str]:
    """Every sub-term that a batch can have, in a fixed order, so that processes can reduce them by index."""
    keys: dict[type, Iterable[str]] = {Labels: ("",), Pairs: model.encoder_keys, Target: model.decoder_keys}
    return [name for sub in SUB_TERMS for key in keys[sub.of] for name in sub.names(key)]
