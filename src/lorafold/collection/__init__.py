"""Many adapters as one thing: sources, named handles, and batches of one module of them all."""
