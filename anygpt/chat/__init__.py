"""A trained model to talk to."""
