"""Noise draws that are made while those before them are in use."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .noising import Draw

MOST = 4
"""Draws that are made ahead: as many as levels that are decoded at once."""


class Ahead:
    """A :data:`~.noising.Draw` whose later draws are made on a thread, some ahead of what is asked for.

    Draws 0 and 1 are made when they are asked for: who asks for draw 0 alone pays for no other. What is made on the
    CPU goes to a GPU only when it is asked for: behind what is being decoded there it would wait for that.
    """

    def __init__(self, draw: Draw, last: int, device: torch.device) -> None:
        """Begins nothing yet.

        Arguments:
            draw: Called in order, never twice at a time.
            last: The last draw that may be made unasked.
            device: Where draws arrive.
        """
        self._draw, self._last = draw, last
        self._device = device
        self._thread = ThreadPoolExecutor(1, "unsampler-noise")  # ends when this is forgotten
        self._coming: deque[tuple[int, Future[Tensor]]] = deque()

    def __call__(self, j: int) -> Tensor:
        """The j-th draw of every image, with shape (B, C, [T,] H, W)."""
        while self._coming and self._coming[0][0] < j:
            self._coming.popleft()
        drawn = self._coming.popleft()[1].result() if self._coming else self._draw(j)
        behind = self._coming[-1][0] if self._coming else j
        while j > 0 and behind < min(self._last, j + MOST):
            behind += 1
            self._coming.append((behind, self._thread.submit(self._draw, behind)))
        return drawn.to(self._device)
