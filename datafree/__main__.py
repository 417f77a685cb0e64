"""``python -m datafree`` is the command ``datafree``."""

import sys

from datafree.cli import main

if __name__ == "__main__":
    sys.exit(main())
