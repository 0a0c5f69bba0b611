"""Real media and real pretrained parts from package registries, small enough for a laptop."""
