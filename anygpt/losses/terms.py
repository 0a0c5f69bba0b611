"""The losses of a batch: which rows and spans feed which term, and how many things each term sums.

`compute_losses` and `count_losses` go through the same `LossRows`, so a training loop that counts before it computes
counts the same things. Formulas and denominators: `anygpt.losses.formulas`. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anygpt.decoders.base import Condition
from anygpt.errors import InputError
from anygpt.losses.formulas import TEXT, LossWeights, caption_alignment, info_nce, route, sum_by_term, token_nll
from anygpt.outputs import LossTerm
from anygpt.sequence.merging import IGNORE, Merged
from anygpt.sequence.signal_tokens import Spans

RECONSTRUCTED = ("vae", "vocoder")
"""Networks of a decoder that have a reconstruction loss."""


@dataclass
class LossRows:
    """Where a batch's losses are taken.

    Attributes:
        terms: the NLL term of each row.
        nll: rows and positions `(M,)` whose state predicts a label.
        spans: the signal spans of each decoder.
        pairs: `{encoder key: (P,)}` rows that hold both its features and what they are bound to.
    """

    terms: list[str]
    nll: tuple[Tensor, Tensor]
    spans: dict[str, Spans]
    pairs: dict[str, Tensor]


def label_positions(labels: Tensor | None, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and positions `(M,)` whose state predicts a label: position `s` predicts the label at `s + 1`.

    Nothing is predicted from padding: a row's first token has no loss, whether padding stands before it or not.
    """
    if labels is None:
        empty = torch.empty(0, dtype=torch.long, device=attention_mask.device)
        return empty, empty
    return ((labels[:, 1:] != IGNORE) & attention_mask[:, :-1].bool()).nonzero(as_tuple=True)


def _has_media(target: Mapping[str, Any]) -> bool:
    return target.get("media") is not None or target.get("posterior") is not None


