"""What transformers' auto classes and its any-to-any pipeline expect of a model and a processor, beyond our own API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, ProcessorMixin

from anygpt.composition import Composition


class TransformersProcessor(ProcessorMixin):
    """Base of `MultimodalProcessor`: media by modality, and the names that the pipeline reads.

    The pipeline takes nothing but a `ProcessorMixin`; of what that does, only `push_to_hub` is used.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.encoder_processors)})"

    @property
    def tokenizer(self) -> Any:
        return self.llm_tokenizer

    @property
    def chat_template(self) -> str | None:
        return self.llm_tokenizer.chat_template

    def inputs_by_modality(self, text: Any, media: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`text` and `{"images" | "videos" | "audio": one or a list}` as `encoder_inputs` and `llm_inputs`."""
        pairs = []
        for name, values in media.items():
            if values is not None:
                values = values if isinstance(values, list) else [values]
                pairs += [(name.removesuffix("s"), value) for value in values]
        return self.arrange_media(pairs), {"text": text}

    def post_process_multimodal_output(
        self,
        generated: Mapping[str, Any] | Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **_: Any,
    ) -> list[Any]:
        """The text of each row; or with another `generation_mode`, its first medium of that kind, None if it has none.

        Args:
            generated: the fields of a `GenerationOutput`, as the pipeline hands them on, or `(B, S)` ids.
        """
        if generation_mode in (None, "text"):
            ids = generated if isinstance(generated, Tensor) else generated["sequences"]
            return self.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        media = [[s.content for s in row.segments if s.type == generation_mode] for row in generated["answers"]]
        return [found[0] if found else None for found in media]


def input_modalities(model: Composition) -> tuple[str, ...]:
    """What a composition reads, in the pipeline's words."""
    return ("text", *dict.fromkeys(encoder.modality for encoder in model.encoders.values()))


def output_modalities(model: Composition) -> tuple[str, ...]:
    """What a composition makes, in the pipeline's words."""
    return ("text", *dict.fromkeys(decoder.modality for decoder in model.decoders.values()))


def register(config: type, model: type, processor: type) -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForMultimodalLM` and `AutoProcessor` know a saved composition."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForMultimodalLM.register(config, model, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)
