r"""Anderson-accelerated fixed-point iteration (Walker & Ni 2011), level after level, each image of a batch by itself.

F maps a state to what the sampler's step misses; see :mod:`.inversion`. The vectors stay in the latents' precision on
their device, which is looked at once for each F; the algebra of their products is float64 on the CPU.
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

from .noising import append_dims

MEMORY = 3
"""Secant pairs kept for each image, from level to level."""

CAUTION, LEAST_RATE = 3.0, 0.01
"""An x is accepted without a call to check it if the residual would do at CAUTION times the worst rate of
convergence seen at its level, or LEAST_RATE."""

IMPLAUSIBLE = 3.0
"""The most noise, in units of the first level's sigma, that the last step's x may hold: beyond, no sampler goes."""

PROGRESS, PATIENCE = 0.8, 6
"""Evaluations without a residual below PROGRESS of the best after which a level is left as it is; halfway
there the solver begins again from the best."""

NOTHING = 1e-200 * np.eye(MEMORY)
"""What is added to products of pairs: with it one that is not known, of zeros, takes no part."""

SAMPLED, RUN = 2**13, 64
"""About how many values of large latents products are taken of, in runs of how many."""

Evaluate = Callable[[Tensor, "list[int]"], tuple[Tensor, Tensor, int]]
"""``(x, images) -> (F(x), D(x), model calls)``, x holding the batch's images of these numbers."""


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
        self.size = values if self._every == 1 else len(range(0, values // RUN, self._every)) * RUN

    def of(self, x: Tensor) -> Tensor:
        """Of vectors with shape (..., values), as (..., size)."""
        if self._every == 1:
            return x
        whole = x[..., : x.shape[-1] // RUN * RUN].reshape(*x.shape[:-1], -1, RUN)
        return whole[..., :: self._every, :].flatten(-2)


Evaluated = tuple[Tensor, Tensor, Tensor]
"""x, F(x) and D(x) of some images."""


@dataclass
class Nearest:
    """The nearest that an image has come at a level, and how fast: plain numbers, which a CPU is quickest with.

    Attributes:
        held: What holds its x, F and D, and its row there.
        residual: Of that x; as it is expected to be, where no call has checked it.
        last: The residual of the evaluation before.
        rate: The worst rate of convergence seen.
        stale: Evaluations since the residual last fell below PROGRESS of the best.
        calls: Model calls so far.
    """

    held: tuple[Evaluated, int]
    residual: float = math.inf
    last: float = math.inf
    rate: float = LEAST_RATE
    stale: int = 0
    calls: int = 0

    def seen(self, residual: float, held: tuple[Evaluated, int], calls: int) -> float:
        """Takes in an evaluation; returns the residual that is expected of the x that follows, with caution."""
        self.calls = calls
        self.stale = 0 if residual < PROGRESS * self.residual else self.stale + 1
        self.rate = max(self.rate, residual / self.last)
        expected = math.inf if self.last == math.inf else residual * CAUTION * self.rate
        if residual < self.residual:
            self.residual, self.held = residual, held
        self.last = residual
        return expected

    def of(self) -> tuple[Tensor, ...]:
        """Its own x, F and D."""
        tensors, row = self.held
        return tuple(tensor[row] for tensor in tensors)


def solved(states: list[Nearest]) -> Solved:
    """All images of a batch, where they have come to."""
    x, _, denoised = last = states[0].held[0]
    if any(state.held[0] is not last or state.held[1] != row for row, state in enumerate(states)):
        x, _, denoised = (torch.stack(each) for each in zip(*(state.of() for state in states)))
    residuals = torch.tensor([state.residual for state in states], dtype=torch.float64)
    return Solved(x, denoised, residuals, torch.tensor([state.calls for state in states], dtype=torch.int32))


class Solver:
    r"""Anderson acceleration on F(x) = 0 for each image of a batch by itself, level after level.

    What was learnt of the model's Jacobian J at a level is carried to the next: a secant pair (dx, dF) there
    is a pair (dx, J dx) with :math:`dF = (1 - c) dx + c\, J dx`, :math:`c = 1 - s_{i+1} / s_i`, and along dx
    the model is taken for a Gaussian prior's, :math:`J = v / (v + s^2)`.
    """

    def __init__(self, source: Tensor, tolerance: float, max_calls: int) -> None:
        """``source`` has the batch's shape, precision and device."""
        self.max_calls = max_calls
        size, values = source.flatten(1).shape
        self._pairs = source.new_zeros(size, MEMORY, 2, values)  # dx and dF
        self._sample = Sample(values)
        self._sampled = source.new_zeros(size, 2 * MEMORY + 1, self._sample.size)  # of all dx, dF in turn, and of F
        self._products = np.zeros((size, 2 * MEMORY + 1, 2 * MEMORY + 1))  # among them
        self._makes = np.zeros((size, MEMORY, 2 * MEMORY + 1))  # what pairs change in F at this level, from those
        self._parts = np.ones((size, MEMORY))  # c of the level that a pair was learnt at
        self._turn = np.ones((size, MEMORY))  # by what J has grown since along dx
        self._known = np.zeros((size, MEMORY), bool)
        self._count = [0] * size  # pairs ever kept, of each image
        self._enough = [tolerance] * size  # the residual to reach: twice that below which the model only gives noise
        self._sigma = 0.0
        self._ridge = 1 + max(1e-12, 10 * torch.finfo(source.dtype).eps) * np.eye(MEMORY)

    def solve(self, evaluate: Evaluate, guess: Tensor, above: float, below: float, scale: float) -> Solved:
        """Each image's x at one level, D(x), residual, and the model calls it took.

        Arguments:
            evaluate: F.
            guess: The x to begin with.
            above: The level's sigma.
            below: The sigma that the step leads to.
            scale: What residuals are measured by.
        """
        part, reach = 1 - below / above, IMPLAUSIBLE * above if below == 0 else math.inf
        self._turn_to(above, part)
        states = [Nearest(((guess, guess, guess), row)) for row in range(len(guess))]
        images, x, spent = list(range(len(guess))), guess, 0
        before: tuple[Tensor, Tensor] | None = None
        while images:
            force, denoised, made = evaluate(x, images)
            spent += made
            going: list[int] = []
            ahead: list[int] = []
            for row, (image, missed) in enumerate(zip(images, self._look(images, x, force, part, before))):
                state, residual, enough = states[image], missed / scale, self._enough[image]
                expected = state.seen(residual, ((x, force, denoised), row), spent)
                if residual <= enough:
                    continue
                if expected <= enough:
                    state.residual = expected
                    ahead.append(row)
                elif state.stale >= PATIENCE:
                    self._enough[image] = max(enough, 2 * state.residual) if below > 0 else enough
                elif spent + made <= self.max_calls:
                    going.append(row)
            if not (going or ahead):
                break
            x, force = self._begun_again(images, states, x, force)
            following = _within(reach, guess, images, self._following(images, x, force))
            for row in ahead:
                states[images[row]].held = (following, force, denoised), row
            before = some(x, going), some(force, going)
            images, x = [images[row] for row in going], some(following, going)
        return solved(states)

    def _turn_to(self, sigma: float, part: float) -> None:
        """Moves what was learnt to a new level.

        There a pair's change of F is :math:`y = (1 - c) dx + c t (dF - (1 - c') dx) / c'`, c' the part it was learnt
        at and t its turn.
        """
        if self._sigma:
            with np.errstate(divide="ignore", invalid="ignore"):
                slope = self._slopes()
                self._turn *= np.where(self._known, turned(slope, self._sigma, sigma), 1.0)
        self._sigma = sigma
        growth, slots = part * self._turn / self._parts, np.arange(MEMORY)
        self._makes[:, slots, 2 * slots] = (1 - part - growth * (1 - self._parts)) * self._known
        self._makes[:, slots, 2 * slots + 1] = growth * self._known

    def _slopes(self) -> NDArray[Any]:
        """Each pair's dx . J dx, over dx . dx."""
        moves = np.arange(0, 2 * MEMORY, 2)
        ratio = self._products[:, moves, moves + 1] / self._products[:, moves, moves]
        return np.asarray(self._turn * (ratio - (1 - self._parts)) / self._parts)

    def _look(
        self, images: list[int], x: Tensor, force: Tensor, part: float, before: tuple[Tensor, Tensor] | None
    ) -> list[float]:
        """Keeps the newest pair, and looks at all products and the RMS of each F, which it returns."""
        if before is not None:
            for rows, batch, slot in self._together(images, [self._count[image] % MEMORY for image in images]):
                pair, at = self._pairs[batch, slot], slice(2 * slot, 2 * slot + 2)
                torch.sub(x[rows].flatten(1), before[0][rows].flatten(1), out=pair[:, 0])
                torch.sub(force[rows].flatten(1), before[1][rows].flatten(1), out=pair[:, 1])
                self._sampled[batch, at] = self._sample.of(pair)
                self._parts[batch, slot], self._turn[batch, slot], self._known[batch, slot] = part, 1.0, True
                self._makes[batch, slot, at] = 0.0, 1.0
            for image in images:
                self._count[image] += 1
        flat, sampled = force.flatten(1), some(self._sampled, images)
        sampled[:, -1] = self._sample.of(flat)
        parts = [torch.bmm(sampled, sampled.mT).flatten(1), torch.linalg.vector_norm(flat, dim=1, keepdim=True)]
        looked = torch.cat(parts, 1).cpu().numpy().astype(float)
        self._products[images] = looked[:, :-1].reshape(-1, *self._products.shape[1:])
        missed: list[float] = (looked[:, -1] / flat.shape[1] ** 0.5).tolist()
        return missed

    def _together(self, images: list[int], slots: list[int]) -> list[tuple[slice, slice, int]]:
        """Rows, images and their slot: all at once where they are the whole batch at one slot, else one by one."""
        if len(images) == len(self._count) and len(set(slots)) == 1:
            return [(slice(None), slice(None), slots[0])]
        return [(slice(k, k + 1), slice(i, i + 1), slot) for k, (i, slot) in enumerate(zip(images, slots))]

    def _begun_again(self, images: list[int], states: list[Nearest], x: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        """The images that get no nearer from their best, with nothing learnt."""
        lost = [image for image in images if states[image].stale == PATIENCE // 2]
        if not lost:
            return x, force
        self._known[lost], self._makes[lost] = False, 0.0
        kept = [states[image].of()[:2] if image in lost else (x[k], force[k]) for k, image in enumerate(images)]
        return torch.stack([pair[0] for pair in kept]), torch.stack([pair[1] for pair in kept])

    def _following(self, images: list[int], x: Tensor, force: Tensor) -> Tensor:
        """Anderson's step: by the pairs in what they span, a scaled plain iteration in the rest."""
        numbers = uploaded(self._weights(images), x)
        made = torch.addcmul(x.flatten(1), force.flatten(1), numbers[:, -1:])
        for rows, batch, _ in self._together(images, [0] * len(images)):
            made[rows, None].baddbmm_(numbers[rows, None, :-1], self._pairs[batch].flatten(1, 2))
        return made.view_as(x)

    def _weights(self, images: list[int]) -> NDArray[Any]:
        """The numbers that the step adds up all dx and dF in turn by, and F, with shape (k, 2 M + 1)."""
        makes = self._makes[images]
        meets = makes @ self._products[images]  # of pairs' changes of F, with all dx, dF and F
        among = meets @ makes.swapaxes(1, 2)
        weights = np.linalg.solve(among * self._ridge + NOTHING, meets[:, :, -1:])
        speeds = [1.0] * len(images)
        for row, image in enumerate(images):
            newest = (self._count[image] - 1) % MEMORY
            size, along = among[row, newest, newest], meets[row, newest, 2 * newest]
            if size > 0 and along > 0:
                speeds[row] = min(max(along / size, 0.1), 2.0)
        speed = np.array(speeds)[:, None]
        step = speed * (weights.swapaxes(1, 2) @ makes)[:, 0]
        step[:, :-1:2] -= weights[:, :, 0]
        step[:, -1:] = -speed
        return np.asarray(step)


def turned(slope: NDArray[Any], sigma: NDArray[Any] | float, to_sigma: NDArray[Any] | float) -> NDArray[Any]:
    """By what J grows along a vector from one level to another, if the model is a Gaussian prior's along it.

    There :math:`J = v / (v + s^2)`, v the prior's variance.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.square(sigma) * slope / (1 - slope)
        inside = variance / (variance + np.square(to_sigma)) / slope
        return np.where(slope <= 0, np.square(sigma / to_sigma), np.where(slope < 1, inside, 1.0))


def uploaded(numbers: NDArray[Any], like: Tensor) -> Tensor:
    """Numbers on a tensor's device, without waiting for it: whole ones as they are, others in its precision."""
    made = torch.from_numpy(numbers)
    return (made.to(like.dtype) if made.is_floating_point() else made).to(like.device, non_blocking=like.is_cuda)


def some(x: Tensor, rows: list[int]) -> Tensor:
    """These rows; x itself if they are all."""
    return x if len(rows) == x.shape[0] else x[uploaded(np.array(rows, int), x)]


def _within(reach: float, centre: Tensor, images: list[int], x: Tensor) -> Tensor:
    """x, pulled towards the centre where it is further than ``reach`` (RMS) from it."""
    if reach == math.inf:
        return x
    centre = some(centre, images)
    away = (x - centre).flatten(1).square().mean(1).sqrt()
    return centre + append_dims((reach / away).clamp_max(1.0), x.ndim) * (x - centre)
