"""What one request hands over to the page and the API, gathered over all its batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..page import shelf
from ..settings import INFOTEXT_PREFIX

MOST_NAMED = 200
"""Of files in one folder, in an error's text."""

FILES_KEY = INFOTEXT_PREFIX + "files"
"""Under which an own picture's parameters name the files that go with it."""

KINDS = ("animation", "sweep animation", "contact sheet", "sigma curve", "report", "frame", "sweep")
"""What the reply holds, in its order."""


@dataclass(frozen=True, eq=False)
class Item:
    """One thing in the reply: what the host shows, its generation parameters, and what is said of it."""

    shown: Any
    text: str
    note: dict[str, Any]


@dataclass(frozen=True)
class Filed:
    """A saved file: what it is, and the numbers of the images that it holds something of."""

    kind: str
    images: tuple[int, ...]


@dataclass
class Reply:
    """The results of a request.

    Attributes:
        limit: Frames that it holds at most; the others are only saved.
        items: What the gallery and the API get, by kind.
        stand_ins: The noisiest frame of each image, for who takes one picture for each.
        latents: Paths of the latents files.
        comfyui: Paths of ComfyUI's latent files.
        animations: Paths of the animations that were saved.
        sigmas: The kept levels that were made, least noisy first.
        files: Every file that was saved.
    """

    limit: int
    items: dict[str, list[Item]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    stand_ins: list[Item] = field(default_factory=list)
    latents: list[str] = field(default_factory=list)
    comfyui: list[str] = field(default_factory=list)
    animations: list[Path] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    files: dict[Path, Filed] = field(default_factory=dict)

    def every(self) -> list[Item]:
        """All items, in order."""
        return [item for kind in KINDS for item in self.items[kind]]

    def told(self, notes: Sequence[Mapping[str, Any]], folder: Path, films: Path) -> dict[str, Any]:
        """What the request's info says of the results and of all files, as plain values.

        Arguments:
            notes: What each of the results is.
            folder: Where latents files are asked for by name.
            films: Where animations are.
        """
        return {
            "sigmas": self.sigmas,
            "images": list(notes),
            "latents": self.latents,
            "latents names": [shelf.name_of(folder, Path(file)) for file in self.latents],
            "animations names": [shelf.name_of(films, file) for file in self.animations],
            **({"comfyui": self.comfyui} if self.comfyui else {}),
        }

    def told_files(self) -> str:
        """The saved files by name, folder after folder; of very many in one the first and the last."""
        return "; ".join(f"{_listed(names, MOST_NAMED)} in {folder}" for folder, names in _by_folder(self.files))

    def naming(self, image: int, text: str) -> str:
        """An image's generation parameters, which then also name what was saved of it."""
        own = {file.absolute(): filed.kind for file, filed in self.files.items() if image in filed.images}
        said = []
        for folder, names in _by_folder(own):
            kinds: dict[str, list[str]] = {}
            for name in names:
                kinds.setdefault(own[folder / name], []).append(name)
            said.append(", ".join(f"{kind} {_listed(of_it, 1)}" for kind, of_it in kinds.items()) + f" in {folder}")
        return f"{text}, {FILES_KEY}: {json.dumps('; '.join(said), ensure_ascii=False)}" if said else text


def _by_folder(files: Iterable[Path]) -> Iterable[tuple[Path, list[str]]]:
    folders: dict[Path, list[str]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file.name)
    return folders.items()


def _listed(names: list[str], most: int) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{names[0]} to {names[-1]} ({len(names)} files)"
