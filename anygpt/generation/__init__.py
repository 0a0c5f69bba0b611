"""Text, conditions and media out, in the order in which they are said."""
