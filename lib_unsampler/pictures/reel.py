"""One image's frames, least noisy first, on their way into an animation and a contact sheet.

The command line and the WebUI share it: nothing is held but thumbnails and what is being encoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from ..settings import Settings
from . import render
from .animation import Animation, Making
from .background import Background
from .fitting import MEGABYTE, Fit, Fitted
from .timing import TIMINGS, Timing, evenly

NAMED_SIDE = 96
"""Pixels from which on the three pictures of a panel are named unasked."""


def making(settings: Settings) -> Making:
    """The size of an animation's frames before any limit of its bytes, as the settings say."""
    return Making(settings.animation_side or None)


def timing(settings: Settings, sigmas: Sequence[float]) -> Timing:
    """How the frames of these levels are shown, as the settings say."""
    durations = TIMINGS[settings.timing](sigmas, settings.duration)
    holds = settings.hold_first, settings.hold_last
    return Timing(durations, *holds, settings.reverse, settings.ping_pong, settings.loop)


class Reel:
    """Takes frames one by one; what was begun is forgotten on exit unless it was finished.

    Attributes:
        fit: What became of an animation of limited size, when finished.
    """

    def __init__(
        self,
        settings: Settings,
        sigmas: Sequence[float],
        text: str,
        background: Background,
        moving: Path | None,
        sheet: bool,
    ) -> None:
        """Begins.

        Arguments:
            settings: How the frames look and are timed.
            sigmas: The noise level of every frame that may come, 0 for the source.
            text: The generation parameters.
            background: Where frames are encoded.
            moving: Where the animation appears when whole; None for none.
            sheet: Whether a contact sheet is wanted.

        Raises:
            ValueError: if the animation's format cannot be had or cannot hold it.
            OSError: if its folder cannot be written.
        """
        self._settings, self._sigmas, self._sheet = settings, sigmas, sheet
        self._files = ExitStack()
        self._animation: Animation | Fitted | None = None
        self.fit: Fit | None = None
        if moving is not None:
            about = (moving, timing(settings, sigmas), text, background, making(settings))
            if settings.max_megabytes:
                most = math.floor(settings.max_megabytes * MEGABYTE)
                self._animation = self._files.enter_context(Fitted(*about, most))
            else:
                self._animation = self._files.enter_context(Animation(*about))
        self._count = 0
        self._small: list[tuple[Image.Image, str]] = []

    def __enter__(self) -> Reel:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, picture: Image.Image, step: int | None, timestep: float | None, part: str = "") -> Image.Image:
        """Takes the next frame; returns it as it is shown.

        Arguments:
            step: Its schedule index; None for a picture without noise.
            timestep: The model's timestep, if it is to be told.
            part: What it is part of, for its caption: empty is the noising.
        """
        sigma = self._sigmas[self._count]
        if self._sheet and evenly(self._count, len(self._sigmas), render.SHEET_FRAMES):
            self._small.append((render.thumbnail(picture), render.sigma_text(sigma)))
        picture = self._captioned(picture, step, sigma, timestep, part)
        if self._animation is not None:
            self._animation.add(picture)
        self._count += 1
        return picture

    def _captioned(
        self, picture: Image.Image, step: int | None, sigma: float, timestep: float | None, part: str
    ) -> Image.Image:
        """A frame with what is to be written on it: the pictures of a panel are named wherever there is room."""
        settings = self._settings
        kind = part or (settings.noise if settings.mode == "noise" else settings.mode)
        said = render.caption(step, sigma, timestep, kind, part or "source")
        if settings.panel and (settings.captions or min(picture.width // 3, picture.height) >= NAMED_SIDE):
            seen = ["source"] if step is None else ["what the model sees in it"]
            noisy = said if settings.captions else ["source" if step is None else "the noisy latent"]
            return render.captioned_panel(picture, [["source"], noisy, seen])
        return render.captioned(picture, said) if settings.captions else picture

    def finish(self) -> Image.Image | None:
        """Writes the animation; returns the contact sheet, if one is wanted."""
        if self._animation is not None:
            made = self._animation.finish()
            self.fit = made if isinstance(made, Fit) else None
        return render.contact_sheet(*zip(*self._small)) if self._small else None
