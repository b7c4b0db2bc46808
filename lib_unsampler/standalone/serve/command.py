"""``python -m lib_unsampler serve``: its arguments, and how it ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..stopping import Stops

PORT = 7865
FOLDER = Path("outputs/page")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve``."""
    port = f"where it listens on 127.0.0.1; 0 takes a free one (default: {PORT})"
    parser.add_argument("--port", type=int, default=PORT, help=port)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the results go (default: {FOLDER})")


def serve(arguments: Sequence[str], parser: argparse.ArgumentParser, stops: Stops) -> int:
    """Serves the page until a signal comes; then the run that is going on is taken back."""
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    if not 0 <= asked.port <= 65535:
        parser.error(f"--port: {asked.port} is not a whole number from 0 to 65535")
    from .server import Server
    from .work import Work

    stops.writing = True
    jobs = Work(asked.folder)
    try:
        server = Server(asked.port, jobs)
    except OSError as error:
        raise ValueError(f"--port: {asked.port} cannot be had ({error.strerror})") from None
    with server:
        try:
            print(f"{server.url}  (Ctrl-C ends it; results in {asked.folder})", flush=True)
            server.serve_forever()
        finally:
            jobs.close()
    return 0
