"""A folder of frames as PNGs: their names, and which of them are this program's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ..files import whole
from ..pictures import png
from ..pictures.background import Background
from ..pictures.containers import parameters
from .folders import FRAME_NAME
from .onward import WRITTEN_BY


class Stills:
    """Writes frames into a folder; those of an earlier run that are not written again go."""

    def __init__(self, folder: Path, text: str, background: Background) -> None:
        """Begins: ``text`` is written into every frame, by ``background``."""
        self._folder, self._text, self._background = folder, text, background
        self._count = 0
        self._stale = {f for f in folder.glob("*.png") if FRAME_NAME.fullmatch(f.name) and is_ours(f)}

    def add(self, picture: Image.Image, sigma: float) -> None:
        """Takes the next frame."""
        path = frame_path(self._folder, self._count, sigma)
        self._background.submit(3 * picture.width * picture.height, self._stale.discard, self._write, path, picture)
        self._count += 1

    def _write(self, path: Path, picture: Image.Image) -> Path:
        with whole(path) as part:
            png.save(picture, part, parameters(self._text))
        return path

    def finish(self) -> None:
        """Takes away what an earlier run left, when the background has written everything."""
        for leftover in self._stale:
            leftover.unlink()


def frame_path(folder: Path, number: int, sigma: float) -> Path:
    """Where a frame is written."""
    return folder / f"{number:05d}_sigma_{sigma:.4f}.png"


def is_ours(path: Path) -> bool:
    """Whether a file is a picture that this program wrote, by the text in it."""
    with suppress(Exception), Image.open(path, formats=["PNG"]) as picture:
        return str(picture.info.get("parameters", "")).startswith(WRITTEN_BY)
    return False


def foreign(folder: Path | None, sigmas: Sequence[float]) -> Iterator[Path]:
    """The files that frames at these noise levels would replace and that this program did not make."""
    if folder is None or not folder.is_dir():
        return
    for number, sigma in enumerate(sigmas):
        path = frame_path(folder, number, sigma)
        if os.path.lexists(path) and not is_ours(path):
            yield path
