"""The merged sequence: signal tokens and features among the text."""
