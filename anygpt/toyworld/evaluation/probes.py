"""Linear probes of encoders.

Shapes: `M` media, `D` width of an encoder's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anygpt.errors import InputError
from anygpt.evaluation.statistics import share
from anygpt.model.multimodal import MultimodalModel
from anygpt.processing.processor import MultimodalProcessor
from anygpt.toyworld import language
from anygpt.toyworld.evaluation.answers import batches
from anygpt.toyworld.render import SAMPLING_RATE, render
from anygpt.toyworld.world import COLOURS, HELD_OUT, MODALITIES, MOTIONS, SEEN, SHAPES

PROPERTIES = {"shape": SHAPES, "colour": COLOURS}
_BATCH = 128


def probe_encoders(
    model: MultimodalModel, processor: MultimodalProcessor, renders: int, fresh: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Fit linear probes, and return `{encoder key: {"shape": share, "colour": share}}` on held-out things.

    Args:
        renders: per seen thing, for fitting.
        fresh: per held-out thing, for testing.
        seed: of the renders.

    Raises:
        InputError: the model has no encoder of images, videos or audio.
    """
    keys = {key: encoder.modality for key, encoder in model.encoders.items() if encoder.modality in MODALITIES}
    if not keys:
        raise InputError("the model has no encoder of images, videos or audio to probe")
    found: dict[str, dict[str, Any]] = {}
    for key, modality in keys.items():
        sets = []
        for number, (things, count) in enumerate(((SEEN, renders), (HELD_OUT, fresh))):
            rng = np.random.default_rng([seed, 4, MODALITIES.index(modality), number])
            shown = [thing for thing in things for _ in range(count)]
            media = []
            for thing in shown:
                medium = render(modality, thing, language.pick(rng, MOTIONS) if modality == "video" else None, rng)
                media.append((medium, SAMPLING_RATE) if modality == "audio" else medium)
            sets.append((pooled_features(model, processor, key, media), shown))
        (features, seen), (new_features, held_out) = sets
        found[key] = {}
        for name, values in PROPERTIES.items():
            labels, expected = (
                torch.tensor([values.index(getattr(thing, name)) for thing in things]) for things in (seen, held_out)
            )
            given = fit_probe(features, labels, len(values))(new_features).argmax(-1)
            found[key][name] = share((given == expected).tolist())
    return found


@torch.inference_mode()
def pooled_features(model: MultimodalModel, processor: MultimodalProcessor, key: str, media: Sequence[Any]) -> Tensor:
    """The mean of the features of each medium that an encoder's projector gets, `(M, D)`."""
    encoder, pooled = model.encoders[key], []
    for batch in batches(media, _BATCH):
        data = processor.process_media(processor.arrange_media((encoder.modality, one) for one in batch))[0]
        own = {name.removeprefix(f"{key}."): value for name, value in data.items()}
        moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in own.items()}
        pooled += [features.float().mean(0).cpu() for features in encoder.encode(moved)]
    return torch.stack(pooled)


def fit_probe(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-4) -> nn.Module:
    """Fit logistic regression on standardised features, `(M, D)` with labels `(M,)`, to convergence."""
    features = features.clone()  # leaves inference mode
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    line = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(line.weight)
    nn.init.zeros_(line.bias)
    optimizer = torch.optim.LBFGS(line.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(line((features - mean) / std), labels) + decay * line.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        line.weight /= std
        line.bias -= line.weight @ mean
    return line.requires_grad_(False)
