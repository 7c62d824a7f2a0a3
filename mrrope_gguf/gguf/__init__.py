"""The GGUF format: the only place in the package that knows bytes."""
