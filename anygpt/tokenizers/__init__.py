"""Media tokenizers: frozen models that turn images, clips and sounds into codes, and codes into media."""

from anygpt.tokenizers.base import MediaTokenizer
from anygpt.tokenizers.families import FAMILIES, TokenizerFamily
from anygpt.tokenizers.loading import load_media_tokenizer

__all__ = ["FAMILIES", "MediaTokenizer", "TokenizerFamily", "load_media_tokenizer"]
