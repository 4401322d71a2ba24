"""A controller of rank and learning rate by how the loss behaves."""
