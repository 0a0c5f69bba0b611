"""Existing vision- and audio-language models taken apart into our parts: the same tensors, the same logits."""

from anygpt.model.vlm.take_apart import take_apart

__all__ = ["take_apart"]
