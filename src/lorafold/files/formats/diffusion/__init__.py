"""Image models: what their modules are called (`names`), and formats that hold their adapters."""
