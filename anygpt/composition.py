"""What the rooms below the model know of it: its parts, and the hops that `forward` and `generate` share.

Losses, generation, saving and the processor are functions that take the model; they are written against this, so none
of them imports `MultimodalModel`. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, device, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anygpt.decoders.module import ModalDecoderModule
from anygpt.encoders.module import ModalEncoderModule
from anygpt.sequence.merging import Merged
from anygpt.sequence.signal_tokens import SignalTokens, Spans


class Composition(Protocol):
    """Encoders, a language model with its signal tokens, and decoders; attributes as in `MultimodalModel`."""

    encoder_keys: tuple[str, ...]
    decoder_keys: tuple[str, ...]
    language_model: PreTrainedModel
    signal_tokens: SignalTokens
    token_ids: dict[str, int] | None
    tokenizer: PreTrainedTokenizerBase | None
    preprocess_llm_callback: Any
    training: bool
    frozen: set[str]

    def __init__(
        self,
        encoders: Mapping[str, ModalEncoderModule],
        language_model: PreTrainedModel,
        decoders: Mapping[str, ModalDecoderModule] | None = None,
        **options: Any,
    ): ...

    @property
    def encoders(self) -> dict[str, ModalEncoderModule]: ...

    @property
    def decoders(self) -> dict[str, ModalDecoderModule]: ...

    @property
    def device(self) -> device: ...

    def set_token_ids(self, token_ids: Mapping[str, int] | None) -> None: ...

    # ---- the hops

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Tensor | list[Tensor]]: ...

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Merged: ...

    def merge(
        self, text: Merged, features: Mapping[str, Any], items_per_row: Mapping[str, list[int]] | None = None
    ) -> Merged: ...

    def run_language_model(
        self, merged: Merged, encoder_inputs: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]: ...

    def preprocess_llm(
        self, merged: Merged, encoder_inputs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> dict[str, Any]: ...

    def read_spans(
        self, merged: Merged, spans: Mapping[str, Spans], last: Tensor, all_states: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor]: ...

    # ---- torch's own

    def train(self, part: str | bool = True, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...
