"""How libllama is found: the only place in the package that knows."""
