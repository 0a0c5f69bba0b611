"""Media tokenizers: frozen models that turn images, clips and sounds into codes, and codes into media."""

from anygpt.tokenizers.base import MediaTokenizer, load_media_tokenizer

__all__ = ["MediaTokenizer", "load_media_tokenizer"]
