"""Loss formulas and weights, the routing of rows to the terms, and what training leaves out at random.

A run's loss is `L = Σ wᵢ Lᵢ` over the sub-terms of `SUB_TERMS` (arXiv 2309.05519, §4, and its recipe's six-term sum).
Each row of a batch feeds exactly one of the four `TERMS`; `encoder`, `decoder` and `reconstruction` train parts, with
weight 0 by default. `pooled_alignment` and `mask_alignment`, of decoders with a pooled condition or padding in it, have
the weight of `alignment`. Denominators: label tokens for `nll`, those of rows of `llm` for `retention`, pairs for
`info_nce`, samples for the others, counted over the rows of all four terms; logs show each term's own mean. Shape
legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Generator, Tensor

from anygpt.composition import Composition
from anygpt.errors import InputError
from anygpt.outputs import LossTerm
from anygpt.sequence.merging import IGNORE

TERMS = ("llm", "encoder_llm", "llm_decoder", "encoder_decoder")
"""Terms that rows are routed to: rows without media, with media in, with media out, with both."""
MEDIA_OUT = TERMS[2:]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TEXT = "text"  # value of `binding` that stands for no encoder


@dataclass
class LossWeights:
    """Weights by term, sub-term and modality; the weight of a logged loss is their product.

    A sub-term of weight zero is not computed.

    Attributes:
        llm: NLL of rows without media.
        encoder_llm: NLL of the answer given the media (stage 1).
        llm_decoder, encoder_decoder: all sub-terms of rows that turn text (stage 2), or media (stage 3), into media.
        encoder: InfoNCE between the encoders' pooled features and those of `binding`, over rows that hold both.
        decoder: denoising under the decoder's own text encoding.
        reconstruction: of the decoders' VAEs and vocoders, and of tokenizers, where they train (stage 0).
        nll: next-token negative log-likelihood, text and signal tokens alike.
        retention: KL divergence of the language model with its adapters from itself without them, in rows of text alone
            (learning without forgetting, arXiv 1606.09282, with the model's whole distribution).
        alignment: distance between the projected condition and the decoder's own encoding of the caption.
        denoising: the frozen decoder's denoising loss under the projected condition.
        by_modality: factors on decoders' sub-terms by key (not on encoders' `info_nce`); 1 by default.
        alignment_kind: `l2`, `mse` or `cosine`.
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556); None turns it off.
        caption_dropout: share of captions that `decoder` replaces by the empty one, and of answers with codes that are
            trained without all that precedes the codes, for classifier-free guidance (arXiv 2207.12598).
        reference_dropout: share of references that `decoder` drops, where it edits (arXiv 2211.09800, §3.2).
        latents: whether denoising learns samples of the VAE's posterior, or its `mode`, without the posterior's noise.
        media_weight: factor on the NLL of codes.
        label_smoothing: ε of the NLL: (1 − ε) of it, and ε of the mean over all tokens that can be generated.
        binding: what the other encoders are contrasted with: an encoder key, as images in ImageBind (arXiv 2305.05665),
            or `text`, the mean token embedding of the answer (labelled tokens other than signal tokens).
        temperature: of InfoNCE; the default is ImageBind's.
    """

    llm: Weight = 1.0
    encoder_llm: Weight = 1.0
    llm_decoder: Weight = 1.0
    encoder_decoder: Weight = 1.0
    encoder: Weight = 0.0
    decoder: Weight = 0.0
    reconstruction: Weight = 0.0
    nll: Weight = 1.0
    retention: Weight = 0.0
    alignment: Weight = 1.0
    denoising: Weight = 1.0
    by_modality: dict[str, Weight] = field(default_factory=dict)
    alignment_kind: Literal["l2", "mse", "cosine"] = "l2"
    snr_gamma: PositiveFloat | None = None
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    reference_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    latents: Literal["samples", "mode"] = "samples"
    media_weight: Weight = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    binding: str = "image"
    temperature: PositiveFloat = 0.07

    def of(self, name: str) -> float:
        """The weight of `"<term>/<sub-term>[/<modality>]"`."""
        term, sub, *modality = name.split("/")
        weight = getattr(self, term)
        if term in TERMS:
            sub = "alignment" if sub.endswith("_alignment") else sub  # of a pooled condition, or a mask
            weight *= getattr(self, sub)
        return weight * self.by_modality.get(modality[0], 1.0) if modality and term != "encoder" else weight

    @property
    def wants_language_model(self) -> bool:
        return any(getattr(self, term) for term in TERMS)

    def wants(self, sub: str, modality: str | None = None) -> bool:
        """Whether any term gives this sub-term a weight; only terms with media out have sub-terms by modality."""
        terms, suffix = (TERMS, sub) if modality is None else (MEDIA_OUT, f"{sub}/{modality}")
        return any(self.of(f"{term}/{suffix}") for term in terms)


def route(media_in: Tensor, media_out: Tensor) -> list[str]:
    """The term that each row feeds, by whether it holds encoder features and a signal span, `(B,)` bool each."""
    return [TERMS[given + 2 * made] for given, made in zip(media_in.tolist(), media_out.tolist(), strict=True)]


def token_nll(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of each label in fp32: `(M, V')` logits and `(M,)` labels give `(M,)`.

    Label smoothing (arXiv 1512.00567) leaves out tokens with the lowest finite logit, which are never generated.
    """
    nll = F.cross_entropy(logits.float(), labels, reduction="none")
    if not smoothing:
        return nll
    never = logits == torch.finfo(logits.dtype).min
    log_p = logits.float().log_softmax(dim=-1).masked_fill(never, 0)
    return (1 - smoothing) * nll - smoothing * log_p.sum(dim=-1) / (~never).sum(dim=-1)


