"""Generation of text, conditions and media."""
