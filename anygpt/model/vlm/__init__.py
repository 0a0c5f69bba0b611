"""Existing vision- and audio-language models split into parts, with the same tensors and logits."""
