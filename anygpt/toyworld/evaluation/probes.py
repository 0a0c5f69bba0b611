"""Linear probes of encoders.

Shapes: `M` media, `D` width of an encoder's features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anygpt.model.multimodal import MultimodalModel
from anygpt.processing.processor import MultimodalProcessor
from anygpt.toyworld import language
from anygpt.toyworld.evaluation.answers import batches
from anygpt.toyworld.evaluation.formatting import share
from anygpt.toyworld.render import SAMPLING_RATE, render
from anygpt.toyworld.world import COLOURS, HELD_OUT, MODALITIES, MOTIONS, SEEN, SHAPES

PROPERTIES = {"shape": SHAPES, "colour": COLOURS}


def probe_encoders(
    model: MultimodalModel, processor: MultimodalProcessor, renders: int, fresh: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Fit linear probes, and return `{encoder key: {"shape": share, "colour": share}}` on held-out things.

    They are fitted on `renders` of each seen thing, and tested on `fresh` ones of each held-out thing.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, modality in ((key, encoder.modality) for key, encoder in model.encoders.items()):
        features, shown = [], []
        for number, (things, count) in enumerate(((SEEN, renders), (HELD_OUT, fresh))):
            rng = np.random.default_rng([seed, 4, MODALITIES.index(modality), number])
            shown.append([thing for thing in things for _ in range(count)])
            media = []
            for thing in shown[-1]:
                medium = render(modality, thing, language.pick(rng, MOTIONS) if modality == "video" else None, rng)
                media.append((medium, SAMPLING_RATE) if modality == "audio" else medium)
            features.append(pooled_features(model, processor, key, media))
        found[key] = {}
        for name, values in PROPERTIES.items():
            labels, expected = (torch.tensor([values.index(getattr(t, name)) for t in things]) for things in shown)
            given = fit_probe(features[0], labels, len(values))(features[1]).argmax(-1)
            found[key][name] = share((given == expected).tolist())
    return found


@torch.inference_mode()
def pooled_features(model: MultimodalModel, processor: MultimodalProcessor, key: str, media: Sequence[Any]) -> Tensor:
    """The mean of the features of each medium that an encoder's projector gets, `(M, D)`."""
    encoder, pooled = model.encoders[key], []
    for batch in batches(media, 128):
        data = processor.process_media(processor.arrange_media((encoder.modality, one) for one in batch))[0]
        own = {name.removeprefix(f"{key}."): value for name, value in data.items()}
        moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in own.items()}
        pooled += [features.float().mean(0).cpu() for features in encoder.encode(moved)]
    return torch.stack(pooled)


def fit_probe(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-3) -> Callable[[Tensor], Tensor]:
    """Ridge regression of classes on standardised features `(M, D)`, labels `(M,)`; gives scores `(M, classes)`."""
    mean, std = features.double().mean(0), features.double().std(0).clamp(min=1e-6)
    x, y = (features - mean) / std, F.one_hot(labels, classes).double()
    gram = x.T @ x + decay * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
    return lambda new: (new - mean) / std @ weight + y.mean(0)
