r"""Anderson-accelerated fixed-point iteration (Walker & Ni 2011), level after level, each image of a batch by itself.

Float64 on the CPU throughout. F maps a state to what the sampler's step misses; see :mod:`.inversion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .noising import append_dims

MEMORY, CARRIED = 6, 3
"""Secant pairs kept for each image at a level, and taken along to the next."""

CAUTION, LEAST_RATE = 3.0, 0.01
"""An x is accepted without a call to check it if the residual would do at CAUTION times the worst rate of
convergence seen at its level, or LEAST_RATE."""

IMPLAUSIBLE = 3.0
"""The most noise, in units of the first level's sigma, that the last step's x may hold: beyond, no sampler goes."""

PROGRESS, PATIENCE = 0.8, 6
"""Evaluations without a residual below PROGRESS of the best after which a level is left as it is; halfway
there the solver begins again from the best."""

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]
"""``(x, images) -> (F(x), D(x), model calls)``, x holding the batch's images of these numbers."""


@dataclass
class Solved:
    """Each image's x, D(x), residual, and the model calls it took."""

    x: Tensor
    denoised: Tensor
    residual: Tensor
    calls: Tensor


class Solver:
    r"""Anderson acceleration on F(x) = 0 for each image of a batch by itself, level after level.

    What was learnt of the model's Jacobian J at a level is carried to the next: a secant pair (dx, dF) there
    is a pair (dx, J dx) with :math:`dF = (1 - c) dx + c\, J dx`, :math:`c = 1 - s_{i+1} / s_i`, and along dx
    the model is taken for a Gaussian prior's, :math:`J = v / (v + s^2)`.
    """

    def __init__(self, source: Tensor, tolerance: float, max_calls: int, memory: int = MEMORY) -> None:
        """``source`` has the batch's shape; ``tolerance`` and ``max_calls`` may be set anew before each level."""
        self.tolerance = tolerance
        self.max_calls = max_calls
        self._memory = memory
        shape = (len(source), memory, source[0].numel())
        self._moves = torch.zeros(shape).double()
        self._answers = torch.zeros(shape).double()  # J dx
        self._count = torch.zeros(len(source)).long()  # pairs ever kept, of each image
        self._floor = torch.zeros(len(source)).double()  # the residual below which the model only gives noise
        self._sigma: Tensor | None = None

    def solve(
        self, evaluate: Evaluate, guess: Tensor, sigmas: Tensor, scale: float, images: Tensor | None = None
    ) -> Solved:
        """Each image's x, D(x), residual, and the model calls it took; those of other images stay as guessed."""
        self._turn_to(sigmas[0])
        part = float(1 - sigmas[1] / sigmas[0])
        enough = torch.maximum(2 * self._floor, torch.tensor(self.tolerance).double())
        reach = IMPLAUSIBLE * float(sigmas[0]) if sigmas[1] == 0 else torch.inf
        size = len(guess)
        best = Solved(guess.clone(), guess.clone(), torch.full((size,), torch.inf).double(), torch.zeros(size).int())
        forces = torch.zeros_like(guess)  # F at the best x
        stale, rates = torch.zeros(size).int(), torch.full((size,), LEAST_RATE).double()
        images = torch.arange(size) if images is None else images
        x = guess[images]
        before: tuple[Tensor, Tensor, Tensor] | None = None
        while len(images):
            force, denoised, calls = evaluate(x, images)
            residual = force.flatten(1).square().mean(1).sqrt() / scale
            best.calls[images] += calls
            stale[images] = torch.where(residual < PROGRESS * best.residual[images], 0, stale[images] + 1).int()
            better = residual < best.residual[images]
            _keep(best, images[better], x[better], denoised[better], residual[better])
            forces[images[better]] = force[better]
            predicted = torch.full_like(residual, torch.inf)
            if before is not None:
                self._learn(images, x - before[0], force - before[1], part)
                rates[images] = torch.maximum(rates[images], residual / before[2])
                predicted = residual * CAUTION * rates[images]
            lost = stale[images] == PATIENCE // 2  # begin again from the best, with nothing learnt
            self._moves[images[lost]] = self._answers[images[lost]] = 0
            x, force = (torch.where(column(lost, x), kept[images], now) for kept, now in ((best.x, x), (forces, force)))
            following = _within(reach, guess[images], x - self._step(images, force, part))
            done = residual <= enough[images]
            ahead = ~done & (predicted <= enough[images])
            _keep(best, images[ahead], following[ahead], denoised[ahead], predicted[ahead])
            stuck = ~done & ~ahead & (stale[images] >= PATIENCE)
            if sigmas[1] > 0:
                self._floor[images[stuck]] = best.residual[images[stuck]]
            going = ~(done | ahead | stuck | (best.calls[images] + calls > self.max_calls))
            before = (x[going], force[going], residual[going])
            images, x = images[going], following[going]
        return best

    def _turn_to(self, sigma: Tensor) -> None:
        """Forgets all but each image's newest pairs and moves those to a new level."""
        if self._sigma is not None:
            age = (self._count[:, None] - 1 - torch.arange(self._memory)) % self._memory
            self._moves[age >= CARRIED] = self._answers[age >= CARRIED] = 0
            slope = (self._moves * self._answers).sum(2) / self._moves.square().sum(2)
            variance = self._sigma**2 * slope / (1 - slope)
            turned = torch.where(slope > 0, variance / (variance + sigma**2) / slope, (self._sigma / sigma) ** 2)
            self._answers *= torch.where(slope < 1, turned, 1.0)[:, :, None]
        self._sigma = sigma

    def _learn(self, images: Tensor, move: Tensor, change: Tensor, part: float) -> None:
        slots = self._count[images] % self._memory
        self._moves[images, slots] = move.flatten(1)
        self._answers[images, slots] = (change - (1 - part) * move).flatten(1) / part
        self._count[images] += 1

    def _step(self, images: Tensor, force: Tensor, part: float) -> Tensor:
        """Anderson's step: by the pairs in what they span, a scaled plain iteration in the rest."""
        moves = self._moves[images].mT
        changes = (1 - part) * moves + part * self._answers[images].mT
        sizes = changes.norm(dim=1, keepdim=True)
        inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
        moves, changes = moves * inverse, changes * inverse
        flat = force.flatten(1)[:, :, None]
        weights: Tensor = torch.linalg.pinv(changes.mT @ changes, rtol=1e-12, hermitian=True) @ (changes.mT @ flat)
        newest = (self._count[images] - 1) % self._memory
        speed = (moves * changes).sum(1)[torch.arange(len(images)), newest]
        speed = torch.where(speed > 0, speed.clamp(0.1, 2.0), 1.0)[:, None, None]
        return (speed * (flat - changes @ weights) + moves @ weights).reshape(force.shape)


def _within(reach: float, centre: Tensor, x: Tensor) -> Tensor:
    """x, pulled towards the centre where it is further than ``reach`` (RMS) from it."""
    away = (x - centre).flatten(1).square().mean(1).sqrt()
    return centre + column((reach / away).clamp_max(1.0), x) * (x - centre) if reach < torch.inf else x


def column(of: Tensor, like: Tensor) -> Tensor:
    """One value for each image, shaped to multiply a batch."""
    return append_dims(of, like.ndim)


def _keep(best: Solved, images: Tensor, x: Tensor, denoised: Tensor, residual: Tensor) -> None:
    best.x[images], best.denoised[images], best.residual[images] = x, denoised, residual
