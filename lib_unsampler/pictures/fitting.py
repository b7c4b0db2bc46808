r"""Animations of at most so many bytes: the quality goes first, then the side; never a frame or its time.

What a quality and a side make of a film is told by a small film of it: strips of some of its frames, spread over time
and height, written by the format itself. Where the logarithm of its bytes is known at a few points of the way from
the best quality at full size to the worst at the smallest, it is taken as straight between them, and beyond the last
as what fewer pixels make of it,

.. math:: \log b = \log b_0 + p \log (\text{side} / \text{side}_0), \quad 1.5 \le p = 1 + n \le 2

where n is the film's bytes over those of noise: smaller noise is as rough as before (p = 2), all else is rougher. No
side is tried before the worst quality is known. So most films are written once, and once more where the strips misled.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..files import naming, spool
from .animation import Animation, Arrivals, Making, format_of
from .background import Background
from .containers import Apng, Container, Gif, WebP
from .scaling import lanczos
from .timing import Timing
from .video import Mp4

MEGABYTE = 10**6
SMALLEST = 128
"""Pixels of the longest side; frames are made no smaller for the sake of bytes."""


@dataclass(frozen=True)
class Sample:
    """What of a format's film a small film of it is made of.

    Attributes:
        every: One of so many frames, and two at least: a GIF's small frames take nearly as long as its large ones.
        most: Frames at most; H.264 builds each on the last, so it needs all.
        strip: Rows that go together: what a format predicts from above, it does within so many; a palette is of all.
        target: Of the bytes there are: how far what is foretold can be trusted.
        falls: Bytes at the worst quality over those at the best, about.
        noise: Bytes of a pixel of normal noise, where the side alone can go.
        near: Bytes over those aimed at, up to which what is known of the way there will do.
    """

    every: int
    most: float
    strip: int
    target: float
    falls: float
    noise: float
    near: float


SAMPLES: dict[type[Container], Sample] = {
    Gif: Sample(12, 16, Gif.side, 0.94, 1.0, 1.15, 2.2),
    Apng: Sample(1, 64, 8, 0.97, 1.0, 2.75, 1.1),
    WebP: Sample(1, 64, 16, 0.97, 0.5, math.inf, 1.1),
    Mp4: Sample(1, math.inf, 16, 0.97, 0.15, math.inf, 1.25),
}

MOST_FORETOLD = 4
"""Small films that are made at most; fewer where one has nearly the bytes that are aimed at."""

NEAR = 0.8
"""As a sample's ``near``, where they are fewer."""

SHARE = 1 / 16
"""Of the film's pixels that are in a small film, about."""

WEIGHED = 32
"""One row of so many says how much there is in a frame, beside others."""

LEAST_PIXELS = 2**13
"""Of a frame's strips together."""

LEAST_POWER = 1.5
"""P in the law above, where the bytes of noise are not known too."""

LEAST_STEP = 0.02
"""Of the way, where a file came out too large by its side."""

GOLDEN = 0.618
"""Where the strips of one frame lie below those of the last: no two frames show the same rows."""


@dataclass(frozen=True)
class Fit:
    """What was made of an animation to keep it small.

    Attributes:
        size: Width and height of its frames.
        quality: On the format's own scale; None where it has but one.
        bytes: Of the file.
        most: Bytes it may have; one of more was not kept.
    """

    size: tuple[int, int]
    quality: int | None
    bytes: int
    most: int

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self.bytes <= self.most

    def told(self) -> dict[str, Any]:
        """As plain values."""
        width, height = self.size
        return {"width": width, "height": height, "quality": self.quality, "bytes": self.bytes}

    def said(self) -> str:
        """In words."""
        size = f"{self.size[0]} x {self.size[1]}" + ("" if self.quality is None else f", quality {self.quality}")
        if self.kept:
            return f"max_megabytes: {self.bytes / MEGABYTE:.3g} MB at {size}"
        return (
            f"max_megabytes: not made, since {self.most / MEGABYTE:g} MB cannot be kept: "
            f"at {size} it has {self.bytes / MEGABYTE:.3g} MB"
        )


