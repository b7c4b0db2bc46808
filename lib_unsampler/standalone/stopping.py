"""How a run is stopped from outside: signals as an exception or an exit, streams that may be closed. No torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TextIO

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What ends a run from outside; nohup's and a shell's own SIG_IGN stay as they are."""

NOTHING = "no half-written file was left"
FILM = "the film ends where it was"
Hold = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Within it a signal waits; what it gives says whether one does. See :meth:`Stops.held`."""


class Stopped(BaseException):
    """A signal came. Not an Exception: only what cleans up may look at it."""

    def __init__(self, number: int, left: str = NOTHING) -> None:
        super().__init__(number)
        self.number, self.left = number, left

    @property
    def status(self) -> int:
        """The exit status that shells give for the signal."""
        return 128 + self.number


def say_stopped(number: int, left: str = NOTHING) -> None:
    """The last line of a run that was stopped, and what is left of it."""
    name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    print(f"unsampler: {name}; {left}", file=sys.stderr, flush=True)


@contextmanager
def unstopped() -> Iterator[Callable[[], bool]]:
    """The :data:`Hold` where no signal is looked for."""
    yield lambda: False


class Stops:
    """The handlers of a run: before it writes anything a signal ends it on the spot, later it raises :class:`Stopped`.

    Importing PyTorch is no place for an exception: libraries turn it into others, or lose it. Nor is a film's making,
    which is to keep what it has: there a signal waits until it is asked for.
    """

    def __init__(self) -> None:
        self.writing = False
        self._holding, self._waiting = False, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        if not self.writing:
            with suppress(Exception):
                say_stopped(number)
            os._exit(128 + number)
        for other in self._before:
            signal.signal(other, signal.SIG_IGN)  # what cleans up is not stopped
        if not self._holding:
            raise Stopped(number)
        self._waiting = number

    @contextmanager
    def held(self) -> Iterator[Callable[[], bool]]:
        """Within it a signal waits, and what it gives says whether one does; at its end it raises :class:`Stopped`."""
        self._holding = True
        try:
            yield lambda: bool(self._waiting)
        finally:
            self._holding = False
        if self._waiting:
            raise Stopped(self._waiting, FILM)


class Stream:
    """A stream whose reader may have gone: then what is written is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes; a name that the encoding does not have is written as its bytes."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            self._write_bytes(text)
        except BrokenPipeError:
            self._drop()
        except ValueError:
            pass  # closed
        return len(text)

    def _write_bytes(self, text: str) -> None:
        try:
            raw = text.encode(self._stream.encoding, "surrogateescape")
        except UnicodeEncodeError:
            raw = text.encode(self._stream.encoding, "backslashreplace")
        self._stream.flush()
        self._stream.buffer.write(raw)

    def flush(self) -> None:
        """Flushes."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()
        except ValueError:
            pass

    def _drop(self) -> None:
        """Has what is still buffered go nowhere, or the interpreter complains at its end."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def streams() -> Iterator[None]:
    """Standard output and error that may be closed or broken."""
    own = sys.stdout, sys.stderr
    nowhere = [open(os.devnull, "w") for stream in own if stream is None]  # noqa: SIM115 - for the whole run
    spare = iter(nowhere)
    sys.stdout, sys.stderr = (Stream(next(spare) if stream is None else stream) for stream in own)
    try:
        yield
    finally:
        try:
            sys.stderr.flush()
            sys.stdout.flush()
        finally:
            sys.stdout, sys.stderr = own
