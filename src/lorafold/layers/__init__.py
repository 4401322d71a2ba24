"""Layers of torch that take updates: kinds of layer, ways to store a weight, and the class swap.

`kinds.KINDS.register` and `storage.STORAGES.register` add one of somebody else's.
"""
