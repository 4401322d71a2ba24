"""Layers of torch that take updates: kinds of layer, ways to store a weight, and the class swap."""
