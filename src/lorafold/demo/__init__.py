"""A small language model and adapters trained on it, shipped so that every example runs offline."""
