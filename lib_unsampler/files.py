"""Files that appear under their final name only when they are whole.

A link is followed: the file it leads to is the one that is replaced, and the link stays.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that somebody has open cannot be taken away
    fcntl = None  # type: ignore[assignment]

PART = re.compile(r"\.[0-9a-f]{32}\.part")
STALE = 86400.0
"""Seconds after which a part is stale where locks cannot tell."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has the system's errors name the file that was wanted, not a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def target(path: Path) -> Path:
    """The file that a path leads to, links followed, whether it is there or not.

    Raises:
        OSError: for links that lead to one another.
    """
    found = os.path.realpath(path)
    if os.path.islink(found):
        with naming(path):
            raise _error(errno.ELOOP)
    return Path(found)


def check_writable(path: Path) -> None:
    """Finds out, without making anything, whether a file could be written under a name.

    Raises:
        OSError: if the name is too long or a folder's, or its folder cannot be made or written.
    """
    final = target(path)
    with naming(path):
        _check_name(final)
        above = next(folder for folder in final.parents if folder.exists())
        if not above.is_dir():
            raise _error(errno.ENOTDIR)
        if not os.access(above, os.W_OK | os.X_OK):
            raise _error(errno.EACCES)


def _check_name(final: Path) -> None:
    """Raises OSError for a name that no file can have: a folder's, or one that is too long."""
    with suppress(FileNotFoundError):
        if os.path.isdir(final) or os.lstat(final) is None:
            raise _error(errno.EISDIR)


def check(path: Path) -> Path:
    """Makes the folder of a file to be; what its name cannot be is found here, before the work.

    Returns:
        The file that the path leads to.

    Raises:
        OSError: if the name is too long or a folder's, or the folder cannot be made.
    """
    final = target(path)
    with naming(path):
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_name(final)
    return final


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; moved into place on success, removed otherwise.

    Raises:
        OSError: if the folder cannot be made or written, the name cannot be, or the disk is full.
    """
    final = check(path)
    sweep(final.parent)
    with naming(path):
        part, lock = _new_part(final.parent)
        try:
            yield part
            os.replace(part, final)
        finally:
            if lock is not None:
                os.close(lock)
            part.unlink(missing_ok=True)


def _new_part(folder: Path) -> tuple[Path, int | None]:
    """A new empty file, and what keeps it locked while it is being written: :func:`sweep` knows a stale one by that."""
    while True:
        part = folder / f".{uuid.uuid4().hex}.part"  # of its own length, also where the name is as long as can be
        opened = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        if fcntl is None:
            os.close(opened)  # Windows moves no open file
            return part, None
        with suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        if part.exists():
            return part, opened
        os.close(opened)  # swept before it was locked


@cache
def sweep(folder: Path) -> None:
    """Takes away what runs that were killed had half written into a folder; once for each folder."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if PART.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_stale(entry.path)


def _remove_stale(part: str) -> None:
    if fcntl is None:
        if time.time() - os.stat(part).st_mtime > STALE:
            os.unlink(part)
        return
    opened = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError, an OSError, while it is being written
        os.unlink(part)
    finally:
        os.close(opened)


@contextmanager
def spool(path: Path) -> Iterator[BinaryIO]:
    """A file without a name in the folder of ``path``, gone at the end of the block or of the process."""
    final = check(path)
    with naming(path):
        file = tempfile.TemporaryFile(dir=final.parent)  # noqa: SIM115 - closed below, whatever its disk says to that
    try:
        yield file
    finally:
        with suppress(OSError):  # what is still to be written to a full disk, nobody reads any more
            file.close()
