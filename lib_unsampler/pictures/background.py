"""Work on threads while the next is prepared: encoding frame k while frame k + 1 is decoded.

Pillow's quantiser and WebP encoder, zlib and PyAV let other threads run meanwhile; Pillow's other encoders only where
they write into a file of the system's, and its PNG encoder nowhere (:mod:`.png`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

HELD = 2**26
"""Bytes of pictures that may wait at most (one may always)."""


def cores() -> int:
    """The processors that this process may use, at most 8: more only wait for the interpreter."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


class _Piece:
    """Work that was asked for; its result, once it is there, waits for those before it."""

    def __init__(self, size: int, then: Callable[[Any], None]) -> None:
        self.size, self.then, self.ready, self.result = size, then, False, None


class Background:
    """Threads whose results are handed on in the order of asking, one at a time, by whichever thread is free.

    Asking for more than ``2 * workers`` pieces or ``HELD`` bytes at once waits for the oldest.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or cores()
        self._pool = ThreadPoolExecutor(self._workers, "unsampler")
        self._waiting: deque[_Piece] = deque()
        self._held = 0
        self._handing_on = False
        self._failed = False
        self._error: BaseException | None = None
        self._changed = Condition()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._error = None
        self._waiting.clear()

    def submit(self, size: int, then: Callable[[Any], None], work: Callable[..., Any], *args: Any) -> None:
        """Runs ``work(*args)``, which holds ``size`` bytes, and later, in order, ``then(result)``.

        Raises:
            Exception: whatever an earlier piece of work raised; after that nothing is handed on.
            RuntimeError: if that was raised before.
        """
        piece = _Piece(size, then)
        with self._changed:
            self._pool.submit(self._run, piece, work, args)
            self._waiting.append(piece)
            self._held += size
        self._wait(lambda: len(self._waiting) <= 2 * self._workers and (self._held <= HELD or len(self._waiting) == 1))

    def finish(self) -> None:
        """Waits for everything that was asked for; raises as :meth:`submit`."""
        self._wait(lambda: not self._waiting)

    def _wait(self, enough: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or enough())
            if self._failed:
                raise self._taken()

    def _taken(self) -> BaseException:
        """The error, no longer kept: its traceback holds whoever called, and whoever called holds this."""
        error, self._error = self._error, None
        return error or RuntimeError("earlier work has failed")

    def _run(self, piece: _Piece, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            if not self._failed:
                piece.result = work(*args)
                self._hand_on(piece)
        except BaseException as error:
            with self._changed:
                if not self._failed:
                    self._failed, self._error = True, error
                self._changed.notify_all()

    def _hand_on(self, done: _Piece) -> None:
        """Hands on what is ready, unless another thread is at it and will find this piece too."""
        with self._changed:
            done.ready = True
            if self._handing_on:
                return
            self._handing_on = True
        while (piece := self._next()) is not None:
            piece.then(piece.result)
            with self._changed:
                self._waiting.popleft()
                self._held -= piece.size
                self._changed.notify_all()

    def _next(self) -> _Piece | None:
        with self._changed:
            if not self._failed and self._waiting and self._waiting[0].ready:
                return self._waiting[0]
            self._handing_on = False
            return None
