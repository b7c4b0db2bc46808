"""How a run is stopped from outside: signals as an exception or an exit, streams that may be closed. No torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What ends a run from outside; nohup's and a shell's own SIG_IGN stay as they are."""


class Stopped(BaseException):
    """A signal came. Not an Exception: only what cleans up may look at it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells give for the signal."""
        return 128 + self.number


def say_stopped(number: int) -> None:
    """The last line of a run that was stopped."""
    name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    print(f"unsampler: {name}; no half-written file was left", file=sys.stderr, flush=True)


class Stops:
    """The handlers of a run: before it writes anything a signal ends it on the spot, later it raises :class:`Stopped`.

    Importing PyTorch is no place for an exception: libraries turn it into others, or lose it.
    """

    def __init__(self) -> None:
        self.writing = False
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
        raise Stopped(number)


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
