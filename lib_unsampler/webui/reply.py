"""What one request hands over to the page and the API, gathered over all its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..page import shelf

MOST_NAMED = 200
"""Of files in one folder, in an error's text."""

KINDS = ("animation", "sweep animation", "contact sheet", "sigma curve", "report", "frame", "sweep")
"""What the reply holds, in its order."""


@dataclass(frozen=True, eq=False)
class Item:
    """One thing in the reply: what the host shows, its generation parameters, and what is said of it."""

    shown: Any
    text: str
    note: dict[str, Any]


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
    files: list[Path] = field(default_factory=list)

    def every(self) -> list[Item]:
        """All items, in order."""
        return [item for kind in KINDS for item in self.items[kind]]

    def told(self, items: Sequence[Item], folder: Path, films: Path) -> dict[str, Any]:
        """What the request's info says of these items and of all files, as plain values.

        Arguments:
            folder: Where latents files are asked for by name.
            films: Where animations are.
        """
        return {
            "sigmas": self.sigmas,
            "images": [item.note for item in items],
            "latents": self.latents,
            "latents names": [shelf.name_of(folder, Path(file)) for file in self.latents],
            "animations names": [shelf.name_of(films, file) for file in self.animations],
            **({"comfyui": self.comfyui} if self.comfyui else {}),
        }

    def told_files(self) -> str:
        """The saved files by name, folder after folder; of very many in one the first and the last."""
        folders: dict[Path, list[str]] = {}
        for file in self.files:
            folders.setdefault(file.parent, []).append(file.name)
        return "; ".join(f"{_listed(names)} in {folder}" for folder, names in folders.items())


def _listed(names: list[str]) -> str:
    if len(names) <= MOST_NAMED:
        return ", ".join(names)
    return f"{names[0]} to {names[-1]} ({len(names)} files)"
