"""Existing vision- and audio-language models split into parts, with the same tensors and logits."""

from anygpt.model.vlm.take_apart import take_apart

__all__ = ["take_apart"]
