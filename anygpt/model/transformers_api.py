"""What transformers' auto classes and its any-to-any pipeline require of a model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from anygpt.composition import Composition


def input_modalities(model: Composition) -> tuple[str, ...]:
    """Media types that a composition reads, as the pipeline names them."""
    return ("text", *dict.fromkeys(encoder.modality for encoder in model.encoders.values()))


def output_modalities(model: Composition) -> tuple[str, ...]:
    """Media types that a composition makes, as the pipeline names them."""
    return ("text", *dict.fromkeys(decoder.modality for decoder in model.decoders.values()))


def register(config: Any, model: type, processor: type) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForMultimodalLM.register(config, model, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)
