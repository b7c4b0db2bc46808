"""MP4 through PyAV, where it is found: H.264 with every frame at its own time.

PyAV is never installed by this extension. There are no B-frames: they are stored in another order
than shown, and MP4's times of the last ones then come out wrong.

The colours are BT.709's, and the file says so: a player that is told nothing guesses by the picture's size.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .background import cores

OPTIONS = {"bf": "0", "rc-lookahead": "10"}
"""Of libx264: no B-frames, few frames held (40 by default)."""

BT709, LIMITED = 1, 1
"""ITU-T H.273's number for the primaries, the transfer and the matrix, and libav's for black at 16 and white at 235."""

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


class Mp4:
    """A :class:`.containers.Container` that stores pixels until they are added, since video frames are one chain."""

    side, ticks_per_second, ticks = 16384, 1000, 2**31 - 1
    best, worst, base, overhead = 18, 40, 1600, 40  # x264's constant rate factor: six more halve the bytes

    def __init__(self, path: Path, size: tuple[int, int], text: str, plays: int, mean: float, quality: int) -> None:
        self._av, self._size, self._text, self._mean, self._quality = load(), size, text, mean, quality
        self._start, self._ticks = 0, dict[int, int]()
        self._file = self._av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})

    def begin(self) -> None:
        if self._text:
            self._file.metadata["comment"] = self._text
        rate = Fraction(1 / self._mean).limit_denominator(1000)  # x264 takes the level from it, not from the times
        options = {"crf": str(self._quality), **OPTIONS}
        self._stream = self._file.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height = (side + side % 2 for side in self._size)
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.thread_count = cores()
        context.time_base = Fraction(1, self.ticks_per_second)
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED

    @staticmethod
    def encode(frame: Image.Image, quality: int) -> bytes:
        """The frame's pixels."""
        return frame.tobytes()

    def add(self, blob: bytes, ticks: int) -> None:
        """Encodes one frame; 4:2:0 video has even sides, so an odd one repeats its last row or column."""
        width, height = self._size
        pixels = np.frombuffer(blob, np.uint8).reshape(height, width, 3)
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED, interpolation="AREA"
        )  # of the ways to halve the colours' resolution the one that keeps a patch's inside as it is
        frame.pts, frame.time_base = self._start, Fraction(1, self.ticks_per_second)
        self._ticks[self._start] = ticks
        self._start += ticks
        self._mux(frame)

    def finish(self) -> None:
        self._mux(None)

    def close(self) -> None:
        self._file.close()

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            packet.duration = self._ticks.pop(packet.pts)  # the last one's is its only time
            self._file.mux(packet)
