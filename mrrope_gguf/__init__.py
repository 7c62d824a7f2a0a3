"""mrrope-gguf: a longer memory for any GGUF model, by mixed-radix RoPE. See README.md."""

__version__ = "0.1.0"
