"""Baselines of the matrix: the decoders conditioned on true captions, and on captions written by the model.

The upper bound gives the decoders true captions. The caption baseline replaces the learned link by text: the decoder's
own text encoder reads the model's description of its input, or of a text the request itself.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from anygpt.decoders.conditions import Condition
from anygpt.decoders.module import ModalDecoderModule
from anygpt.media.types import is_heard
from anygpt.model.multimodal import MultimodalModel
from anygpt.tokenizers.base import MediaTokenizer
from anygpt.tokenizers.module import ModalTokenizerModule
from anygpt.toyworld import language
from anygpt.toyworld.evaluation.answers import Judged, Settings, batches, judge_media, share
from anygpt.toyworld.render import SAMPLING_RATE, render
from anygpt.toyworld.world import MOTIONS, Thing

_MOVES = re.compile(rf"\s+(?:that\s+)?(?:moving|going|moves)\s+(?:{'|'.join(MOTIONS)})\b", re.IGNORECASE)


def upper_bound(
    model: MultimodalModel, things: Sequence[Thing], settings: Settings, progress: Callable[[int], object]
) -> dict[str, dict[str, Any]]:
    """`{output modality: share}` of right media for plain true captions; for clips also the share of right motions.

    A tokenizer is given renders in place of captions: decode(encode(render)).
    """
    result = {}
    for decoder in model.makers.values():
        rng, drawn = np.random.default_rng([settings.seed, 77]), []
        for number in range(settings.samples):
            thing = things[number % len(things)]
            motion = language.pick(rng, MOTIONS) if decoder.modality == "video" else None
            given = language.plain_caption(thing, motion)
            if isinstance(decoder, ModalTokenizerModule):
                given = render(decoder.modality, thing, motion, rng)
            drawn.append((given, thing, motion))
        result[decoder.modality] = _draw(decoder, drawn, settings, progress)
    return result


def caption_baseline(
    model: MultimodalModel, judged: Sequence[Judged], settings: Settings, progress: Callable[[int], object]
) -> dict[str, dict[str, dict[str, Any]]]:
    """`{input modality: {output modality: share}}` of right media, for the same requests as the matrix.

    The matrix's own answers in text (in `judged`) are the captions.
    """
    by_id = {one.request.id: one for one in judged}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for source in dict.fromkeys(one.request.source for one in judged):
        result[source] = {}
        for decoder in model.decoders.values():
            drawn, modality = [], decoder.modality
            for request in (o.request for o in judged if (o.request.source, o.request.target) == (source, modality)):
                caption = request.prompt
                if source != "text":
                    said = by_id[request.id.replace(f"-{modality}-", "-text-")].text
                    caption = moving_caption(said, request.motion)
                drawn.append((caption, request.thing, request.motion))
            result[source][modality] = _draw(decoder, drawn, settings, progress)
    return result


def moving_caption(caption: str, motion: str | None) -> str:
    """Replace the motion in a caption by the requested one.

    A full stop is kept, since a text encoder trained on sentences encodes a caption without one differently.
    """
    still = _MOVES.sub("", caption).strip()
    words = still.removesuffix(".")
    return words + (f" moving {motion}" if motion else "") + still[len(words) :]


def _draw(
    outer: ModalDecoderModule | ModalTokenizerModule,
    drawn: Sequence[tuple[Any, Thing, str | None]],
    settings: Settings,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Share of right media of a decoder under its own text encoder, or of a tokenizer, for (given, thing, motion)."""
    decoder, generator, media = outer.module, torch.Generator().manual_seed(settings.seed), []
    for batch in batches(drawn, settings.batch_size):
        given = [one for one, _, _ in batch]
        progress(len(batch))
        if isinstance(decoder, MediaTokenizer):
            given = [(one, SAMPLING_RATE) if is_heard(outer.modality) else one for one in given]
            media += decoder.decode(decoder.encode(given))
            continue
        condition = Condition.of(decoder.encode_text(given))
        options = outer.options({"generator": generator, **settings.sampling(outer.modality)})
        media += decoder.sample(condition, **decoder.sampling_arguments(options, [0] * len(batch)))
    found = list(zip(judge_media(outer.modality, media, decoder.rate), drawn, strict=True))
    result = share(verdict == (thing.shape, thing.colour) for (verdict, _), (_, thing, _) in found)
    if outer.modality == "video":
        result["motion"] = share(moves == motion for (_, moves), (_, _, motion) in found)
    return result
