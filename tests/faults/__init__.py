"""Faults in the system calls that touch files: a library that makes them, and operations that must survive them."""
