"""One module of all adapters: the space that they span together, and every rule of merging."""
