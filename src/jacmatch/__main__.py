"""`python -m jacmatch`, the same as the command `jacmatch`."""

import sys

from jacmatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
