"""The folder where latents files are kept, as a shelf that requests, the page and API clients name files of.

A name is a path below the folder and nothing else: whatever leads out of it, by ``..``, from the root
or over a link, is not on the shelf; nor is a file that is no trajectory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..core import trajectory
from ..core.trajectory import Trajectory, TrajectoryError
from ..files import whole

ENDING = ".safetensors"
UPLOADS = "unsampler-uploads"


def name_of(folder: Path, file: Path) -> str:
    """The name by which a file below the folder is asked for; empty for a file elsewhere."""
    folder, file = folder.resolve(), file.resolve()
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else ""


def names(folder: Path) -> list[str]:
    """Every latents file on the shelf, newest first."""
    files = {name_of(folder, file): file for file in folder.rglob(f"*{ENDING}") if _is_ours(folder, file)}
    return sorted(files, key=lambda name: files[name].stat().st_mtime, reverse=True)


def _is_ours(folder: Path, file: Path) -> bool:
    try:
        find(folder, name_of(folder, file))
    except TrajectoryError:
        return False
    return True


def find(folder: Path, name: str) -> Path:
    """The file of a name.

    Raises:
        TrajectoryError: if there is none on the shelf, or it was not written by this extension.
    """
    file = (folder.resolve() / name.replace("\0", "")).resolve()
    if not name.endswith(ENDING) or not name_of(folder, file) or not file.is_file():
        raise TrajectoryError(f"{name!r} is not a latents file ({ENDING}) in the img2img output folder")
    trajectory.check(file)
    return file


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