class Objectives:
    """The losses, mixed into `MultimodalModel`."""

    def loss_rows(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None, media_in: Tensor) -> LossRows:
        """Find spans, labels and pairs in `(B, S)` merged ids, mask and labels.

        Labels on learned queries are left out: nothing says them.
        """
        spans = {key: self.signal_tokens.find_spans(input_ids, key) for key in self.signal_tokens.ids}
        pairs = self.bound_pairs(input_ids, labels)
        media_out = torch.zeros_like(media_in)
        for found in spans.values():
            media_out[found.rows] = True
        if not self.loss_weights.wants("nll"):
            labels = None
        if labels is not None and self.signal_tokens.query_ids:
            queries = torch.tensor(self.signal_tokens.query_ids, device=labels.device)
            labels = labels.masked_fill(torch.isin(input_ids, queries), IGNORE)
        return LossRows(route(media_in, media_out), label_positions(labels, attention_mask), spans, pairs)

    def bound_pairs(self, input_ids: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Rows that hold features of an encoder and what binds them; none unless the `encoder` term is wanted."""
        binding = self.loss_weights.binding
        if not self.loss_weights.encoder or self.token_ids is None:
            return {}
        known = (*self.token_ids, TEXT)
        if binding not in known:
            raise InputError(f"loss.binding is {binding!r}, which is no encoder; expected one of {', '.join(known)}")
        bound = self.features_in(input_ids, labels, binding).any(dim=1)
        others = {key: token for key, token in self.token_ids.items() if key != binding}
        return {key: (bound & (input_ids == token).any(dim=1)).nonzero()[:, 0] for key, token in others.items()}

    def features_in(self, input_ids: Tensor, labels: Tensor | None, key: str) -> Tensor:
        """`(B, S)`, where an encoder's features are, or, for `text`, what carries a label, signal tokens apart."""
        if key in self.token_ids:
            return input_ids == self.token_ids[key]
        if labels is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        signals = [i for span in self.signal_tokens.ids.values() for i in span]
        return (labels != IGNORE) & ~torch.isin(input_ids, torch.tensor(signals, device=input_ids.device))

    def compute_losses(
        self,
        merged: Merged,
        rows: LossRows,
        logits: Tensor | None,
        conditions: Mapping[str, Condition],
        targets: Mapping[str, Mapping[str, Any]],
        generators: Mapping[str, list[torch.Generator]],
    ) -> dict[str, LossTerm]:
        """Every sub-term that has a weight, each under the term of its row.

        Args:
            merged: the merged batch.
            rows: where its losses are taken.
            logits: `(B, S, V')`, or `(M, V')` at `rows.nll`.
            conditions: the projected condition of each decoder's spans.
            targets: see `MultimodalModel.forward`.
            generators: one a target, by decoder.
        """
        losses: dict[str, LossTerm] = {}
        if merged.labels is not None and self.loss_weights.wants("nll"):
            at, positions = rows.nll
            chosen = logits if logits.dim() == 2 else logits[at, positions]
            losses |= sum_by_term(token_nll(chosen, merged.labels[at, positions + 1]), at, rows.terms, "nll")
        for key, pairs in rows.pairs.items():
            # In training all processes meet here, those without pairs too; in evaluation they may have different
            # numbers of batches, and each takes its own.
            ours, bound = (self.pool_features(merged, pairs, k) for k in (key, self.loss_weights.binding))
            loss = info_nce(ours, bound, self.loss_weights.temperature, gather=self.training)
            if len(pairs):
                losses[f"encoder/info_nce/{key}"] = LossTerm(loss.sum(), len(pairs))
        for key, target in targets.items():
            self.check_targets(key, target, rows.spans)
            if len(rows.spans[key]):
                at, generator = rows.spans[key].rows, generators.get(key)
                losses |= self.decoder_losses(key, conditions.get(key), target, generator, at, rows.terms)
        return losses

    def decoder_losses(
        self,
        key: str,
        condition: Condition | None,
        target: Mapping[str, Any],
        generator: list[torch.Generator] | None,
        rows: Tensor,
        terms: list[str],
    ) -> dict[str, LossTerm]:
        """Caption alignment and denoising of one decoder's `K` targets, and what trains the decoder itself.

        Without a `condition` (no term reads the language model) only the latter.
        """
        decoder, weights = self.decoders[key].module, self.loss_weights
        losses: dict[str, LossTerm] = {}
        aligned = condition is not None and weights.wants("alignment", key)
        encoding = target.get("conditions")
        wanted = aligned or (weights.decoder and _has_media(target))
        if encoding is None and target.get("captions") is not None and wanted:
            captions = target["captions"]
            encoding = decoder.encode_text(captions if aligned else drop_captions(captions, weights, generator))
        if encoding is not None and aligned:
            encoding = Condition.of(encoding).to(condition.embeds.device)
            distance = caption_alignment(condition.embeds, encoding.embeds, weights.alignment_kind)
            losses |= sum_by_term(distance, rows, terms, f"alignment/{key}")
            if condition.pooled is not None:
                pooled = (condition.pooled[:, None], encoding.pooled[:, None])
                distance = caption_alignment(*pooled, weights.alignment_kind)
                losses |= sum_by_term(distance, rows, terms, f"pooled_alignment/{key}")
        if not _has_media(target):
            return losses
        if weights.reconstruction:
            for network, loss in decoder.reconstruction_losses(target["media"], generator).items():
                losses[f"reconstruction/{network}/{key}"] = LossTerm(loss.sum(), len(loss))
        denoised = condition is not None and weights.wants("denoising", key)
        if not (denoised or weights.decoder):
            return losses
        if target.get("posterior") is not None:
            latents = decoder.sample_posterior(*target["posterior"].to(decoder.device).unbind(1), generator)
        else:
            latents = decoder.encode_media(target["media"], generator=generator)
        if denoised:
            loss = decoder.denoising_loss(condition, latents, generator=generator, snr_gamma=weights.snr_gamma)
            losses |= sum_by_term(loss, rows, terms, f"denoising/{key}")
        if weights.decoder and encoding is not None:
            loss = decoder.denoising_loss(encoding, latents, generator=generator, snr_gamma=weights.snr_gamma)
            losses[f"decoder/denoising/{key}"] = LossTerm(loss.sum(), len(loss))
        return losses

    def pool_features(self, merged: Merged, rows: Tensor, key: str) -> Tensor:
        """`(P, H)`: the mean, in each of the rows, of an encoder's projected features, or of the answer's embeddings.

        The latter are what encoders are bound to; nothing trains them here.
        """
        labels = None if merged.labels is None else merged.labels[rows]
        held = self.features_in(merged.input_ids[rows], labels, key)[..., None]
        features = merged.inputs_embeds[rows].float()
        if key not in self.token_ids:
            features = features.detach()
        return (features * held).sum(dim=1) / held.sum(dim=1)

    def check_targets(self, key: str, target: Mapping[str, Any], spans: Mapping[str, Spans]) -> None:
        """Targets must be of a known decoder, and as many as its signal spans."""
        if key not in self.decoders:
            raise InputError(f"there are targets for {key!r}; the decoders are {list(self.decoder_keys)}")
        if key not in spans:
            raise InputError(
                f"there are targets for {key!r}, but the model does not know its signal tokens' ids; build the "
                "MultimodalProcessor with model=, or call model.signal_tokens.set_ids"
            )
        for name, values in target.items():
            if values is not None and len(values) != len(spans[key]):
                raise InputError(
                    f"the batch has {len(spans[key])} {key!r} signal spans but {len(values)} {name}; each span needs "
                    "one, in the order of the batch"
                )

    def count_losses(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """The denominators that `forward` would use for a batch of injected features, without running anything.

        A training loop adds them up over micro-batches and ranks before the first backward of an update.
        """
        ids, labels, weights = batch["input_ids"], batch.get("labels"), self.loss_weights
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        placeholders = torch.tensor(list((self.token_ids or {}).values()), dtype=ids.dtype, device=ids.device)
        media = torch.isin(ids, placeholders)
        rows = self.loss_rows(
            ids, mask, None if labels is None else labels.masked_fill(media, IGNORE), media.any(dim=1)
        )
        found = [("nll", rows.nll[0])]
        counts = {f"encoder/info_nce/{key}": len(pairs) for key, pairs in rows.pairs.items() if len(pairs)}
        for key, target in (batch.get("decoder_targets") or {}).items():
            at = rows.spans[key].rows
            has_caption = any(target.get(name) is not None for name in ("captions", "conditions"))
            has_media = _has_media(target)
            if has_caption and weights.wants("alignment", key):
                found.append((f"alignment/{key}", at))
                if self.decoders[key].module.pooled_dim is not None:
                    found.append((f"pooled_alignment/{key}", at))
            if has_media and weights.wants("denoising", key):
                found.append((f"denoising/{key}", at))
            if has_media and weights.reconstruction and len(at):
                networks = [name for name in RECONSTRUCTED if name in self.decoders[key].module.trains]
                counts |= {f"reconstruction/{network}/{key}": len(at) for network in networks}
            if has_media and has_caption and weights.decoder and len(at):
                counts[f"decoder/denoising/{key}"] = len(at)
        for suffix, at in found:
            zeros = torch.zeros(len(at), device=at.device)
            counts |= {name: term.count for name, term in sum_by_term(zeros, at, rows.terms, suffix).items()}
        return counts

    def loss_names(self) -> list[str]:
        """Every sub-term that a batch can have, in a fixed order: processes add them up by place."""
        kinds = ("alignment", "pooled_alignment", "denoising")
        subs = [f"{sub}/{key}" for key in self.decoder_keys for sub in kinds]
        names = [
            f"{term}/{sub}"
            for term in ("llm", "encoder_llm", "llm_decoder", "encoder_decoder")
            for sub in ("nll", *subs)
        ]
        names += [f"encoder/info_nce/{key}" for key in self.encoder_keys]
        names += [f"reconstruction/{network}/{key}" for key in self.decoder_keys for network in RECONSTRUCTED]
        return names + [f"decoder/denoising/{key}" for key in self.decoder_keys]


def drop_captions(captions: list[str], weights: LossWeights, generators: list[torch.Generator] | None) -> list[str]:
    """The captions, each made empty with the chance `weights.caption_dropout`, drawn from its target's generator."""
    if not weights.caption_dropout:
        return captions
    draws = [torch.rand((), generator=g).item() for g in generators or [None] * len(captions)]
    return ["" if draw < weights.caption_dropout else text for text, draw in zip(captions, draws, strict=True)]
