"""One training run from files to an adapter with its card: what `lorafold train` does."""
