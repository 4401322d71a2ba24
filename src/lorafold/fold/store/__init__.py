"""A library on disk: manifest, shards, and what replaces them."""