def kl_divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q) over the tokens, in fp32: `(M, V')` logits of p and of q give `(M,)`."""
    log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (before, now))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def caption_alignment(condition: Tensor, target: Tensor, kind: str = "l2", real: Tensor | None = None) -> Tensor:
    """Distance `(K,)` of each sample's projected condition from the decoder's text encoding, `(K, T, D)` each, in fp32.

    `l2` is the mean over the `T` condition tokens of ‖projected − encoding‖₂ (NExT-GPT, §4.2), `mse` the mean squared
    difference over `T` and `D`, `cosine` the mean over `T` of 1 − cos. Padding of the target is left out: with dₜ the
    distance at token t and mₜ = 1 for `real` tokens `(K, T)`, 0 for padding, the loss is Σₜ mₜ·dₜ / Σₜ mₜ. Shapes that
    differ are an `InputError`, and so is another `kind`.
    """
    if condition.shape != target.shape:
        raise InputError(
            f"the projected condition has shape {tuple(condition.shape)} and the decoder's text encoding "
            f"{tuple(target.shape)}; the output projector must be built for this decoder's condition_shape"
        )
    condition, target = condition.float(), target.float()
    if kind == "l2":  # √Σx² would have a NaN gradient at zero
        distance = torch.linalg.vector_norm(condition - target, dim=-1)
    elif kind == "mse":
        distance = (condition - target).square().mean(dim=-1)
    elif kind == "cosine":
        distance = 1 - F.cosine_similarity(condition, target, dim=-1)
    else:
        raise InputError(f"unknown caption alignment {kind!r}; expected one of l2, mse, cosine")
    if real is None:
        return distance.mean(dim=-1)
    return distance.masked_fill(~real, 0).sum(dim=-1) / real.sum(dim=-1)


def sum_by_term(
    values: Tensor, rows: Tensor, terms: list[str], suffix: str, known: Sequence[str] = TERMS
) -> dict[str, LossTerm]:
    """Sum per-token or per-sample values `(M,)` float32, of the batch rows `(M,)` int64, by the term of their row.

    `suffix` is the rest of the name, such as `nll` or `alignment/image`; `known` are the terms to sum by. If there are
    none, all values are summed under `suffix`.
    """
    groups = {f"{term}/{suffix}": [name == term for name in terms] for term in known} or {suffix: [True] * len(terms)}
    sums: dict[str, LossTerm] = {}
    for name, members in groups.items():
        chosen = values[torch.tensor(members, device=values.device)[rows]]
        if len(chosen):
            sums[name] = LossTerm(chosen.sum(), len(chosen))
    return sums


def dropped(share: float, count: int, generators: list[Generator] | None) -> list[bool]:
    """Whether to drop each of `count` targets' conditions, with probability `share`, drawn from its generator."""
    return [bool(share) and torch.rand((), generator=g).item() < share for g in generators or [None] * count]


def hide_conditions(
    model: Composition,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    generators: Mapping[str, list[Generator]] | None,
) -> Tensor | None:
    """Mask all but the codes of a share `caption_dropout` of the rows `(B, S)` that answer with codes, in training.

    Nothing is learned from these rows' texts. A row's draw is from the generator of its first medium.
    """
    share, signals = model.loss_weights.caption_dropout, model.signal_tokens
    if not (share and model.training and labels is not None and model.tokenizer_keys):
        return attention_mask
    draws, codes = torch.ones_like(input_ids, dtype=torch.float32), torch.zeros_like(input_ids, dtype=torch.bool)
    for key in model.tokenizer_keys:
        begins = (labels == signals.ids[key][0]) & (input_ids == labels)
        own = (generators or {}).get(key) or [None] * int(begins.sum())
        draws[begins] = draws.new_tensor([torch.rand((), generator=g).item() for g in own])
        codes |= (labels != IGNORE) & (signals.row_of(input_ids, key) >= 0)
    first = (draws < 1).int().argmax(dim=1, keepdim=True)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return torch.where(draws.gather(1, first) < share, mask * codes, mask)


def denominators(counts: Mapping[str, float]) -> dict[str, float]:
    """The denominator of each sub-term: the count of its kind over the rows of all terms.

    The NLL is thus one mean over all label tokens, as in transformers, and one short row of text does not weigh as
    much as all rows with media together.
    """
    parted = {name: name.partition("/") for name in counts}
    kinds = {name: sub if term in TERMS else name for name, (term, _, sub) in parted.items()}
    return {name: sum(n for other, n in counts.items() if kinds[other] == kind) for name, kind in kinds.items()}


def weighted_total(
    losses: Mapping[str, LossTerm], weights: LossWeights, counts: Mapping[str, float] | None = None
) -> Tensor | None:
    """`Σ w · sum / denominator` of a micro-batch's terms, or None if no term has a weight.

    With the `counts` of the whole update, over all micro-batches and ranks, in place of the micro-batch's own, the
    value does not depend on how the update is split.
    """
    divisors = denominators({name: term.count for name, term in losses.items()} | dict(counts or {}))
    parts = [weights.of(name) * term.total / divisors[name] for name, term in losses.items() if weights.of(name)]
    return sum(parts[1:], parts[0]) if parts else None
