"""Noise draws that are made while the one before them is in use."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from .noising import Draw


class Ahead:
    """A :data:`~.noising.Draw` whose later draws are made on a thread, one ahead of what is asked for.

    Draws 0 and 1 are made when they are asked for: who asks for draw 0 alone pays for no other.
    """

    def __init__(self, draw: Draw, last: int) -> None:
        """``draw`` is called in order, never twice at a time; no draw behind ``last`` is made unasked."""
        self._draw, self._last = draw, last
        self._thread = ThreadPoolExecutor(1, "unsampler-noise")  # ends when this is forgotten
        self._coming: tuple[int, Future[Tensor]] | None = None

    def __call__(self, j: int) -> Tensor:
        """The j-th draw of every image, with shape (B, C, [T,] H, W)."""
        coming, self._coming = self._coming, None
        drawn = None if coming is None else coming[1].result()
        if drawn is None or coming is None or coming[0] != j:
            drawn = self._draw(j)
        if 0 < j < self._last:
            self._coming = (j + 1, self._thread.submit(self._draw, j + 1))
        return drawn
