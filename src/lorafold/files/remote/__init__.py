"""Files on object stores: paths that are URLs, read by ranges and written without renames."""
