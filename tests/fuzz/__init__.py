"""Fuzzers: of the C++ header scan (libFuzzer, or a plain loop) and of the Python layer (atheris, or a plain loop)."""
