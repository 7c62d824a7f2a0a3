"""Measurements on a plain llama_cpp.Llama: perplexity by position, needles in a haystack."""
