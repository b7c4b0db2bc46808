"""Writers: pictures and their times in, one whole file out. They never see the WebUI or a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, features

from ..files import naming, spool, whole
from . import video
from .background import Background
from .containers import Apng, Container, Gif, WebP, parameters
from .scaling import lanczos
from .timing import Ticks, Timing

FORMATS: dict[str, type[Container]] = {
    ".gif": Gif,
    ".apng": Apng,
    ".png": Apng,
    ".webp": WebP,
    ".mp4": video.Mp4,
}


@dataclass(frozen=True)
class Making:
    """How frames are made for a file.

    Attributes:
        side: The longest side; larger ones are brought down to it (Lanczos). None leaves all as they are.
        quality: On the format's own scale; None is its best.
    """

    side: int | None = None
    quality: int | None = None

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of what a frame becomes."""
        longest = max(size)
        if self.side is None or longest <= self.side:
            return size
        width, height = (max(1, round(side * self.side / longest)) for side in size)
        return width, height

    def smaller(self, frame: Image.Image) -> Image.Image:
        """A frame at that size."""
        size = self.size(frame.size)
        return frame if size == frame.size else lanczos(np.array(frame), size)


AS_IT_IS = Making()


class Arrivals:
    """The frames that come for a file: how many, how large, and whether it can hold them."""

    def __init__(self, form: type[Container], timing: Timing, making: Making) -> None:
        self._form, self._timing, self._making = form, timing, making
        self.count, self._size = 0, (0, 0)  # until the first frame comes

    def take(self, size: tuple[int, int]) -> None:
        """Counts the next frame, of such a size.

        Raises:
            ValueError: if its size is not the first one's or too large, or no time is left for it.
        """
        if self.count == len(self._timing.durations):
            raise ValueError(f"more frames than the {self.count} durations")
        if self.count and size != self._size:
            raise ValueError(f"frame {self.count} is {size}, the first was {self._size}")
        if max(self._making.size(size)) > self._form.side:
            raise ValueError(f"frame size {size} is above the format's {self._form.side}")
        self._size, self.count = size, self.count + 1

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as they are made."""
        return self._making.size(self._size)


class Animation:
    """An animation that is being made; a context manager that forgets it at its end unless it was finished.

    Frames are encoded and written in the background, as they come. To show them backwards they are kept on
    disk too, as the format encodes them.
    """

    def __init__(
        self, path: Path, timing: Timing, text: str, background: Background, making: Making = AS_IT_IS
    ) -> None:
        """Begins the animation that the ending of ``path`` names.

        Arguments:
            path: Where it appears when whole.
            timing: Times of all frames that may come, and their order.
            text: The generation parameters.
            background: Where frames are encoded.
            making: Their size and quality.

        Raises:
            ValueError: if the format cannot be had or cannot hold it. OSError: if its folder cannot be written.
        """
        self._format = format_of(path, timing)
        self._path, self._timing, self._text, self._background, self._making = path, timing, text, background, making
        self._quality = self._format.best if making.quality is None else making.quality
        self._come = Arrivals(self._format, timing, making)
        self._ticks = Ticks(self._format.ticks_per_second)
        self._container: Container | None = None
        self._pending = b""
        self._places: list[tuple[int, int]] = []
        self._writing, self._closed = Lock(), False
        with ExitStack() as files:
            self._part = files.enter_context(whole(path))
            kept = timing.reverse or timing.ping_pong
            self._spool = files.enter_context(spool(path)) if kept else None
            files.callback(self._close)
            self._files = files.pop_all()

    def __enter__(self) -> Animation:
        return self

    def __exit__(self, *_: object) -> None:
        unfinished = InterruptedError("not finished")  # has the half-written file removed
        self._files.__exit__(InterruptedError, unfinished, None)

    def add(self, frame: Image.Image) -> None:
        """Takes the next frame, an RGB picture that nobody changes any more (others may save it).

        Raises:
            ValueError: if its size is not the first one's or too large, or no time is left for it.
            OSError: if what came before it cannot be written.
        """
        self.add_made(frame.size, self._making.smaller, frame)

    def add_made(self, size: tuple[int, int], make: Callable[..., Image.Image], *args: Any) -> None:
        """Takes the next frame, of ``size``, as ``make(*args)`` makes it in the background; raises as :meth:`add`."""
        self._come.take(size)
        self._background.submit(3 * size[0] * size[1], self._take, self._encode, make, *args)

    def _encode(self, make: Callable[..., Image.Image], *args: Any) -> bytes:
        return self._format.encode(make(*args), self._quality)

    def finish(self, most: float = math.inf) -> int:
        """Writes what is left and closes the file; one of more than ``most`` bytes is forgotten on exit.

        Returns:
            Its bytes.

        Raises:
            ValueError: if no frame has come. OSError: if it cannot be written.
        """
        shown = self._timing.shown(self._come.count)
        self._background.finish()
        with naming(self._path):
            for frame, seconds in shown if self._timing.reverse else shown[self._come.count - 1 :]:
                self._show(self._read(frame), seconds)
            container = self._opened()
            container.finish()
            container.close()
            size = self._part.stat().st_size
        if size <= most:
            self._files.close()
        return size

    def _take(self, blob: bytes) -> None:
        """Writes the frame before, in the background: that it is not the last, which may be held, is only known now."""
        number = len(self._places) - 1
        with self._writing, naming(self._path):
            if self._closed:
                return
            start = 0 if self._spool is None else self._spool.tell()
            if self._spool is not None:
                self._spool.write(blob)
            if not self._timing.reverse and number >= 0:
                self._show(self._pending, self._timing.seconds(number) + (0.0 if number else self._timing.hold_first))
        self._places.append((start, len(blob)))
        self._pending = blob

    def _show(self, blob: bytes, seconds: float) -> None:
        self._opened().add(blob, self._ticks.next(seconds))

    def _opened(self) -> Container:
        if self._container is None:
            timing = self._timing
            about = (self._text, timing.plays, timing.mean(), self._quality)
            self._container = self._format(self._part, self._come.size, *about)
            self._container.begin()
        return self._container

    def _read(self, frame: int) -> bytes:
        """A frame as it was encoded; where none is kept, only the last is asked for."""
        if self._spool is None:
            return self._pending
        start, length = self._places[frame]
        self._spool.seek(start)
        return self._spool.read(length)

    def _close(self) -> None:
        with self._writing:  # libav crashes where a file is closed while another thread still writes to it
            self._closed = True
            if self._container is not None:
                with suppress(Exception):  # what went wrong before is being raised; a whole file is closed already
                    self._container.close()


def check_format(ending: str) -> None:
    """Refuses a format that cannot be written here.

    Raises:
        ValueError: saying what is missing.
    """
    if ending == ".webp" and not features.check("webp"):
        raise ValueError("this Pillow was built without WebP")
    if ending == ".mp4":
        video.load()


def format_of(path: Path, timing: Timing) -> type[Container]:
    """The format that a path's ending names.

    Raises:
        ValueError: if it cannot be written here, or cannot hold such times.
    """
    check_format(path.suffix.lower())
    form = FORMATS[path.suffix.lower()]
    longest = form.ticks / form.ticks_per_second
    if timing.longest() > longest:
        raise ValueError(f"{path}: a frame is shown {timing.longest():g} s, above the format's {longest:g} s")
    return form


def write(path: Path, frames: Iterable[Image.Image], timing: Timing, text: str = "") -> None:
    """Writes an animation, frame by frame."""
    with Background() as background, Animation(path, timing, text, background) as animation:
        for frame in frames:
            animation.add(frame)
        animation.finish()


def write_png(path: Path, picture: Image.Image, text: str = "") -> None:
    """Writes a PNG with its generation parameters."""
    with whole(path) as part:
        picture.save(part, "PNG", pnginfo=parameters(text))
