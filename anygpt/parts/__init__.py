"""Files of pretrained parts: their location, their tensors, and networks loaded from them."""