class Way:
    """From the best quality at full size to the worst at the smallest, as a number from 0 to its end."""

    def __init__(self, form: type[Container], size: tuple[int, int], frames: int) -> None:
        """``size`` is the full one, of so many frames."""
        side = max(size)
        self._side, self._least = side, min(side, SMALLEST)
        self._best, self._lost, self._sample = form.best, form.worst - form.best, SAMPLES[form]
        self.worst = float(self._lost != 0)
        """Where the quality is lowest and the size still full."""
        self.end = self.worst + (side > SMALLEST)
        self._noise = size[0] * size[1] * frames * self._sample.noise
        self._known: dict[float, float] = {}

    def making(self, at: float) -> Making:
        """The size and quality of a place."""
        quality = self._best + round(self._lost * min(1.0, at))
        side = math.floor(self._side * (self._least / self._side) ** max(0.0, at - self.worst) + 1e-6)
        return Making(max(self._least, side), quality)

    def learn(self, at: float, count: int) -> None:
        """A place's bytes, as they are foretold."""
        self._known[at] = math.log(count)

    def correct(self, at: float, count: int) -> None:
        """A place's bytes, as they are: what was foretold was wrong by as much everywhere."""
        wrong = math.log(count) - float(np.interp(at, *self._line()))
        self._known = {place: known + wrong for place, known in self._known.items()}
        self.learn(at, count)

    def aim(self, most: float) -> float:
        """The first place at which the file may have ``most`` bytes; if there is none, the end of what is known."""
        places, logs = self._line()
        at = float(np.interp(-math.log(most), [-log for log in logs], places))
        steps = abs(self._lost)
        return math.ceil(at * steps - 1e-6) / steps if at < self.worst else at  # a quality is a whole number

    def after(self, at: float) -> float:
        """The next place that is worth another try."""
        return min(self.end, at + (1 / abs(self._lost) if at < self.worst else LEAST_STEP))

    def _line(self) -> tuple[list[float], list[float]]:
        """The places that are known and, by the laws above, the next end of quality or side; logarithms of bytes."""
        known = dict(self._known)
        last = max(known)
        if last < self.worst:
            known[self.worst] = known[last] + (self.worst - last) * math.log(self._sample.falls)
        elif last < self.end:
            power = min(2.0, max(LEAST_POWER, 1 + math.exp(known[0.0]) / self._noise))
            known[self.end] = known[last] + (self.end - last) * power * math.log(self._least / self._side)
        places = sorted(known)
        return places, list(accumulate((known[place] for place in places), min))


