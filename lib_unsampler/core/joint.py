r"""Exact inversion where a sampler's step also depends on the model's answer one level above (DPM++ 2M).

.. math:: y_i = \alpha_i x_i + \beta_i D(x_i; s_i) + \gamma_i D(x_{i-1}; s_{i-1}), \quad y_i = x_{i+1}

One level alone can not be solved for, all together can: in sweeps over the levels, least noisy first, each with
the D above that the sweep before left, moved by what this sweep has changed at the level below. A level's
residual counts what its own equation misses, and what the D above has changed since. Sweeps bring the residual
down to about 0.4 of it each; under strong guidance they may not converge, which the residuals show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fixedpoint import CARRIED, PATIENCE, PROGRESS, Solver, column

Denoise = Callable[[Tensor, Tensor, int, "Tensor | None"], Tensor]
"""``(x, sigma, place, images) -> D``, at the level of this place in the walk."""

FIRST_TOLERANCE, TIGHTER = 1e-2, 0.2
"""The first sweep's tolerance at a level, and what it becomes from sweep to sweep."""


@dataclass(frozen=True)
class Affine:
    """A step's factors of its start, of D there and of D one level above, asked of the sampler's function."""

    start: float
    here: float
    above: float

    @staticmethod
    def of(function: Callable[..., Tensor], sigmas: Tensor) -> Affine:
        """``sigmas``: of the level above if there is one, the start's and the end's."""

        def ends(x: float, *answers: float) -> float:
            said = iter(answers)

            def denoise(z: Tensor, sigma: Tensor, **_: Any) -> Tensor:
                return torch.full_like(z, next(said))

            return float(function(denoise, torch.full((1, 1), x).double(), sigmas, extra_args={}, disable=True))

        if len(sigmas) == 2:
            return Affine(ends(1, 0), ends(0, 1), 0.0)
        into = float(function(lambda z, sigma, **_: 0 * z, torch.ones(1, 1).double(), sigmas[:2], disable=True))
        shift = float(function(lambda z, sigma, **_: 0 * z + 1, torch.zeros(1, 1).double(), sigmas[:2], disable=True))
        start = ends(1 / into, 0, 0)
        return Affine(start, ends(0, 0, 1), ends(-shift / into, 1, 0))


def extrapolated(past: Sequence[tuple[Tensor, Tensor]], sigma: Tensor, otherwise: Tensor) -> Tensor:
    """D at a level from those of the two levels below it, newest first, linearly in log sigma."""
    if not past:
        return otherwise
    (s0, d0), (s1, d1) = past[0], past[-1]
    return d0 if s0 == s1 else d0 + (sigma / s0).log() / (s0 / s1).log() * (d0 - d1)


