"""What runs in a forward: the layers' children and the tensors that they look up."""
