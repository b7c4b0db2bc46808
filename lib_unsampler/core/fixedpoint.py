r"""Anderson-accelerated fixed-point iteration (Walker & Ni 2011), level after level, each image of a batch by itself.

F maps a state to what the sampler's step misses; see :mod:`.inversion`. The vectors stay in the latents' precision on
their device, which is looked at once for each F; the algebra of their products is float64 on the CPU.
"""

from __future__ import annotations

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

SAMPLED, RUN = 2**13, 64
"""About how many values of large latents products are taken of, in runs of how many."""

Evaluate = Callable[[Tensor, NDArray[Any]], tuple[Tensor, Tensor, int]]
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


class Best:
    """The nearest that each image has come: x, F(x), D(x) and the residual."""

    def __init__(self, guess: Tensor) -> None:
        self.x, self.force, self.denoised = list(guess), list(guess), list(guess)
        self.residual = np.full(len(guess), np.inf)

    def keep(self, images: NDArray[Any], rows: NDArray[Any], residual: NDArray[Any], *of: Tensor) -> None:
        """``of``: x, F and D, whose ``rows`` are those of the images."""
        self.residual[images] = residual
        for image, row in zip(images, rows):
            self.x[image], self.force[image], self.denoised[image] = (tensor[row] for tensor in of)

    def solved(self, calls: NDArray[Any]) -> Solved:
        """All images."""
        x, denoised = (torch.stack(all_) if len(all_) > 1 else all_[0][None] for all_ in (self.x, self.denoised))
        return Solved(x, denoised, torch.from_numpy(self.residual), torch.from_numpy(calls))


