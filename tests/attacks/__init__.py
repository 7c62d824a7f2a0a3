"""Hostile GGUF files, one named case each, and what every command and stock llama.cpp do with them.

`python -m tests.attacks` asks stock llama.cpp again and writes docs/attacks.md; `python -m tests.attacks DIR` writes
the files themselves.
"""
