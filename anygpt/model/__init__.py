"""`MultimodalModel`, the composition of parts: loading, freezing, saving."""
