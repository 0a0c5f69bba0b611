"""Raw media and text to a batch and back."""