class Fitted:
    """An animation of limited size; takes and gives what :class:`.animation.Animation` does.

    Frames wait on disk, as they are, until all have come.
    """

    def __init__(self, path: Path, timing: Timing, text: str, background: Background, first: Making, most: int) -> None:
        """Begins; see :class:`.animation.Animation`.

        Arguments:
            first: What the frames are made to in any case.
            most: Bytes of the file at most.
        """
        self._format = format_of(path, timing)
        self._path, self._timing, self._text, self._background = path, timing, text, background
        self._first, self._most = first, most
        self._come = Arrivals(self._format, timing, self._first)
        self._weights: list[int] = []
        with ExitStack() as files:
            self._spool = files.enter_context(spool(path))
            self._files = files.pop_all()

    def __enter__(self) -> Fitted:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, frame: Image.Image) -> None:
        """As :meth:`.animation.Animation.add`."""
        self._come.take(frame.size)
        self._background.submit(3 * frame.width * frame.height, self._keep, self._ready, frame)

    def _ready(self, frame: Image.Image) -> tuple[bytes, int]:
        """A frame's pixels, and its weight where not all are sampled: what the steps in some rows deflate to."""
        frame = self._first.smaller(frame)
        if len(self._taken(len(self._timing.durations))) == len(self._timing.durations):
            return frame.tobytes(), 1
        some = frame.resize((frame.width, max(1, frame.height // WEIGHED)), Image.Resampling.NEAREST)
        deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        return frame.tobytes(), len(deflate.compress(np.diff(np.asarray(some), axis=1).data) + deflate.flush())

    def _keep(self, ready: tuple[bytes, int]) -> None:
        pixels, weight = ready
        self._weights.append(weight)
        with naming(self._path):
            self._spool.write(pixels)

    def finish(self) -> Fit:
        """Writes the file, if it can be small enough.

        Raises:
            ValueError: if no frame has come. OSError: if it cannot be written.
        """
        shown = self._timing.shown(self._come.count)  # there is one at least
        self._background.finish()
        way = Way(self._format, self._come.size, len(shown))
        target = max(1.0, SAMPLES[self._format].target * self._most)
        at = self._place(way, target)
        while True:
            making = way.making(at)
            count = self._write(making)
            if count <= self._most or at == way.end:
                quality = making.quality if way.worst else None
                return Fit(making.size(self._come.size), quality, count, self._most)
            way.correct(at, count)
            target *= self._most / count  # twice as far: what misled once may mislead again
            at = max(way.aim(target), way.after(at))

    def _place(self, way: Way, target: float) -> float:
        """Where on the way the file may have ``target`` bytes, as the strips foretell it."""
        at = 0.0
        for _ in range(MOST_FORETOLD):
            count = self._foretold(way.making(at))
            way.learn(at, count)
            before, at = at, way.aim(target)
            if at == before or NEAR <= count / target <= SAMPLES[self._format].near:
                break
        return at

    def _write(self, making: Making) -> int:
        """Writes the file; returns its bytes, which may be too many: then there is none."""
        with Animation(self._path, self._timing, self._text, self._background, making) as animation:
            for number in range(self._come.count):
                animation.add_made(self._come.size, lanczos, self._read(number), making.size(self._come.size))
            return animation.finish(self._most)

    def _read(self, number: int) -> NDArray[np.uint8]:
        width, height = self._come.size
        length = 3 * width * height
        self._spool.seek(number * length)
        return np.frombuffer(bytearray(self._spool.read(length)), np.uint8).reshape(height, width, 3)

    # What a making comes to

    def _foretold(self, making: Making) -> int:
        """Bytes of the file, as a small film of strips has them."""
        form, size, taken = self._format, making.size(self._come.size), self._taken(self._come.count)
        strip = SAMPLES[form].strip
        rows = _rows(size, SHARE * self._come.count / len(taken), strip)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"strips{self._path.suffix}"
            plain = Making(None, making.quality)
            with Animation(path, self._timing, "", self._background, plain) as strips:
                for number in taken:
                    phase = 0.5 if form is Mp4 else number * GOLDEN % 1
                    strips.add(_strips(self._read(number), size, rows, strip, phase))
                small = strips.finish()
        shown, few = self._timing.shown(self._come.count), self._timing.shown(len(taken))
        part = sum(self._weights[taken[number]] for number, _ in few) / sum(
            self._weights[number] for number, _ in shown
        )
        pixels = max(1, small - form.base - len(few) * form.overhead) * (size[1] / rows) / part
        return round(pixels + form.base + len(shown) * form.overhead + 2 * len(self._text.encode()))

    def _taken(self, count: int) -> list[int]:
        """Which of so many frames a small film has: one of each stretch of the whole, at another place in each."""
        sample = SAMPLES[self._format]
        taken = int(min(max(math.ceil(count / sample.every), 2), count, sample.most))
        return [math.floor((part + (part * GOLDEN + 0.5) % 1) * count / taken) for part in range(taken)]


def _rows(size: tuple[int, int], share: float, strip: int) -> int:
    """Rows of a frame's strips together."""
    width, height = size
    strips = max(round(share * height / strip), math.ceil(LEAST_PIXELS / (width * strip)))
    return min(height, strips * strip)


def _strips(pixels: NDArray[np.uint8], size: tuple[int, int], rows: int, strip: int, phase: float) -> Image.Image:
    """Strips of a frame at another size, spread over its height from ``phase`` on, one under the other."""
    width, height = size
    if rows == height:
        return lanczos(pixels, size)
    frame, page = Image.fromarray(pixels), Image.new("RGB", (width, rows))
    count, scale = rows // strip, frame.height / height
    for number in range(count):
        top = round((number + phase) / count * (height - strip))
        box = (0, top * scale, frame.width, (top + strip) * scale)
        page.paste(frame.resize((width, strip), Image.Resampling.LANCZOS, box=box), (0, number * strip))
    return page
