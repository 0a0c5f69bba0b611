"""Files of pretrained parts: where they lie, what tensors they hold, and networks filled with exactly those."""
