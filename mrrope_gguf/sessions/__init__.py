"""What the model has read, kept on disk: states by their tokens, and named conversations. docs/sessions.md."""
