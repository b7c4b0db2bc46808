"""A disk that fills up, as POSIX can play it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

resource = pytest.importorskip("resource", reason="a full disk is played by a limit that only POSIX has")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As on a disk that fills up, in any thread: a file may not grow beyond ``size`` (Python ignores SIGXFSZ)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