class Solver:
    r"""Anderson acceleration on F(x) = 0 for each image of a batch by itself, level after level.

    What was learnt of the model's Jacobian J at a level is carried to the next: a secant pair (dx, dF) there
    is a pair (dx, J dx) with :math:`dF = (1 - c) dx + c\, J dx`, :math:`c = 1 - s_{i+1} / s_i`, and along dx
    the model is taken for a Gaussian prior's, :math:`J = v / (v + s^2)`.
    """

    def __init__(self, source: Tensor, tolerance: float, max_calls: int) -> None:
        """``source`` has the batch's shape, precision and device."""
        self.tolerance = tolerance
        self.max_calls = max_calls
        size = len(source)
        self._pairs = source.new_zeros(size, 2 * MEMORY, source[0].numel())  # dx and dF in turn
        self._sample = Sample(source[0].numel())
        self._sampled = source.new_zeros(size, 2 * MEMORY, self._sample.size)
        self._products = np.zeros((size, 2 * MEMORY, 2 * MEMORY))
        self._parts = np.ones((size, MEMORY))  # c of the level that a pair was learnt at
        self._turn = np.ones((size, MEMORY))  # by what J has grown since along dx
        self._known = np.zeros((size, MEMORY), bool)
        self._count = np.zeros(size, int)  # pairs ever kept, of each image
        self._floor = np.zeros(size)  # the residual below which the model only gives noise
        self._sigma = 0.0
        self._ridge = max(1e-12, 10 * torch.finfo(source.dtype).eps) * np.eye(MEMORY)

    def solve(self, evaluate: Evaluate, guess: Tensor, sigmas: Tensor, scale: float) -> Solved:
        """Each image's x, D(x), residual, and the model calls it took."""
        above, below = sigmas.tolist()
        self._turn_to(above)
        part, reach = 1 - below / above, IMPLAUSIBLE * above if below == 0 else np.inf
        enough, size = np.maximum(2 * self._floor, self.tolerance), len(guess)
        best, calls = Best(guess), np.zeros(size, np.int32)
        stale, rates = np.zeros(size, int), np.full(size, LEAST_RATE)
        images, x = np.arange(size), guess
        before: tuple[Tensor, Tensor, NDArray[Any]] | None = None
        while len(images):
            force, denoised, made = evaluate(x, images)
            calls[images] += made
            residual, along = self._look(images, x, force, part, before)
            residual /= scale
            stale[images] = np.where(residual < PROGRESS * best.residual[images], 0, stale[images] + 1)
            predicted = np.full(len(images), np.inf)
            if before is not None:
                rates[images] = np.maximum(rates[images], residual / before[2])
                predicted = residual * CAUTION * rates[images]
            better = np.flatnonzero(residual < best.residual[images])
            best.keep(images[better], better, residual[better], x, force, denoised)
            lost = stale[images] == PATIENCE // 2
            x, force = self._begun_again(images, lost, best, x, force)
            following = self._following(images, x, force, along, part)
            following = _within(reach, guess, images, following)
            done = residual <= enough[images]
            ahead = ~done & (predicted <= enough[images])
            rows = np.flatnonzero(ahead)
            best.keep(images[rows], rows, predicted[rows], following, force, denoised)
            stuck = ~done & ~ahead & (stale[images] >= PATIENCE)
            if below > 0:
                self._floor[images[stuck]] = best.residual[images[stuck]]
            going = np.flatnonzero(~(done | ahead | stuck | (calls[images] + made > self.max_calls)))
            before = (some(x, going), some(force, going), residual[going])
            images, x = images[going], some(following, going)
        return best.solved(calls)

    def _turn_to(self, sigma: float) -> None:
        """Moves what was learnt to a new level."""
        if self._sigma:
            with np.errstate(divide="ignore", invalid="ignore"):
                slope = self._slopes()
                self._turn *= np.where(self._known, turned(slope, self._sigma, sigma), 1.0)
        self._sigma = sigma

    def _slopes(self) -> NDArray[Any]:
        """Each pair's dx . J dx, over dx . dx."""
        moves = np.arange(0, 2 * MEMORY, 2)
        ratio = self._products[:, moves, moves + 1] / self._products[:, moves, moves]
        return np.asarray(self._turn * (ratio - (1 - self._parts)) / self._parts)

    def _look(
        self,
        images: NDArray[Any],
        x: Tensor,
        force: Tensor,
        part: float,
        before: tuple[Tensor, Tensor, NDArray[Any]] | None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keeps the newest pair, and looks at the RMS of F and at its products with the pairs, with shape (k, 2 M)."""
        slots = self._count[images] % MEMORY
        fresh = [self._sample.of(force.flatten(1))[:, None]]
        if before is not None:
            for row, (image, slot) in enumerate(zip(images, slots)):
                for vector, now, old in zip(self._pairs[image, 2 * slot :], (x, force), before[:2]):
                    torch.sub(now[row], old[row], out=vector.view_as(now[row]))
                self._sampled[image, 2 * slot : 2 * slot + 2] = self._sample.of(self._pairs[image, 2 * slot :][:2])
            rows = uploaded(images[:, None], x), uploaded(2 * slots[:, None] + [0, 1], x)
            fresh.append(self._sampled[rows])
            self._parts[images, slots], self._turn[images, slots], self._known[images, slots] = part, 1.0, True
            self._count[images] += 1
        along = torch.cat(fresh, 1) @ some(self._sampled, images).mT
        sizes = torch.linalg.vector_norm(force.flatten(1), dim=1)
        looked: NDArray[Any] = torch.cat([along.flatten(1), sizes[:, None]], 1).cpu().double().numpy()
        products = looked[:, :-1].reshape(len(images), -1, 2 * MEMORY)
        if before is not None:
            at, across = images[:, None], 2 * slots[:, None] + [0, 1]
            self._products[at, across] = products[:, 1:]
            self._products[at, :, across] = products[:, 1:]
        return looked[:, -1] / force[0].numel() ** 0.5, products[:, 0]

    def _begun_again(
        self, images: NDArray[Any], lost: NDArray[Any], best: Best, x: Tensor, force: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The lost images from their best, with nothing learnt."""
        if not lost.any():
            return x, force
        self._known[images[lost]] = False
        kept = [
            (best.x[i], best.force[i]) if gone else (x[k], force[k]) for k, (i, gone) in enumerate(zip(images, lost))
        ]
        return torch.stack([pair[0] for pair in kept]), torch.stack([pair[1] for pair in kept])

    def _following(self, images: NDArray[Any], x: Tensor, force: Tensor, along: NDArray[Any], part: float) -> Tensor:
        """Anderson's step: by the pairs in what they span, a scaled plain iteration in the rest."""
        speed, weights = self._weights(images, along, part)
        numbers = uploaded(-weights, x)
        made = torch.empty_like(x)
        for row, image in enumerate(images):
            torch.sub(x[row], force[row], alpha=float(speed[row]), out=made[row])
            made[row].flatten().addmv_(self._pairs[image].mT, numbers[row])
        return made

    def _weights(self, images: NDArray[Any], along: NDArray[Any], part: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """By what F, with shape (k), and the pairs, (k, 2 M), make up the step.

        At this level a pair's change of F is :math:`(1 - c) dx + c t (dF - (1 - c') dx) / c'`, c' the part it was
        learnt at and t its turn.
        """
        growth = part * self._turn[images] / self._parts[images]
        known = self._known[images]
        makes = np.zeros((len(images), MEMORY, 2 * MEMORY))  # a pair's change from all dx and dF
        slots = np.arange(MEMORY)
        makes[:, slots, 2 * slots] = (1 - part - growth * (1 - self._parts[images])) * known
        makes[:, slots, 2 * slots + 1] = growth * known
        among = makes @ self._products[images] @ makes.swapaxes(1, 2)
        sizes = np.sqrt(np.maximum(np.einsum("bii->bi", among), 0))
        inverse = np.divide(1, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        makes *= inverse[:, :, None]
        among = among * inverse[:, :, None] * inverse[:, None, :]
        weights = np.linalg.solve(among + self._ridge, makes @ along[:, :, None])
        newest = (self._count[images] - 1) % MEMORY
        rows = np.arange(len(images))
        speed = np.einsum("bj,bj->b", self._products[images, 2 * newest], makes[rows, newest]) * inverse[rows, newest]
        speed = np.where(speed > 0, np.clip(speed, 0.1, 2.0), 1.0)
        step = -speed[:, None] * (weights.swapaxes(1, 2) @ makes)[:, 0]
        step[:, ::2] += weights[:, :, 0] * inverse
        return speed, step


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


def some(x: Tensor, rows: NDArray[Any]) -> Tensor:
    """These rows; x itself if they are all."""
    return x if len(rows) == len(x) else x[uploaded(rows, x)]


def _within(reach: float, centre: Tensor, images: NDArray[Any], x: Tensor) -> Tensor:
    """x, pulled towards the centre where it is further than ``reach`` (RMS) from it."""
    if reach == np.inf:
        return x
    centre = some(centre, images)
    away = (x - centre).flatten(1).square().mean(1).sqrt()
    return centre + append_dims((reach / away).clamp_max(1.0), x.ndim) * (x - centre)
