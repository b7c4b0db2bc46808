"""The sampling as a film: its own states, or what the model sees in them, kept on disk and shown after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from ..core.kept import Kept
from ..core.noising import variance_preserving
from ..core.schedule import Levels
from ..settings import Settings


class Film:
    """The steps of one batch's sampling that are kept, noisiest first; forgotten on exit."""

    def __init__(self, path: Path, levels: Levels, prediction: str, settings: Settings) -> None:
        """Begins.

        Arguments:
            path: A file in whose folder the states may lie; it is never made here.
            levels: The walk; of its schedule the kept steps are taken.
            prediction: ``eps``, ``v`` or ``flow``.
            settings: How a step is shown.
        """
        self._levels, self._prediction, self._settings = levels, prediction, settings
        self._wanted = set(levels.kept)
        self._stack = ExitStack()
        self._kept = self._stack.enter_context(Kept(path))
        self.indices: list[int] = []

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def listen(self, index: int, state: Tensor, estimate: Tensor) -> None:
        """Takes a step, of schedule index ``index``; thinned as the levels are."""
        if index not in self._wanted:
            return
        shown = estimate if self._settings.film_view == "estimate" else state
        self._kept.add(shown.detach().float().cpu())
        self.indices.append(index)

    def levels(self) -> Iterator[tuple[int, Tensor]]:
        """What to decode for each step, as (schedule index, latents)."""
        as_it_is = self._settings.film_view == "estimate" or self._settings.view == "raw"
        for index, kept in zip(self.indices, self._kept.tensors()):
            sigma = self._levels.schedule[index].to(kept.device)
            yield index, kept if as_it_is else variance_preserving(kept, sigma, self._prediction)
