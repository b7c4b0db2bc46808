"""The strength sweep without a WebUI: every kept level sampled on to a picture, least noisy first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..pictures.background import Background
from ..pictures.fitting import Fit
from ..pictures.reel import Reel
from ..settings import Settings
from .stills import Stills

SampleBack = Callable[[int, Tensor], Image.Image]
"""The picture that z of a schedule index becomes."""


class Sweep:
    """Takes the levels as they are made; what was begun is forgotten on exit unless it was finished."""

    def __init__(
        self,
        settings: Settings,
        sigmas: list[float],
        text: str,
        moving: Path | None,
        pictures: Path | None,
        back: SampleBack,
    ) -> None:
        """Begins.

        Arguments:
            settings: How the pictures are captioned and timed.
            sigmas: The noise level of every picture.
            text: What is written into the files.
            moving: Where the animation goes, if one is wanted.
            pictures: The folder of the pictures, if they are wanted.
            back: How a level becomes a picture.
        """
        self._back, self._sigmas, self._count = back, sigmas, 0
        self._files = ExitStack()
        self._background = self._files.enter_context(Background())
        alone = replace(settings, panel=False)  # a picture by itself, whatever the levels' frames are
        self._reel = self._files.enter_context(Reel(alone, sigmas, text, self._background, moving, False))
        self._stills = None if pictures is None else Stills(pictures, text, self._background)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def take(self, index: int, z: Tensor) -> None:
        """Samples the next noisier level on, z unmasked."""
        picture = self._reel.add(self._back(index, z), index, None, "strength sweep")
        if self._stills is not None:
            self._stills.add(picture, self._sigmas[self._count])
        self._count += 1

    @property
    def fit(self) -> Fit | None:
        """What became of an animation of limited size, when finished."""
        return self._reel.fit

    def finish(self) -> None:
        """Writes the animation."""
        self._reel.finish()
        self._background.finish()
        if self._stills is not None:
            self._stills.finish()
