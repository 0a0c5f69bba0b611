"""Evaluation on ToyWorld: the any-to-any matrix, its baselines and its reports (`anygpt evaluate`)."""
