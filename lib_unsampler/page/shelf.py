"""The folders of latents files and animations, as shelves that requests, the page and API clients name files of.

A name is a path below the folder and nothing else: whatever leads out of it, by ``..``, from the root
or over a link, is not on the shelf; nor is a file that this extension has not written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from ..core import trajectory
from ..core.trajectory import Trajectory, TrajectoryError
from ..files import whole

ENDING = ".safetensors"
UPLOADS = "unsampler-uploads"

FILM = re.compile(r"-unsampling(-\d+)?(\.gif|\.webp|\.png|\.mp4)$")
"""The end of an animation's name; the number is there where the WebUI's owner wants no file replaced."""

HEADS = {
    ".gif": re.compile(rb"GIF89a"),
    ".webp": re.compile(rb"RIFF....WEBPVP8X", re.S),
    ".png": re.compile(rb"\x89PNG\r\n\x1a\n.{25}....acTL", re.S),
    ".mp4": re.compile(rb"....ftyp", re.S),
}
"""How each animation's file begins."""


class NotOnShelfError(ValueError):
    """A name of no file on the shelf."""


def name_of(folder: Path, file: Path) -> str:
    """The name by which a file below the folder is asked for; empty for a file elsewhere."""
    folder, file = folder.resolve(), file.resolve()
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else ""


def place(folder: Path, name: str) -> Path | None:
    """The file below the folder that a name names, if there is one; any text may be asked for."""
    parts = tuple(name.split("/"))
    if "\0" in name or ".." in parts or Path(*parts).parts != parts:
        return None
    try:
        name.encode()  # a name that is no text cannot be answered with either
        root = folder.resolve()
        file = root.joinpath(*parts).resolve()
        return file if file.is_relative_to(root) and file.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a lone surrogate
        return None


def _listed(folder: Path, ending: Callable[[str], object], find: Callable[[Path, str], Path]) -> list[str]:
    """Every file on a shelf by name, newest first; one that cannot be read is passed over."""
    found: dict[str, float] = {}
    for where, _, files in os.walk(folder):
        for file in filter(ending, files):
            try:
                there = find(folder, Path(where, file).relative_to(folder).as_posix())
                found[name_of(folder, there)] = there.stat().st_mtime
            except (NotOnShelfError, TrajectoryError, OSError):
                continue
    return sorted(found, key=lambda name: found[name], reverse=True)


def names(folder: Path) -> list[str]:
    """Every latents file on the shelf, newest first."""
    return _listed(folder, lambda file: file.endswith(ENDING), find)


def find(folder: Path, name: str) -> Path:
    """The latents file of a name.

    Raises:
        TrajectoryError: if there is none on the shelf, or it was not written by this extension.
    """
    file = place(folder, name)
    if file is None or not name.endswith(ENDING):
        raise TrajectoryError(f"{name[:200]!r} is not a latents file ({ENDING}) in the output folder")
    trajectory.check(file)
    return file


def film_names(folder: Path) -> list[str]:
    """Every animation on the shelf, newest first."""
    return _listed(folder, FILM.search, find_film)


def find_film(folder: Path, name: str) -> Path:
    """The animation of a name.

    Raises:
        NotOnShelfError: if there is none on the shelf, or it is none of this extension's.
    """
    file = place(folder, name)
    if file is None or not FILM.search(name) or not _is_film(file):
        raise NotOnShelfError(f"{name[:200]!r} is not an animation (-unsampling.gif, ...) in the folder of animations")
    return file


def _is_film(file: Path) -> bool:
    head = HEADS.get(file.suffix)
    try:
        with file.open("rb") as opened:
            return head is not None and head.match(opened.read(64)) is not None
    except OSError:
        return False


def read(folder: Path, name: str) -> Trajectory:
    """The trajectory of a name; raises TrajectoryError as :func:`find` does, or if the file is damaged."""
    file = find(folder, name)
    try:
        return trajectory.load(file)
    except TrajectoryError as error:
        raise TrajectoryError(str(error).replace(str(file), repr(name))) from None


def take(folder: Path, upload: Path) -> str:
    """Puts a copy of an uploaded file on the shelf, once its whole content has been read; returns its name.

    Raises:
        TrajectoryError: if it is no trajectory.
    """
    trajectory.load(upload)
    data = upload.read_bytes()
    kept = folder / UPLOADS / f"{hashlib.sha256(data).hexdigest()[:16]}{ENDING}"
    if not kept.exists():
        with whole(kept) as part:
            part.write_bytes(data)
    return name_of(folder, kept)
