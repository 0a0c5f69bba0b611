"""The losses, each as a sum and a count, and the routing of rows to the six terms.

A run's loss is `L = Σ wᵢ Lᵢ` over the terms below (arXiv 2309.05519, §4, and its recipe's six-term sum). A row of a
batch feeds exactly one NLL term, by what stands in it:

=================  ===================  =======================================================
term               rows                 sub-terms
=================  ===================  =======================================================
`llm`              text in, text out    `nll`
`encoder_llm`      media in, text out   `nll`
`llm_decoder`      text in, media out   `nll`, `alignment/<decoder>`, `denoising/<decoder>`
`encoder_decoder`  media in, media out  `nll`, `alignment/<decoder>`, `denoising/<decoder>`
=================  ===================  =======================================================

Two terms train parts that the stages freeze, and have weight zero unless a config gives them one:

- `encoder`: `info_nce/<encoder>`, over rows that hold that encoder's input and what it is bound to;
- `decoder`: `denoising/<decoder>`, every target under the decoder's own encoding of its caption.

Stage 0, which makes parts, has a seventh: `reconstruction/<network>/<decoder>`, of VAEs and vocoders.

Decoders with a pooled condition have `pooled_alignment/<decoder>` beside `alignment`, with its weight. Denominators:
label tokens for `nll`, pairs for `info_nce`, samples for the others, each over the rows of all four terms; in the logs
each term stands by its own mean. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from anygpt.errors import InputError
from anygpt.outputs import LossTerm

TERMS = ("llm", "encoder_llm", "llm_decoder", "encoder_decoder")  # those that rows are routed to
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ALIGNMENTS = ("l2", "mse", "cosine")
TEXT = "text"  # what `binding` names in place of an encoder


@dataclass
class LossWeights:
    """The weight of each term, of each sub-term, and of each modality; a sub-term's weight is their product.

    A sub-term of weight zero is not computed at all.

    Attributes:
        llm: NLL of rows without media.
        encoder_llm: NLL of the answer given the media (stage 1).
        llm_decoder: all sub-terms of rows that turn text into media (stage 2).
        encoder_decoder: all sub-terms of rows that turn media into media (stage 3).
        encoder: InfoNCE between the encoders' pooled features and those of `binding`.
        decoder: denoising under the decoder's own text encoding.
        reconstruction: of the decoders' VAEs and vocoders, where they train (stage 0).
        caption_dropout: share of captions that `decoder` replaces by the empty one, so that the denoiser learns what
            guidance needs (arXiv 2207.12598).
        nll: next-token negative log-likelihood, text and signal tokens alike.
        alignment: distance between the projected condition and the decoder's own encoding of the caption.
        denoising: the frozen decoder's denoising loss under the projected condition.
        others: weights of sub-terms that have no field here, by name.
        by_modality: factor on the alignment and denoising of one decoder key; 1 where not named.
        alignment_kind: `l2`, `mse` or `cosine`.
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556); none by default.
        binding: what encoders are bound to: one of them, as images in ImageBind (arXiv 2305.05665), or `text`, the mean
            of the language model's embeddings of the answer (all that carries a label but signal tokens), in the place
            of CLIP's text encoder.
        temperature: of InfoNCE; ImageBind's.
    """

    llm: Weight = 1.0
    encoder_llm: Weight = 1.0
    llm_decoder: Weight = 1.0
    encoder_decoder: Weight = 1.0
    encoder: Weight = 0.0
    decoder: Weight = 0.0
    reconstruction: Weight = 0.0
    nll: Weight = 1.0
    alignment: Weight = 1.0
    denoising: Weight = 1.0
    others: dict[str, Weight] = field(default_factory=dict)
    by_modality: dict[str, Weight] = field(default_factory=dict)
    alignment_kind: Literal["l2", "mse", "cosine"] = "l2"
    snr_gamma: PositiveFloat | None = None
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    binding: str = "image"
    temperature: PositiveFloat = 0.07

    def of(self, name: str) -> float:
        """The weight of `"<term>/<sub-term>[/<modality>]"`."""
        term, sub, *modality = name.split("/")
        weight = getattr(self, term)
        if term in TERMS:
            weight *= getattr(self, sub) if hasattr(self, sub) else self.others.get(sub, 0.0)
        return weight * self.by_modality.get(modality[0], 1.0) if modality else weight

    @property
    def pooled_alignment(self) -> float:
        """A pooled condition is aligned with the weight of the others."""
        return self.alignment

    @property
    def wants_media(self) -> bool:
        """Whether any sub-term looks at the targets themselves, and not only at their captions."""
        return bool(
            self.decoder or self.reconstruction or (self.denoising and (self.llm_decoder or self.encoder_decoder))
        )

    @property
    def wants_language_model(self) -> bool:
        """Whether any sub-term reads the language model's states."""
        return any(getattr(self, term) for term in TERMS)

    def wants(self, sub: str, modality: str | None = None) -> bool:
        """Whether any term uses this sub-term; only some terms have those with a modality."""
        if modality is None:
            return any(self.of(f"{term}/{sub}") for term in TERMS)
        return any(self.of(f"{term}/{sub}/{modality}") for term in ("llm_decoder", "encoder_decoder"))


