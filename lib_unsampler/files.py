"""Files that appear under their final name only when they are whole."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has the system's errors name the file that was wanted, not a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def check(path: Path) -> None:
    """Makes the folder of a file to be; what its name cannot be is found here, before the work.

    Raises:
        OSError: if the name is too long or a folder's, or the folder cannot be made.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if os.path.isdir(path) or os.lstat(path) is None:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except FileNotFoundError:
            pass


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; moved into place on success, removed otherwise.

    Raises:
        OSError: if the folder cannot be made or written, the name cannot be, or the disk is full.
    """
    check(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # of its own length, also where the name is as long as can be
    with naming(path):
        part.touch()
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def spool(path: Path) -> BinaryIO:
    """A file without a name in the folder of ``path``, gone as soon as it is closed or the process ends."""
    check(path)
    with naming(path):
        return tempfile.TemporaryFile(dir=path.parent)
