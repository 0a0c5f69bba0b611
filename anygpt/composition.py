"""The interface of `MultimodalModel`: its parts, and the steps that `forward` and `generate` share.

Losses, generation, saving and the processor are functions that take the model; typed against this protocol, they need
not import `MultimodalModel`. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, device, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anygpt.decoders.module import ModalDecoderModule
from anygpt.encoders.module import ModalEncoderModule
from anygpt.sequence.merging import Merged
from anygpt.sequence.signal_tokens import SignalTokens, Spans, Tap


@dataclass
class Reading:
    """The language model's outputs for a merged batch; empty if no loss needs them.

    Attributes:
        logits: `(B, S, V')`, or `(1, M, V')` at the positions that the tap selected.
        states: `{decoder key: (K, N, H)}`, the inputs of each output projector.
        hidden: `(B, S, H)`, the inputs of the language model's head.
        everywhere: whether `logits` covers all positions.
        places: number of positions that the model ran on, padding included; 0 if it did not run.
    """

    logits: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    everywhere: bool = False
    places: int = 0

    def logits_at(self, places: tuple[Tensor, Tensor]) -> Tensor | None:
        """Logits `(M, V')` at positions, which must be the selected ones if the tap selected any."""
        if self.logits is None:
            return None
        return self.logits[places] if self.everywhere else self.logits[0]


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
    config: Any

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

    # ---- steps of `forward` and `generate`

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Tensor | list[Tensor]]: ...

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Merged: ...

    def merge(
        self, text: Merged, features: Mapping[str, Any], items_per_row: Mapping[str, list[int]] | None = None
    ) -> Merged: ...

    def read(
        self, merged: Merged, spans: Mapping[str, Spans], tap: Tap, encoder_inputs: Mapping[str, Any]
    ) -> Reading: ...

    def run_language_model(
        self, merged: Merged, encoder_inputs: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]: ...

    def preprocess_llm(
        self, merged: Merged, encoder_inputs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> dict[str, Any]: ...

    def read_spans(
        self, merged: Merged, spans: Mapping[str, Spans], last: Tensor, all_states: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor]: ...

    # ---- methods of `nn.Module`

    def train(self, part: str | bool = True, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


Reader = Callable[[Composition, Merged, Mapping[str, Spans], Tap, Mapping[str, Any]], Reading]
"""`MultimodalModel.read`, or a stand-in that returns cached states."""
