"""`python -m export.cli`, the `dgm4` command."""

import sys

from export.cli import main

if __name__ == "__main__":
    sys.exit(main())
