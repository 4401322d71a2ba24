"""serve: one base and many adapters over HTTP, each request with its own mix, c and rank."""
