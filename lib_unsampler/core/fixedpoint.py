r"""Anderson-accelerated fixed-point iteration (Walker & Ni 2011), level after level, each image of a batch by itself.

F maps a state to what the sampler's step misses; see :mod:`.inversion`. The vectors stay in the latents' precision on
their device, which is looked at once for each F.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .pairs import WIDTH, Pairs
from .precise import precise

CAUTION, LEAST_RATE = 3.0, 0.01
"""An x is accepted without a call to check it if the residual would do at CAUTION times the worst rate of
convergence seen at its level, or LEAST_RATE."""

IMPLAUSIBLE = 3.0
"""The most noise, in units of the first level's sigma, that the last step's x may hold: beyond, no sampler goes."""

PROGRESS, PATIENCE = 0.8, 6
"""Evaluations without a residual below PROGRESS of the best after which a level is left as it is; halfway
there the solver begins again from the best."""

SAMPLED, RUN = 2**13, 64
"""About how many values of large latents a processor takes products of, in runs of how many; a GPU takes them all."""

PARTS, FEW = 16, 16
"""The most that inner products are summed in; and vectors of which a processor's product is as quick when whole."""

Begin = Callable[[Tensor], object]
"""``(x)`` takes the x to begin with, with the batch's shape."""

Evaluate = Callable[[Tensor, Tensor, "list[int]"], tuple[Tensor, int]]
"""``(x, force, images) -> (D(x), model calls)``, x holding the batch's images of these numbers; ``force``, with shape
(k, values), takes F(x)."""


@dataclass
class Solved:
    """Each image's x, D(x), residual, and the model calls it took; the latter two on the CPU."""

    x: Tensor
    denoised: Tensor
    residual: Tensor
    calls: Tensor


