"""MP4 through PyAV, where it is found: H.264 with every frame at its own time.

PyAV is never installed by this extension. There are no B-frames: they are stored in another order
than shown, and MP4's times of the last ones then come out wrong.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .background import Background, cores
from .files import naming, spool, whole
from .timing import Timing

TICKS = 1000
SIDE = 16384
OPTIONS = {"crf": "18", "bf": "0", "rc-lookahead": "10"}
"""Of libx264: good quality, no B-frames, few frames held (40 by default)."""

HOW_TO_GET = "MP4 needs PyAV, which is not installed here; in the WebUI's environment: pip install av"


def load() -> Any:
    """The module ``av``.

    Raises:
        ValueError: saying how to get it, or that it has no H.264 encoder.
    """
    try:
        import av
        from av.codec import codecs_available
    except ImportError:
        raise ValueError(HOW_TO_GET) from None
    if "libx264" not in codecs_available:
        raise ValueError("MP4 needs a PyAV with libx264, which this one was built without")
    return av


def check_frame(frame: Image.Image, size: tuple[int, int] | None, side: int, number: int, timing: Timing) -> None:
    """Refuses a frame that does not go with those before it, or that the format cannot hold."""
    if number == len(timing.durations):
        raise ValueError(f"more frames than the {number} durations")
    if size is not None and frame.size != size:
        raise ValueError(f"frame {number} is {frame.size}, the first was {size}")
    if max(frame.size) > side:
        raise ValueError(f"frame size {frame.size} is above the format's {side}")


class Video:
    """A video that is being made: frames are encoded as they come, in a thread of its own.

    To show them backwards they are kept on disk, since a video's frames cannot change places.
    """

    def __init__(self, path: Path, timing: Timing, text: str) -> None:
        self._av = load()
        self._path, self._timing, self._text = path, timing, text
        self._kept = timing.reverse or timing.ping_pong
        self._files = ExitStack()
        self._spool = self._files.enter_context(spool(path))  # refuses a bad folder before the work
        self._worker = self._files.enter_context(Background(1))
        self._stream: Any = None
        self._size: tuple[int, int] | None = None
        self._count = 0
        self._pending: Image.Image | None = None
        self._milliseconds: dict[int, int] = {}
        self._seconds = 0.0
        self._finished = False

    def __enter__(self) -> Video:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        error = error or InterruptedError("not finished")  # has the half-written file removed
        self._files.__exit__(type(error), error, None)

    def add(self, frame: Image.Image) -> None:
        """Takes the next frame, an RGB picture that nobody changes any more.

        Raises:
            ValueError: if its size is not the first one's or too large, or no time is left for it.
        """
        check_frame(frame, self._size, SIDE, self._count, self._timing)
        if self._size is None:
            self._size = frame.size
            self._open()
        self._count += 1
        if self._kept:
            with naming(self._path):
                self._spool.write(frame.tobytes())
        if not self._timing.reverse:
            if self._pending is not None:  # that it is not the last is only known now
                number = self._count - 2
                hold = 0.0 if number else self._timing.hold_first
                self._submit(self._pending, self._timing.seconds(number) + hold)
            self._pending = frame

    def finish(self) -> None:
        """Writes what is left and closes the file.

        Raises:
            ValueError: if no frame has come. OSError: if it cannot be written.
        """
        shown = self._timing.shown(self._count)
        for number, seconds in shown if self._timing.reverse else shown[self._count - 1 :]:
            self._submit(self._read(number) if self._kept else self._pending, seconds)
        self._worker.finish()
        with naming(self._path):
            self._mux(None)
        self._finished = True
        self._files.close()

    def _read(self, number: int) -> Image.Image:
        length = 3 * self._size[0] * self._size[1]
        self._spool.seek(number * length)
        return Image.frombytes("RGB", self._size, self._spool.read(length))

    def _open(self) -> None:
        part = self._files.enter_context(whole(self._path))
        self._container = self._av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"})
        self._files.callback(self._close)
        if self._text:
            self._container.metadata["comment"] = self._text
        self._stream = self._container.add_stream("libx264", rate=TICKS, options=OPTIONS)
        self._stream.width, self._stream.height = (side + side % 2 for side in self._size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = cores()
        self._stream.codec_context.time_base = Fraction(1, TICKS)

    def _close(self) -> None:
        self._worker.__exit__()  # libav crashes where a container is closed while a thread still writes to it
        with nullcontext() if self._finished else suppress(Exception):  # what went wrong before is being raised
            self._container.close()

    def _submit(self, picture: Image.Image, seconds: float) -> None:
        self._worker.submit(3 * picture.width * picture.height, lambda _: None, self._encode, picture, seconds)

    def _encode(self, picture: Image.Image, seconds: float) -> None:
        """Encodes one frame; 4:2:0 video has even sides, so an odd one repeats its last row or column."""
        pixels = np.asarray(picture)
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), "edge")
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        start = round(self._seconds * TICKS)
        self._seconds += seconds
        self._milliseconds[start] = round(self._seconds * TICKS) - start
        frame.pts, frame.time_base = start, Fraction(1, TICKS)
        with naming(self._path):
            self._mux(frame)

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            packet.duration = self._milliseconds.pop(packet.pts)  # the last one's is its only time
            self._container.mux(packet)
