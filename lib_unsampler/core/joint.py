r"""Exact inversion where a sampler's step also looks at the model's answer one level above (DPM++ 2M).

With the answers D given, the step is affine:

.. math:: x_{i+1} = \alpha_i x_i + \gamma_{ii} D(x_i; s_i) + \gamma_{i,i-1} D(x_{i-1}; s_{i-1})

No level can be solved for alone, so the levels are one system, solved for all at once by quasi-Newton steps. The
Jacobian is the model's, level by level, as its calls have shown it: a scalar j and, from a level's own calls and
those of the two levels below, secants :math:`J u = v`, put together by kriging,

.. math:: J \delta = j \delta + (V - j U) (U^\top U + \varepsilon)^{-1} U^\top \delta

(Schubert 1970 updates a sparse Jacobian so, row by row. Anderson's acceleration of the whole stack, whose secants are
as long as the stack, needs twice to three times the calls.) A new level joins at the noisy end each round, from answers
extrapolated linearly in log sigma, while those below are still being solved. Only levels whose answer is in doubt
are called again: those of one round do not wait for each other, and go to the model together if it takes them so.
The vectors stay in the latents' precision on their device; the algebra of their products is float64 on the CPU.

LMS looks back over every level; from a noisy state its levels are solved like these, but its last step, which
mixes answers of four levels with alternating signs, converges too slowly from a photograph to be worth its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fixedpoint import CAUTION, PROGRESS, Solved, uploaded
from .precise import precise
from .secants import Secants, Steps

Answer = Callable[[Tensor, "list[int]", "list[int]"], Tensor]
"""``(x, places, images) -> D``: of states with shape (k, ...), one for each of k places and images of the batch."""

LATER = 3e-3
"""A level whose doubt is below this part of its image's largest waits for a later round."""

SETTLED = 0.25
"""The part of the tolerance at which a level is left as it is, until one above moves it."""

FAILURES, NOISE = 4, 4.0
"""Calls that come no closer (by PROGRESS) to what was predicted, after which a level is left to the model's rounding,
unless it is expected to miss by NOISE times the least that it has missed."""

PATIENCE = 3
"""Rounds without progress after which an image is left as it is."""