class Sample:
    """The part of a large latent that products are taken of: runs of values, evenly spread.

    They decide only how fast the iteration converges; the residual is of all values.
    """

    def __init__(self, values: int, about: int = SAMPLED) -> None:
        self._every = max(1, values // about)
        self._run = RUN if self._every > 1 else values
        self.shape = len(range(0, values // self._run, self._every)), self._run
        self.size = math.prod(self.shape)

    def of(self, x: Tensor) -> Tensor:
        """Of vectors with shape (..., values), a view with shape (..., *shape)."""
        return x.as_strided((*x.shape[:-1], *self.shape), (*x.stride()[:-1], self._every * self._run, 1))


Evaluated = tuple[Tensor, Tensor]
"""x and F(x) of some images, with shape (2, k, values), and D(x)."""


@dataclass
class Nearest:
    """The nearest that an image has come at a level, and how fast: plain numbers, which a CPU is quickest with.

    Attributes:
        held: What holds its x, F and D, and its row there.
        residual: Of that x; as it is expected to be, where no call has checked it.
        last: The residual of the last evaluation.
        expected: That of the x that follows it, with caution.
        rate: The worst rate of convergence seen.
        stale: Evaluations since the residual last fell below PROGRESS of the best.
        calls: Model calls so far.
    """

    held: tuple[Evaluated, int]
    residual: float = math.inf
    last: float = math.inf
    expected: float = math.inf
    rate: float = LEAST_RATE
    stale: int = 0
    calls: int = 0

    def seen(self, residual: float, held: tuple[Evaluated, int], calls: int) -> None:
        """Takes in an evaluation."""
        self.calls = calls
        self.stale = 0 if residual < PROGRESS * self.residual else self.stale + 1
        self.rate = max(self.rate, residual / self.last)
        self.expected = math.inf if self.last == math.inf else residual * CAUTION * self.rate
        if residual < self.residual:
            self.residual, self.held = residual, held
        self.last = residual

    def of(self) -> Evaluated:
        """Its own x and F, with shape (2, values), and D."""
        (both, denoised), row = self.held
        return both[:, row], denoised[row]


def solved(states: list[Nearest], shape: torch.Size) -> Solved:
    """All images of a batch, where they have come to."""
    (both, denoised), _ = states[0].held
    if all(state.held[0][0] is both and state.held[1] == row for row, state in enumerate(states)):
        x = both[0].clone() if len(both) > 1 else both[0]  # a level is kept for longer than its F
    else:
        own = [state.of() for state in states]
        x, denoised = torch.stack([both[0] for both, _ in own]), torch.stack([denoised for _, denoised in own])
    residuals = torch.tensor([state.residual for state in states], dtype=torch.float64)
    calls = torch.tensor([state.calls for state in states], dtype=torch.int32)
    return Solved(x.view(shape), denoised, residuals, calls)


class Solver:
    """Anderson acceleration on F(x) = 0 for each image of a batch by itself, level after level (:mod:`.pairs`)."""

    def __init__(self, source: Tensor, tolerance: float, max_calls: int) -> None:
        """``source`` has the batch's shape, precision and device."""
        self.max_calls = max_calls
        self._shape = source.shape
        size, values = source.flatten(1).shape
        self._sample = Sample(values, values if source.is_cuda else SAMPLED)
        self._sampled = source.new_zeros(WIDTH, size, *self._sample.shape)  # of dx and dF in turn, and of F
        self._apart = in_parts(self._sampled.flatten(2))
        self._whole = self._sample.size == values
        self._pairs = self._sampled.flatten(2)[:-1] if self._whole else source.new_zeros(WIDTH - 1, size, values)
        self._learnt = [Pairs() for _ in range(size)]
        self._enough = [tolerance] * size  # the residual to reach: twice that below which the model only gives noise
        self._sigma = 0.0
        self._ridge = 1 + max(1e-12, 10 * torch.finfo(source.dtype).eps)

    def solve(self, evaluate: Evaluate, begin: Begin, above: float, below: float, scale: float) -> Solved:
        """Each image's x at one level, D(x), residual, and the model calls it took.

        Arguments:
            evaluate: F.
            begin: What the first x is.
            above: The level's sigma.
            below: The sigma that the step leads to.
            scale: What residuals are measured by.
        """
        part, reach = 1 - below / above, IMPLAUSIBLE * above if below == 0 else math.inf
        for learnt in self._learnt:
            learnt.turn(self._sigma, above, part)
        self._sigma = above
        images, spent = list(range(len(self._learnt))), 0
        both = self._room(2, len(images))
        begin(both[0].view(self._shape))
        centre = both[0].clone() if reach < math.inf else both[0]
        states = [Nearest(((both, both[0]), row)) for row in images]
        before: Tensor | None = None
        while images:
            denoised, made = evaluate(both[0].view(-1, *self._shape[1:]), both[1], images)
            spent += made
            with precise():
                residuals = [missed / scale for missed in self._look(images, both, part, before)]
                for row, (image, residual) in enumerate(zip(images, residuals)):
                    states[image].seen(residual, ((both, denoised), row), spent)
                going, ahead = self._judged(images, states, spent + made <= self.max_calls, below > 0)
                if not (going or ahead):
                    break
                both = self._begun_again(images, states, both)
                following = self._following(images, both, reach, centre, self._room(2 if going else 1, len(images)))
            for row in ahead:
                states[images[row]].held = (following, denoised), row
            before = some(both, going, 1)
            images, both = [images[row] for row in going], some(following, going, 1)
        return solved(states, self._shape)

    def _judged(
        self, images: list[int], states: list[Nearest], more: bool, lenient: bool
    ) -> tuple[list[int], list[int]]:
        """The rows to evaluate once more, and those whose following x is expected to do without.

        Arguments:
            images: Those of the rows.
            states: Of all images.
            more: Whether there are calls left.
            lenient: Whether an image that gets no nearer asks less of the levels that follow.
        """
        going: list[int] = []
        ahead: list[int] = []
        for row, image in enumerate(images):
            state, enough = states[image], self._enough[image]
            if state.last <= enough:
                continue
            if state.expected <= enough:
                state.residual = state.expected
                ahead.append(row)
            elif state.stale >= PATIENCE:
                self._enough[image] = max(enough, 2 * state.residual) if lenient else enough
            elif more:
                going.append(row)
        return going, ahead

    def _room(self, rows: int, count: int) -> Tensor:
        """For x alone, or for x and F."""
        return self._pairs.new_empty(rows, count, self._pairs.shape[2])

    def _look(self, images: list[int], both: Tensor, part: float, before: Tensor | None) -> list[float]:
        """Keeps the newest pair, and looks at all products and the RMS of each F, which it returns."""
        if before is not None:
            for rows, batch, slot in self._together(images, [self._learnt[image].free for image in images]):
                pair = self._pairs[2 * slot : 2 * slot + 2, batch]
                torch.sub(both[:, rows], before[:, rows], out=pair)
                if not self._whole:
                    self._sampled[2 * slot : 2 * slot + 2, batch] = self._sample.of(pair)
            for image in images:
                self._learnt[image].keep(part)
        sampled = some(self._sampled, images, 1)
        sampled[-1] = self._sample.of(both[1])
        apart = self._apart if sampled is self._sampled else in_parts(sampled.flatten(2))
        looked = torch.bmm(apart, apart.mT).view(len(images), -1, WIDTH**2).sum(1)
        values = both.shape[2]
        if not self._whole:
            norms = torch.linalg.vector_norm(both[1].view(len(images), parts(values), -1), dim=2)
            looked = torch.cat([looked, norms], 1)
        missed: list[float] = []
        for image, seen in zip(images, looked.tolist()):
            self._learnt[image].products, norms = seen[: WIDTH**2], seen[WIDTH**2 :] or [seen[-1] ** 0.5]
            missed.append(math.hypot(*norms) / values**0.5)
        return missed

    def _together(self, images: list[int], slots: list[int]) -> list[tuple[slice, slice, int]]:
        """Rows, images and their slot: all at once where they are the whole batch at one slot, else one by one."""
        if len(images) == len(self._learnt) and len(set(slots)) == 1:
            return [(slice(None), slice(None), slots[0])]
        return [(slice(k, k + 1), slice(i, i + 1), slot) for k, (i, slot) in enumerate(zip(images, slots))]

    def _begun_again(self, images: list[int], states: list[Nearest], both: Tensor) -> Tensor:
        """The images that get no nearer from their best, with nothing learnt."""
        lost = [image for image in images if states[image].stale == PATIENCE // 2]
        if not lost:
            return both
        for image in lost:
            self._learnt[image].forget()
        kept = [states[image].of()[0] if image in lost else both[:, k] for k, image in enumerate(images)]
        return torch.stack(kept, 1)

    def _following(self, images: list[int], both: Tensor, reach: float, centre: Tensor, room: Tensor) -> Tensor:
        """The room, with the next x in it."""
        numbers = torch.tensor([self._learnt[image].step(self._ridge) for image in images], dtype=both.dtype)
        numbers = numbers.to(both.device, non_blocking=True)
        torch.addcmul(both[0], both[1], numbers[:, -1:], out=room[0])
        for rows, batch, _ in self._together(images, [0] * len(images)):
            room[0, rows, None].baddbmm_(numbers[rows, None, :-1], self._pairs[:, batch].transpose(0, 1))
        if reach < math.inf:
            self._pull(room[0], some(centre, images), reach)
        return room

    def _pull(self, x: Tensor, centre: Tensor, reach: float) -> None:
        """Pulls x towards the centre where it seems further than ``reach`` (RMS) from it."""
        away = torch.sub(self._sample.of(x), self._sample.of(centre)).square_().mean((1, 2)).sqrt_()
        torch.lerp(centre, x, (reach / away).clamp_max_(1.0)[:, None], out=x)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors with shape (n, B, K) and (m, B, K), as (B, n, m)."""
    if not a.is_cuda and len(a) >= FEW:
        return torch.bmm(a.transpose(0, 1), b.permute(1, 2, 0))
    size, values = a.shape[1:]
    return torch.bmm(in_parts(a), in_parts(b).mT).view(size, parts(values), len(a), len(b)).sum(1)


def in_parts(vectors: Tensor) -> Tensor:
    """Vectors with shape (n, B, K), parted, as (B * parts, n, K / parts).

    A product of few rows goes along its inner dimension with one thread, or few programs of a GPU.
    """
    count, size, values = vectors.shape
    return vectors.view(count, size * parts(values), values // parts(values)).transpose(0, 1)


def parts(values: int) -> int:
    """How many equal parts vectors of so many values are taken in."""
    return next(count for count in range(PARTS, 0, -1) if values % count == 0)


def uploaded(numbers: NDArray[Any], like: Tensor) -> Tensor:
    """Numbers on a tensor's device, without waiting for it: whole ones as they are, others in its precision."""
    made = torch.from_numpy(numbers)
    return (made.to(like.dtype) if made.is_floating_point() else made).to(like.device, non_blocking=like.is_cuda)


def some(x: Tensor, rows: list[int], dim: int = 0) -> Tensor:
    """These rows; x itself if they are all."""
    return x if len(rows) == x.shape[dim] else x.index_select(dim, uploaded(np.array(rows, int), x))
