"""How fresh adapters begin."""
