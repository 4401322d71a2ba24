"""llama.cpp's adapters: one file in the GGUF format."""
