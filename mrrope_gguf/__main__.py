"""`python -m mrrope_gguf` is `mrrope`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
