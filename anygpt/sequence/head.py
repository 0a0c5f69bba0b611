"""The language model's layers and its head, taken apart: to run the head alone on states.

Whatever a model does after its head (soft-capping, scaling) is done, because its own `forward` runs, with the layers
replaced by their result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from anygpt.sequence.signal_tokens import SignalTokens

CHUNK = 512
"""Positions whose logits are computed at once where labels need more: logits of all would take the most memory."""


@dataclass
class LayersOutput(BaseModelOutputWithPast):
    """The last hidden states; any other output of a model's layers (router logits, cross attentions) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def trunk_of(language_model: nn.Module) -> nn.Module:
    """A language model's layers, without its head."""
    return language_model.get_decoder()


@contextmanager
def replaced(module: nn.Module, result: Callable[[], Any]) -> Iterator[None]:
    """Make the module return a given result inside the block, without computing."""
    before = vars(module).get("forward")  # accelerate's hooks set it
    module.forward = lambda *args, **kwargs: result()
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def run_layers_output(language_model: nn.Module, states: Tensor) -> Tensor:
    """Logits `(1, M, V')` of the layers' last states `(1, M, H)`, inside `SignalTokens.attached`."""
    with replaced(trunk_of(language_model), lambda: LayersOutput(last_hidden_state=states)):
        return language_model(inputs_embeds=states, use_cache=False, return_dict=True).logits


def run_head(language_model: nn.Module, signal_tokens: SignalTokens, states: Tensor) -> Tensor:
    """Logits `(M, V')` of the head's inputs `(M, H)`, outside `SignalTokens.attached`."""
    with signal_tokens.attached(language_model) as tap:
        tap.given = states[None]
        return run_layers_output(language_model, tap.given)[0]
