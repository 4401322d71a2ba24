"""The playground: a page at the server's root that asks it, for several settings side by side."""
