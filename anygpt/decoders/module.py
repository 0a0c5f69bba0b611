"""`ModalDecoderModule`: a diffusion decoder, its output projector, and the choice of states that feed it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.conditions import Condition
from anygpt.decoders.options import MediaMaker
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.errors import InputError
from anygpt.media.types import media_type
from anygpt.sequence.signal_tokens import SIGNALS


class ModalDecoderModule(MediaMaker):
    """One output modality: states at a signal span → output projector → condition → diffusion decoder.

    Args:
        model: the diffusion decoder, which becomes the attribute `module`.
        projector: if None, built by `MultimodalModel` with sizes from both sides.
        num_signal_tokens: `N`; if None, the paper's count for the modality.
        hidden_layer: which of the language model's states are read: `-1` the last, after the final norm (the paper),
            another index into `hidden_states` (0: embeddings), or `"mix"`, a learned softmax over all of them.
        modality: media type in the data; if None, the decoder's own.
        signal: `tokens` (the paper's), `queries` (learned ones after a trigger), or `codes` (those of the media
            tokenizer of the same key, which the language model predicts); see `SignalTokens`.
        defaults: default options of generation, such as `{"guidance_scale": 2}`, before the pipeline's own. Saved with
            the model.
    """

    def __init__(
        self,
        model: DiffusionDecoder,
        projector: OutputProjector | None = None,
        num_signal_tokens: int | None = None,
        hidden_layer: int | str = -1,
        modality: str | None = None,
        signal: str = "tokens",
        defaults: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not isinstance(model, DiffusionDecoder):
            raise InputError(
                f"ModalDecoderModule takes a DiffusionDecoder, got {type(model).__name__}; wrap a diffusers pipeline "
                "first, for instance StableDiffusionDecoder(pipe)"
            )
        if signal not in SIGNALS:
            raise InputError(f"signal is {signal!r}; expected {' or '.join(SIGNALS)}")
        self.signal = signal
        self.module = model
        self.projector = projector
        self.num_signal_tokens = num_signal_tokens
        self.hidden_layer = hidden_layer
        self.modality = modality or model.modality
        self.layer_weights: nn.Parameter | None = None  # logits of the mix, (layers + 1,)
        self.defaults = defaults or {}

    own_options = property(lambda self: self.module.pipeline_options | self.options({}))

    def check_values(self, options: Mapping[str, Any]) -> None:
        self.module.check_options(options)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Also leaves out defaults that have no effect in a request without guidance."""
        merged = super().options(given)
        idle = [name for name in self.module.idle(merged) if given.get(name) is None]
        return {name: value for name, value in merged.items() if name not in idle}

    def edits(self, given: Mapping[str, Any]) -> bool:
        """Whether a request with these options edits, or starts from, the last medium shown."""
        return self.module.takes_reference or "strength" in self.options(given)

    @property
    def needs_all_states(self) -> bool:
        """Whether the language model must return the states of all layers, which costs memory."""
        return self.hidden_layer != -1

    def read_codes_of(self, key: str, tokenizer: nn.Module | None) -> None:
        """Read the codes of this tokenizer, `N` per medium; an `InputError` for None or another media type."""
        modality = getattr(tokenizer, "modality", None)
        if modality != self.modality:
            raise InputError(
                f"the decoder {key!r} has signal 'codes', and makes {self.modality}; expected a media tokenizer of the "
                f"same key and media type, but there is {f'one of {modality}' if modality else 'none'}"
            )
        count = len(tokenizer.module.bounds)
        if self.num_signal_tokens not in (None, count):
            raise InputError(f"the decoder {key!r} has {self.num_signal_tokens} signal tokens; its codes are {count}")
        self.num_signal_tokens = count

    def projector_sizes(self, in_features: int) -> dict[str, Any]:
        """The sizes of an output projector from `H = in_features` to this decoder."""
        if self.num_signal_tokens is None:
            self.num_signal_tokens = media_type(self.modality).signal_tokens
        return {
            "in_features": in_features,
            "num_signal_tokens": self.num_signal_tokens,
            "condition_shape": list(self.module.condition_shape),
            "pooled_dim": self.module.pooled_dim,
            "masked": self.module.masked,
        }

    def init_projector(self, in_features: int, num_layers: int, projection_type: str) -> None:
        """Build the output projector if there is none; an `InputError` if it, or `hidden_layer`, does not fit.

        The language model has width `in_features` and `num_layers` layers.
        """
        expected = self.projector_sizes(in_features)
        if self.projector is None:
            self.projector = OutputProjector(OutputProjectorConfig(projection_type=projection_type, **expected))
        for name, value in expected.items():
            given = getattr(self.projector.config, name)
            if given != value:
                raise InputError(
                    f"the {self.modality} output projector has {name}={given}, but this decoder and language model "
                    f"need {name}={value}"
                )
        if self.hidden_layer == "mix":
            if self.layer_weights is None or len(self.layer_weights) != num_layers + 1:
                self.layer_weights = nn.Parameter(torch.zeros(num_layers + 1))
        elif not isinstance(self.hidden_layer, int) or not -num_layers - 1 <= self.hidden_layer <= num_layers:
            raise InputError(
                f"hidden_layer is {self.hidden_layer!r}; expected 'mix', or one of the language model's "
                f"{num_layers + 1} states"
            )

    def select_states(self, last: Tensor, all_states: tuple[Tensor, ...] | None) -> Tensor:
        """The `(B, S, H)` states that this decoder reads: of the last layer or, with `needs_all_states`, of others."""
        if self.hidden_layer == -1:
            return last
        if isinstance(self.hidden_layer, str):
            weights = self.layer_weights.softmax(dim=0)
            return sum(w * state for w, state in zip(weights, all_states, strict=True))
        return all_states[self.hidden_layer]

    def condition(self, states: Tensor) -> Condition:
        """Project `(K, N, H)`, states plus token embeddings at the spans, to the decoder's normalised condition."""
        return self.module.normalize_condition(self.projector(states))
