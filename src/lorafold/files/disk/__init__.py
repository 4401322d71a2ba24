"""Files as they lie on a disk that others change."""
