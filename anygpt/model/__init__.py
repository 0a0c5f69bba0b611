"""The composition: `MultimodalModel` and what loads, freezes and saves it."""
