"""What the rooms below the model know of it: its parts, and the hops that `forward` and `generate` share.

Losses, generation, saving and the processor are functions that take the model; they are written against this, so none
of them imports `MultimodalModel`. Shape legend: `anygpt.outputs`.
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
    """What the language model made of a merged batch; empty where no loss reads it.

    Attributes:
        logits: `(B, S, V')`, or `(1, M, V')` at the places that its tap selected.
        states: `{decoder key: (K, N, H)}`, what each output projector reads.
        hidden: `(B, S, H)`, what its head read.
        everywhere: whether logits are those of all places.
        places: over how many it ran, padding included; 0 where it did not run.
    """

    logits: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    everywhere: bool = False
    places: int = 0

    def logits_at(self, places: tuple[Tensor, Tensor]) -> Tensor | None:
        """`(M, V')`: those at the places, which are the selected ones if there was a selection."""
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

    # ---- the hops

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

    # ---- torch's own

    def train(self, part: str | bool = True, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


Reader = Callable[[Composition, Merged, Mapping[str, Spans], Tap, Mapping[str, Any]], Reading]
"""`MultimodalModel.read`, or what stands in for it: states that it gave before."""
