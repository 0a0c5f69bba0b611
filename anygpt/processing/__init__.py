"""Conversion of raw media and text to batches, and back."""
