"""Baselines of the matrix: the decoders conditioned on true captions, and on captions written by the model.

The upper bound gives the decoders true captions. The caption baseline replaces the learned link by text: the model
describes its input in words, and the decoder's own text encoder reads the description. For text inputs the request
itself is the caption.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from anygpt.decoders.conditions import Condition
from anygpt.evaluation.statistics import share
from anygpt.model.multimodal import MultimodalModel
from anygpt.toyworld import language
from anygpt.toyworld.evaluation.answers import Judged, Settings, batches, is_thing, judge_media
from anygpt.toyworld.judges import Judges
from anygpt.toyworld.world import MOTIONS, Thing

_MOVES = re.compile(rf"\s+(?:that\s+)?(?:moving|going|moves)\s+(?:{'|'.join(MOTIONS)})\b", re.IGNORECASE)


def upper_bound(
    model: MultimodalModel,
    things: Sequence[Thing],
    settings: Settings,
    judges: Judges,
    sampling_rate: int,
    progress: Callable[[int], object],
) -> dict[str, dict[str, Any]]:
    """`{output modality: share}` of right media for plain true captions; for clips also the share of right motions."""
    result = {}
    for modality in (decoder.modality for decoder in model.decoders.values()):
        rng = np.random.default_rng([settings.seed, 77])
        shown = [things[i % len(things)] for i in range(settings.samples)]
        motions = [language.pick(rng, MOTIONS) if modality == "video" else None for _ in shown]
        captions = [language.plain_caption(thing, motion) for thing, motion in zip(shown, motions, strict=True)]
        result[modality] = _judged(model, modality, captions, shown, motions, settings, judges, sampling_rate, progress)
    return result


def caption_baseline(
    model: MultimodalModel,
    judged: Sequence[Judged],
    settings: Settings,
    judges: Judges,
    sampling_rate: int,
    progress: Callable[[int], object],
) -> dict[str, dict[str, dict[str, Any]]]:
    """`{input modality: {output modality: share}}` of right media, for the same requests as the matrix.

    Args:
        judged: the matrix's answers; text answers to media are used as captions.
    """
    by_id = {one.request.id: one for one in judged}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for source in dict.fromkeys(one.request.source for one in judged):
        result[source] = {}
        for modality in (decoder.modality for decoder in model.decoders.values()):
            requests = [o.request for o in judged if (o.request.source, o.request.target) == (source, modality)]
            captions = []
            for request in requests:
                if source == "text":
                    captions.append(request.prompt)
                else:
                    said = by_id[request.id.replace(f"-{modality}-", "-text-")].text
                    captions.append(moving_caption(said, request.motion))
            shown, motions = [r.thing for r in requests], [r.motion for r in requests]
            result[source][modality] = _judged(
                model, modality, captions, shown, motions, settings, judges, sampling_rate, progress
            )
    return result


def moving_caption(caption: str, motion: str | None) -> str:
    """Replace the motion in a caption by the requested one.

    A full stop is kept, since a text encoder trained on sentences encodes a caption without one differently.
    """
    still = _MOVES.sub("", caption).strip()
    words = still.removesuffix(".")
    return words + (f" moving {motion}" if motion else "") + still[len(words) :]


def _judged(
    model: MultimodalModel,
    modality: str,
    captions: Sequence[str],
    things: Sequence[Thing],
    motions: Sequence[str | None],
    settings: Settings,
    judges: Judges,
    sampling_rate: int,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Share of right media that a decoder generates from captions through its own text encoder."""
    outer = next(d for d in model.decoders.values() if d.modality == modality)
    decoder = outer.module
    generator = torch.Generator().manual_seed(settings.seed)
    media: list[Any] = []
    for batch in batches(captions, settings.batch_size):
        condition = Condition.of(decoder.encode_text(list(batch)))
        options = outer.options({"generator": generator, **settings.sampling(modality)})
        media += decoder.sample(condition, **decoder.sampling_arguments(options, [0] * len(batch)))
        progress(len(batch))
    verdicts = judge_media(modality, media, judges, sampling_rate)
    result = share(is_thing(verdict, thing) for verdict, thing in zip(verdicts, things, strict=True))
    if modality == "video":
        result["motion"] = share(a == b for a, b in zip(judges.motion(media), motions, strict=True))
    return result
