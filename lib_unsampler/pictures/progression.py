"""From a batch's noise levels to their frames: noised, shown, decoded in chunks and dropped.

The command line and the WebUI share it: they differ in who walks the levels and who decodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..core.noising import blend
from .render import beside, in_chunks, viewed

Item = TypeVar("Item")
Visit = Callable[[int, Tensor, Tensor], bool]
"""Told a level's schedule index, z and masked z on the way; answers whether it is to be shown."""
Decode = Callable[[Tensor], Callable[[], list[Image.Image]]]
"""Decodes latents of shape (N, C, [T,] H, W); what it returns makes their N pictures, on another thread."""


@dataclass(frozen=True)
class Frame:
    """One level's pictures, one for each image: schedule index (None for the source itself) and sigma."""

    index: int | None
    sigma: float
    pictures: list[Image.Image]


@dataclass(frozen=True, eq=False)
class Scene:
    """What the levels of one batch are shown with.

    Attributes:
        source: Clean latents with shape (B, C, [T,] H, W).
        schedule: The descending schedule, with shape (n + 1).
        prediction: ``eps``, ``v`` or ``flow``.
        view: ``variance preserving`` or ``raw``.
        mask: Weights that broadcast against the source, or None; outside them frames show the source.
        estimates: The model's D(z) by schedule index: with them a frame is a panel of source, z, D(z).
        blended: Whether the levels come with the mask already in them.
    """

    source: Tensor
    schedule: Tensor
    prediction: str
    view: str
    mask: Tensor | None = None
    estimates: Mapping[int, Tensor] = field(default_factory=dict)
    blended: bool = False

    def clean(self) -> Tensor:
        """What to decode for the source's own frame."""
        return torch.cat([self.source] * 3) if self.estimates else self.source

    def masked(self, z: Tensor) -> Tensor:
        """A level's z with the source outside the mask."""
        return z if self.blended else blend(z, self.source, self.mask)

    def shown(self, index: int, masked: Tensor) -> Tensor:
        """What to decode for a level's frame, from its masked z."""
        view = viewed(masked, self.source, self.mask, self.schedule[index], self.prediction, self.view)
        return torch.cat([self.source, view, self.estimates[index].to(view)]) if self.estimates else view


def frames(
    walked: Iterable[tuple[int, Tensor]],
    scene: Scene,
    begins_clean: bool,
    decode: Decode,
    chunk: int,
    visit: Visit,
    recover: Callable[[], None] = lambda: None,
) -> Iterator[Frame]:
    """Every frame of a batch, least noisy first; nothing is held but a chunk and the one that is being decoded.

    Arguments:
        walked: The levels as (schedule index, z), least noisy first.
        scene: What they are shown with.
        begins_clean: Whether the source comes first.
        decode: From latents to pictures.
        chunk: Levels to decode at once, at least 1.
        visit: Told every level once, whether it is shown or not.
        recover: Gives memory back after it ran out.
    """

    def views() -> Iterator[tuple[int | None, Tensor]]:
        if begins_clean:
            yield None, scene.clean()
        for index, z in walked:
            masked = scene.masked(z)
            if visit(index, z, masked):
                yield index, scene.shown(index, masked)

    yield from stills(views(), len(scene.source), scene.schedule, decode, chunk, recover)


def stills(
    views: Iterable[tuple[int | None, Tensor]],
    count: int,
    schedule: Tensor,
    decode: Decode,
    chunk: int,
    recover: Callable[[], None] = lambda: None,
) -> Iterator[Frame]:
    """What is to be seen of a batch of ``count`` images as frames, decoded in chunks; see :func:`frames`.

    Arguments:
        views: What to decode as (schedule index, latents): a batch, or a batch's panels one after the other.
    """

    def panels(taken: list[tuple[int | None, Tensor]]) -> list[Callable[[], list[Image.Image]]]:
        made = maker.submit(decode(torch.cat([view for _, view in taken])))
        return [partial(_panels, made, number, len(taken), count) for number in range(len(taken))]

    with ThreadPoolExecutor(1, "unsampler-pictures") as maker:
        for (index, _), made in _behind(in_chunks(views, panels, chunk, recover), chunk):
            yield Frame(index, 0.0 if index is None else float(schedule[index]), made())


def _panels(made: Future[list[Image.Image]], number: int, levels: int, count: int) -> list[Image.Image]:
    """One of several levels' pictures, for each image side by side where it has a panel of more than one."""
    every = made.result()
    size = len(every) // levels
    panel = every[number * size : (number + 1) * size]
    return [beside(panel[image::count]) for image in range(count)]


def _behind(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, each when ``count`` more have come."""
    waiting = deque[Item]()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
