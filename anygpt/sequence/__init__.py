"""The merged sequence of text, encoder features and signal tokens."""
