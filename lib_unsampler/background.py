"""Work on threads while the next is prepared: encoding frame k while frame k + 1 is decoded.

Pillow's quantiser, deflate and WebP encoder, and PyAV's, let other threads run meanwhile.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

HELD = 2**26
"""Bytes of pictures that may wait at most (one may always)."""


def cores() -> int:
    """The processors that this process may use, at most 8: more only wait for the interpreter."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


class Background:
    """Threads whose results are handed back in the order of asking, in the asking thread.

    Asking for more than ``2 * workers`` pieces or ``HELD`` bytes at once waits for the oldest.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or cores()
        self._pool = ThreadPoolExecutor(self._workers, "unsampler")
        self._waiting: deque[tuple[Future[Any], Callable[[Any], None], int]] = deque()
        self._held = 0

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, size: int, then: Callable[[Any], None], work: Callable[..., Any], *args: Any) -> None:
        """Runs ``work(*args)``, which holds ``size`` bytes, and later ``then(result)`` in order.

        Raises:
            Exception: whatever an earlier piece of work raised.
        """
        self._waiting.append((self._pool.submit(work, *args), then, size))
        self._held += size
        while len(self._waiting) > 2 * self._workers or (self._held > HELD and len(self._waiting) > 1):
            self._collect()

    def finish(self) -> None:
        """Waits for everything that was asked for."""
        while self._waiting:
            self._collect()

    def _collect(self) -> None:
        future, then, size = self._waiting.popleft()
        self._held -= size
        then(future.result())