def factors(function: Callable[..., Tensor], schedule: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    r""":math:`\alpha` and :math:`\gamma`, asked of the sampler's function: one run over the space of coefficients.

    Component 0 of its state stands for the start, component 1 + j for the answer of call j.

    Arguments:
        function: The sampler's.
        schedule: Descending sigmas with shape (n + 1), float64 on the CPU.

    Returns:
        (n) and (n, n), least noisy level first: row p gives the state below place p.
    """
    count = len(schedule) - 1
    states: list[Tensor] = []
    units = torch.eye(count + 1, dtype=torch.float64)[:, None]

    def denoise(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        states.append(x[0].clone())
        return units[len(states)]

    states.append(function(denoise, units[0], schedule, extra_args={}, disable=True)[0])
    rows = torch.stack(states).numpy()
    alpha = rows[1:, 0] / rows[:-1, 0]
    gamma = rows[1:, 1:] - alpha[:, None] * rows[:-1, 1:]
    return alpha[::-1].copy(), gamma[::-1, ::-1].copy()


class Joint:
    """The states of all levels of a batch of B images, least noisy first.

    Attributes:
        x: The states, with shape (levels, B, values).
        d: The model's answers there, called or predicted, of the same shape.
        residual: RMS of what each step misses, over the level's scale, and of what the doubt in an answer that was
            predicted may add to it; with shape (levels, B), like all below, in numpy.
        calls: Model calls.
    """

    def __init__(
        self, steps: tuple[NDArray[Any], NDArray[Any]], answer: Answer, source: Tensor, sigmas: Tensor, scales: Tensor
    ) -> None:
        """A stack of which no level has begun.

        Arguments:
            steps: The sampler's :func:`factors`.
            answer: The model.
            source: The clean latents, with shape (B, ...), in the precision and on the device to work in.
            sigmas: The levels' sigmas, rising, with shape (levels), float64 on the CPU.
            scales: What residuals are measured by at each level.
        """
        self._start, self._weights = steps
        self._answer, self._shape, self._source = answer, source.shape, source.flatten(1)
        self._sigmas, self._scales = sigmas.numpy(), scales.numpy()
        levels, size = len(sigmas), len(source)
        self._root = self._source.shape[1] ** 0.5  # norm over RMS
        self._states, self.d, self._called_x, self._called_d, self._forced = (
            self._source.new_zeros(rows, size, self._source.shape[1])
            for rows in (1 + levels, levels, levels, levels, 2 * levels)
        )
        self._states[0], self.x = self._source, self._states[1:]
        self._secants = Secants(self._source, self._sigmas)
        self._bearing = CAUTION * (np.abs(self._weights) / self._scales[:, None]).max(0)  # of D's doubt on residuals
        self._missed = np.zeros((levels, size))
        self._moved = np.full((levels, size), np.inf)  # RMS of x minus where it was last called
        self._rate = np.ones((levels, size))  # of D's error to the move, as last seen
        self._floor = np.full((levels, size), np.inf)  # the least error seen
        self._fails = np.zeros((levels, size), int)  # calls since it last fell
        self._held = np.zeros((levels, 1), bool)
        self._active = np.ones(size, bool)
        self.residual = np.full((levels, size), np.inf)
        self.calls = np.zeros((levels, size), int)

    def solve(self, first: Solved | None, tolerance: float, max_calls: int) -> None:
        """Rounds until every image's residuals are within the tolerance, get no smaller, or calls run out.

        Arguments:
            first: The least noisy level as the sampler's last step alone would have it, where that ends at 0.
            tolerance: The residual at which a level is done.
            max_calls: The most calls of one image at one level.
        """
        levels, size = self.residual.shape
        front = 0
        best, stale = np.full(size, np.inf), np.zeros(size, int)
        if first is None:
            self._join(0)
        else:
            self._begin(first, tolerance)
        while True:
            asked = self._asked(front, tolerance) & self._active & (self.calls < max_calls)
            force, low = self._round(asked, front, tolerance)
            worst = np.where(self._held, 0, self.residual).max(0)
            if front == levels - 1:
                stale = np.where(worst < PROGRESS * best, 0, stale + 1)
                best = np.minimum(best, worst)
                done = worst <= np.where(asked.any(0), SETTLED * tolerance, tolerance)
                self._active &= ~done & (asked.any(0) | (stale == 0)) & (stale < PATIENCE)
            if not self._active.any():
                return
            self._improve(force, low, front, tolerance)
            if front < levels - 1:
                front += 1
                self._join(front)

    def _begin(self, first: Solved, tolerance: float) -> None:
        """Takes the last step's level as it is: nothing above bears on it."""
        self.x[0] = self._called_x[0] = first.x.flatten(1).to(self.x)
        self.residual[0], self.calls[0], self._moved[0] = first.residual.numpy(), first.calls.numpy(), 0
        self._held[0] = True
        here = torch.from_numpy(self.residual[0] > tolerance)[:, None].to(self.x.device)
        self.d[0] = self._called_d[0] = torch.where(here, first.denoised.flatten(1).to(self.x), self._source)

    def _beyond(self, front: int) -> NDArray[Any]:
        """The slopes t of the answers above the front, :math:`D_q = D_f + t_q (D_f - D_{f-1})`."""
        above = np.log(self._sigmas[front + 1 :] / self._sigmas[front])
        if front == 0:
            return np.zeros_like(above)
        return np.asarray(above / np.log(self._sigmas[front] / self._sigmas[front - 1]))

    def _seen(self, front: int) -> NDArray[Any]:
        """The weights of the answers up to the front, where those above are extrapolated from them."""
        seen, above, slopes = self._weights[:, : front + 1].copy(), self._weights[:, front + 1 :], self._beyond(front)
        seen[:, front] += above @ (1 + slopes)
        seen[:, front - 1] -= above @ slopes  # at front 0 the slopes are 0
        return seen

    def _join(self, place: int) -> None:
        """Begins a level with every answer that it needs extrapolated from those below."""
        if place == 0:
            self.x[0] = self._source
        else:
            newest, x, d = self.d[place - 1], self.x[place], self.d[place]
            slopes, weights = self._beyond(place - 1), self._weights[place, place:]
            change = torch.sub(newest, self.d[max(place - 2, 0)], out=d)
            torch.add(self.x[place - 1], newest, alpha=-float(weights.sum()), out=x)
            x.add_(change, alpha=-float(weights @ slopes)).div_(float(self._start[place]))
            torch.add(newest, change, alpha=float(slopes[0]), out=d)
            self._rate[place] = np.maximum(self._rate[place - 1], 0.1)

    def _asked(self, front: int, tolerance: float) -> NDArray[Any]:
        """Which levels of which images are in too much doubt: new ones, and those that a call can tell more about."""
        doubt = self._doubt()
        known = np.where(np.isfinite(doubt), doubt, 0)
        telling = (doubt > SETTLED * tolerance) & (doubt >= LATER * known.max(0))
        telling[front + 1 :] = False
        nearing = telling & ((self._fails < FAILURES) | (self._rate * self._moved > NOISE * self._floor))
        return np.where(nearing.any(0) | (front + 1 < len(telling)), nearing, telling)

    def _doubt(self) -> NDArray[Any]:
        return np.asarray(self._bearing[:, None] * self._rate * self._moved)

    def _round(self, asked: NDArray[Any], front: int, tolerance: float) -> tuple[Tensor, int]:
        r"""Calls the model, learns, and looks at what the steps miss.

        Returns:
            :math:`F_p = x_{p-1} - \alpha_p x_p - \sum_q \gamma_{pq} D_q` from a place on, and that place.
        """
        low = self._lowest(asked, front, tolerance)
        places, images = np.nonzero(asked)
        shown = self._call(places, images) if len(places) else None
        force = self._forces(low, front)
        missed = torch.linalg.vector_norm(force, dim=2)
        parts = [missed.flatten(), *(each.flatten() for each in self._secants.products(force))]
        looked = torch.cat([*parts, *([] if shown is None else [shown])]).cpu().double().numpy()  # the round's one look
        counts = np.cumsum([len(part) for part in parts])
        units = self._root * self._scales[low : front + 1, None]
        self._missed[low : front + 1] = looked[: counts[0]].reshape(missed.shape) / units
        self._secants.learn(looked[counts[0] : counts[-1]], force.shape[0])
        if shown is not None:
            self._judge(places, images, looked[counts[-1] :] / self._root)
        doubt = self._doubt()[: front + 1]
        self.residual[: front + 1] = self._missed[: front + 1] + np.where(np.isfinite(doubt), doubt, 0)
        return force, low

    def _moving(self, tolerance: float) -> NDArray[Any]:
        return self._active & ~self._held & ~(self.residual <= SETTLED * tolerance)

    def _lowest(self, asked: NDArray[Any], front: int, tolerance: float) -> int:
        """The lowest place that is asked for, or that a change since the last look may have moved."""
        moving = (self._moving(tolerance) | asked)[: front + 1]
        self._secants.window(np.where(self._active, np.argmax(moving, 0), front), front)
        return max(0, int(np.argmax(moving.any(1))) - 1)

    def _call(self, places: NDArray[Any], images: NDArray[Any]) -> Tensor:
        """Asks the model; returns by how much its answers differ from what was predicted."""
        rows = uploaded(places * self._shape[0] + images, self.x)
        states, answers, called_x, called_d = (
            each.flatten(0, 1) for each in (self.x, self.d, self._called_x, self._called_d)
        )
        x = states.index_select(0, rows)
        d = self._answer(x.view(-1, *self._shape[1:]), places.tolist(), images.tolist()).flatten(1)
        for now_x, now_d, place, image in zip(x, d, places.tolist(), images.tolist()):
            moved = float(self._moved[place, image])
            if 0 < moved < np.inf:
                pair_x, pair_d = (now_x, self._called_x[place, image]), (now_d, self._called_d[place, image])
                self._secants.store(place, image, pair_x, pair_d, moved * self._root)
        errors: Tensor = torch.linalg.vector_norm(answers.index_select(0, rows).sub_(d), dim=1)
        for kept, new in ((called_x, x), (called_d, d), (answers, d)):
            kept.index_copy_(0, rows, new)
        self.calls[places, images] += 1
        return errors

    def _judge(self, places: NDArray[Any], images: NDArray[Any], error: NDArray[Any]) -> None:
        """How much D's prediction erred, for the move, and whether that is getting less."""
        at = places, images
        seen = np.isfinite(self._moved[at]) & (self._moved[at] > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.maximum(error / self._moved[at], 0.003)
        self._rate[at] = np.where(seen, rate, self._rate[at])
        nearer = error < PROGRESS * self._floor[at]
        self._fails[at] = np.where(nearer | ~seen, 0, self._fails[at] + 1)
        self._floor[at] = np.where(seen, np.minimum(self._floor[at], error), self._floor[at])
        self._moved[at] = 0

    @precise()
    def _forces(self, low: int, front: int) -> Tensor:
        """All at once, as products of two small matrices with the states and the answers."""
        count, below = front + 1 - low, max(low - 1, 0)  # extrapolated answers look one level below
        of_x = np.eye(count, count + 1) - np.eye(count, count + 1, 1) * np.append(0.0, self._start[low : front + 1])
        of_d = uploaded(-self._seen(front)[low : front + 1, below:], self.x)
        force = torch.mm(
            uploaded(of_x, self.x),
            self._states[low : front + 2].flatten(1),
            out=self._forced[:count].flatten(1),
        )
        return force.addmm_(of_d, self.d[below : front + 1].flatten(1)).view(count, *self._source.shape)

    def _improve(self, force: Tensor, low: int, front: int, tolerance: float) -> None:
        """One quasi-Newton step of every level that is not settled."""
        rows = slice(low, front + 1)
        moving = np.logical_or.accumulate(self._moving(tolerance)[rows], 0) & ~self._held[rows]  # from the lowest on
        steps = Steps(low, self._start[rows], self._seen(front)[rows, low:], moving.T)
        self._secants.solve(steps, self._forced[: 2 * len(force)], self.x[rows], self.d[rows])
        away = torch.linalg.vector_norm(torch.sub(self.x[rows], self._called_x[rows], out=force), dim=2)
        moved = away.cpu().double().numpy() / self._root
        self._moved[rows] = np.where(np.isfinite(self._moved[rows]), moved, np.inf)