def chosen(images: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for these images, ``old`` for the others."""
    return torch.where(column(torch.isin(torch.arange(len(old)), images), old), new, old)


class Joint:
    """The states of all levels of a batch, least noisy first, as they are swept.

    Attributes:
        x: The states, one for each level, with the source's shape.
        d: The model's answers there.
        residual: With shape (levels, B).
        calls: Model calls, with shape (levels, B).
    """

    def __init__(
        self, function: Callable[..., Tensor], denoise: Denoise, source: Tensor, rising: Tensor, scales: Sequence[float]
    ) -> None:
        """Asks the sampler's function for the factors of its steps.

        Arguments:
            function: The sampler's.
            denoise: The model.
            source: The clean latents in float64 on the CPU, with shape (B, ...).
            rising: The source's own sigma, mostly 0, and the levels' sigmas, rising, with shape (levels + 1).
            scales: What residuals are measured by at each level.
        """
        size, count = len(source), len(rising) - 1
        self._denoise, self._source, self._sigmas, self._scales = denoise, source, rising[1:], scales
        windows = (rising[place : place + 3].flip(0) for place in range(count))
        self._steps = [Affine.of(function, window) for window in windows]
        self._below = rising[:-1]
        self._ends = int(rising[0] == 0)  # the first level is the sampler's last step, which nothing above moves
        self._solvers = [Solver(source, 0.0, 1, CARRIED) for _ in range(count)]
        self._own = torch.full((count, size), torch.inf).double()
        self.x: list[Tensor] = []
        self.d: list[Tensor] = []
        self.residual = self._own.clone()
        self.calls = torch.zeros(count, size).int()

    def solve(self, tolerance: float, max_calls: int) -> None:
        """Sweeps until every image's residuals are within the tolerance, get no smaller, or calls run out."""
        size = len(self._source)
        worst, stale = torch.full((size,), torch.inf).double(), torch.zeros(size).int()
        images, sweep = torch.arange(size), 0
        while len(images):
            self._sweep(images, sweep, tolerance, max_calls)
            # what the last step misses stays, however often the others are swept
            now = self.residual[self._ends :].amax(0) if len(self.x) > self._ends else torch.zeros(size).double()
            stale[images] = torch.where(now < PROGRESS * worst, 0, stale + 1)[images].int()
            worst = torch.minimum(worst, now)
            going = (now > tolerance) & (stale < PATIENCE // 2) & (self.calls.amax(0) < max_calls)
            images, sweep = images[going[images]], sweep + 1

    def _sweep(self, images: Tensor, sweep: int, tolerance: float, max_calls: int) -> None:
        y, used, before = self._source, [], [t.clone() for t in self.d]
        for place, step in enumerate(self._steps):
            above = self._above(place, before) if sweep else self._begin(place, y)
            used.append(above)
            if place >= self._ends or sweep == 0:
                solver = self._solvers[place]
                loose = max(tolerance / 3, FIRST_TOLERANCE * TIGHTER**sweep)
                solver.tolerance = loose if place >= self._ends else tolerance
                solver.max_calls = max_calls - int(self.calls[place, images].max())
                self._settle(place, step, above, y, images)
            y = self.x[place]
        total = self._own.clone()
        for place, step in enumerate(self._steps[:-1]):
            change = step.above * (self.d[place + 1] - used[place])
            total[place] += change.flatten(1).square().mean(1).sqrt() / self._scales[place]
        self.residual[:, images] = total[:, images]

    def _begin(self, place: int, y: Tensor) -> Tensor:
        """Begins a level with D extrapolated from the levels below; returns the D above it, extrapolated too."""
        past = [(self._sigmas[k], self.d[k]) for k in range(place - 1, max(-1, place - 3), -1)]
        step, next_place = self._steps[place], min(place + 1, len(self._sigmas) - 1)
        here = extrapolated(past, self._sigmas[place], y)
        above = extrapolated(past, self._sigmas[next_place], y)
        self.x.append((y - step.here * here - step.above * above) / step.start if past else y)
        self.d.append(here)
        return above

    def _above(self, place: int, before: Sequence[Tensor]) -> Tensor:
        above = self.d[min(place + 1, len(self.d) - 1)]
        return above + self.d[place - 1] - before[place - 1] if place > 1 else above

    def _settle(self, place: int, step: Affine, above: Tensor, y: Tensor, images: Tensor) -> None:
        """Solves one level's equation for some images, the D above given."""
        sigma = self._sigmas[place]

        def evaluate(x: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, int]:
            d = self._denoise(x, sigma.expand(len(x)), place, None if len(asked) == len(y) else asked)
            return step.start * x + step.here * d + step.above * above[asked] - y[asked], d, 1

        levels = torch.stack([sigma, self._below[place]])
        solved = self._solvers[place].solve(evaluate, self.x[place], levels, self._scales[place], images)
        self.x[place] = chosen(images, solved.x, self.x[place])
        answer = (y - step.start * self.x[place] - step.above * above) / step.here
        self.d[place] = chosen(images, answer, self.d[place])
        self.calls[place] += solved.calls
        self._own[place, images] = solved.residual[images]
