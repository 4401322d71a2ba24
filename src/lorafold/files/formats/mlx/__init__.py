"""MLX's folders: read (`reading`), and written (`writing`)."""
