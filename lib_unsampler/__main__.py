"""``python -m lib_unsampler``: the command line over the embedded models."""

import sys

from .standalone.cli import main

if __name__ == "__main__":
    sys.exit(main())