def route(media_in: Tensor, media_out: Tensor) -> list[str]:
    """The term that each row feeds.

    Args:
        media_in: `(B,)` bool, whether encoder features stand in the row.
        media_out: `(B,)` bool, whether a signal span stands in the row.
    """
    names = {
        (False, False): "llm",
        (True, False): "encoder_llm",
        (False, True): "llm_decoder",
        (True, True): "encoder_decoder",
    }
    return [names[pair] for pair in zip(media_in.tolist(), media_out.tolist(), strict=True)]


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in fp32: `(M, V')` logits and `(M,)` labels give `(M,)`."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def caption_alignment(condition: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Distance between a projected condition and the decoder's text encoding, by sample, in fp32.

    `l2` is the mean over the `T` condition tokens of ‖projected − encoding‖₂ (NExT-GPT, §4.2), `mse` the mean
    squared difference over `T` and `D`, `cosine` the mean over `T` of 1 − cos.

    Args:
        condition, target: `(K, T, D)`.

    Returns:
        `(K,)` float32. `torch.linalg.vector_norm` is used because √Σx² has a NaN gradient at zero.
    """
    if condition.shape != target.shape:
        raise InputError(
            f"the projected condition has shape {tuple(condition.shape)} and the decoder's text encoding "
            f"{tuple(target.shape)}; the output projector must be built for this decoder's condition_shape"
        )
    condition, target = condition.float(), target.float()
    if kind == "l2":
        return torch.linalg.vector_norm(condition - target, dim=-1).mean(dim=-1)
    if kind == "mse":
        return (condition - target).square().mean(dim=(-2, -1))
    if kind == "cosine":
        return (1 - F.cosine_similarity(condition, target, dim=-1)).mean(dim=-1)
    raise InputError(f"unknown caption alignment {kind!r}; expected one of {', '.join(ALIGNMENTS)}")


def sum_by_term(values: Tensor, rows: Tensor, terms: list[str], suffix: str) -> dict[str, LossTerm]:
    """Add up per-token or per-sample values under the term of the row that each belongs to.

    Args:
        values: `(M,)` float32.
        rows: `(M,)` int64, the batch row of each value.
        terms: the term of each row.
        suffix: the rest of the name, `nll` or `alignment/image`.
    """
    sums: dict[str, LossTerm] = {}
    for term in TERMS:
        members = torch.tensor([name == term for name in terms], device=values.device)[rows]
        count = int(members.sum())
        if count:
            sums[f"{term}/{suffix}"] = LossTerm(values[members].sum(), count)
    return sums


def denominators(counts: Mapping[str, float]) -> dict[str, float]:
    """What each sub-term is divided by: how many things of its kind there are in all rows, whatever their term.

    So the NLL is one mean over all label tokens, as transformers takes it, and one short row of text does not weigh as
    much as all rows with media together.
    """
    kinds = {name: name.partition("/")[2] if name.partition("/")[0] in TERMS else name for name in counts}
    return {name: sum(n for other, n in counts.items() if kinds[other] == kind) for name, kind in kinds.items()}


def weighted_total(
    losses: Mapping[str, LossTerm], weights: LossWeights, counts: Mapping[str, float] | None = None
) -> Tensor | None:
    """`Σ w · sum / denominator`, without touching the terms themselves.

    Args:
        losses: the terms of this micro-batch.
        weights: their weights, which multiply their shares of the sum.
        counts: how many things each sums. A training loop gives the counts of the whole update, over all
            micro-batches and ranks, so that the value does not depend on how the update was split; without them the
            micro-batch's own counts are used.
    """
    divisors = denominators({name: term.count for name, term in losses.items()} | dict(counts or {}))
    parts = [weights.of(name) * term.total / divisors[name] for name, term in losses.items() if weights.of(name)]
    return sum(parts[1:], parts[0]) if parts else None
