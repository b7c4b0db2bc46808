"""``python -m lib_unsampler``: the command line over the embedded models."""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until main has handlers of its own

from .standalone.cli import main

if __name__ == "__main__":
    sys.exit(main())
