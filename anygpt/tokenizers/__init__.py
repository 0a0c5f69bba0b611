"""Media tokenizers: frozen models that turn images, clips and sounds into codes, and codes into media."""

from anygpt.tokenizers.base import MediaTokenizer, load_media_tokenizer
from anygpt.tokenizers.families import FAMILIES, TokenizerFamily

__all__ = ["FAMILIES", "MediaTokenizer", "TokenizerFamily", "load_media_tokenizer"]
