r"""What a model's calls teach about its Jacobians, level by level, and the linear system that they enter.

A secant is a pair u = dx / \|dx\|, v = dD / \|dx\| of one level, so J u = v. The vectors are only ever multiplied with
each other and added up, by numbers found from their products: so the device has to be looked at once a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fixedpoint import Sample, inner_products, uploaded
from .pairs import turned
from .precise import precise

MEMORY, BELOW = 4, 2
"""Secants kept of a level, and levels below whose secants a level uses too."""

SAMPLED = 2**17
"""About how many values of large latents products are taken of."""

OWN_NOISE, BORROWED_NOISE = 1e-4, 1e-2
"""The kriging's epsilon for a level's own secants, and for those of the level below; of the next, twice that."""


@dataclass(frozen=True)
class Steps:
    """The steps of the levels low, low + 1, ...: their factors, and which of each image's levels move.

    ``start`` has shape (N), ``weights`` (N, N), ``moving`` (B, N).
    """

    low: int
    start: NDArray[Any]
    weights: NDArray[Any]
    moving: NDArray[Any]

    def inverted(self, scalars: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """With each J a scalar, what forces do to states, and what answers do; both (B, N, N)."""
        count = len(self.start)
        moving = self.moving[:, :, None]
        weights = np.where(moving, self.weights, 0.0)
        matrix = np.where(moving, np.diag(self.start) - np.eye(count, k=-1), np.eye(count))
        inverse = np.linalg.inv(matrix + weights * scalars[:, None, :])
        return np.where(self.moving[:, None, :], inverse, 0.0), inverse @ weights


@dataclass(frozen=True)
class Kriged:
    """The Jacobians of N levels of B images, of L secants each.

    Attributes:
        slots: Where the secants are kept, with shape (N, L).
        scale: What their v's are multiplied by, with shape (B, N, L).
        inverse: Of their u's products and epsilon, with shape (B, N, L, L).
        scalar: j, with shape (B, N).
    """

    slots: NDArray[Any]
    scale: NDArray[Any]
    inverse: NDArray[Any]
    scalar: NDArray[Any]


class Secants:
    """The secants of a batch of B images, each level's in MEMORY slots of its own."""

    def __init__(self, source: Tensor, sigmas: NDArray[Any]) -> None:
        """``source`` has shape (B, values)."""
        size, values = source.shape
        slots = MEMORY * len(sigmas)
        self._sigmas = sigmas
        self._pairs = source.new_empty(slots, 2, size, values)  # dx and dD
        self._sample = Sample(values, SAMPLED)
        self._sampled = source.new_empty(slots, 2, size, self._sample.size)
        self._lengths = np.ones((size, slots))  # of dx
        self._uu, self._uv = np.zeros((2, size, slots + 1, slots + 1))  # the last stands for no secant
        self._forces = np.zeros((size, slots + 1, 0))  # u . F
        self._stored = np.zeros((size, len(sigmas)), int)  # of each level, since it was last forgotten
        self._scalars = np.zeros((size, len(sigmas)))  # the last j of each level
        self._slots = slice(0, 0)  # of the window
        self._new: list[list[int]] = [[] for _ in range(size)]

    def store(self, place: int, image: int, x: tuple[Tensor, Tensor], d: tuple[Tensor, Tensor], length: float) -> None:
        """Keeps the pair of two calls, each of x and D newest first; ``length`` is that of dx."""
        slot = int(place * MEMORY + self._stored[image, place] % MEMORY)
        pair = self._pairs[slot, :, image]
        torch.sub(*x, out=pair[0])
        torch.sub(*d, out=pair[1])
        self._sampled[slot, :, image] = self._sample.of(pair).flatten(1)
        self._lengths[image, slot] = length
        self._stored[image, place] += 1
        self._new[image].append(slot)

    def window(self, lowest: NDArray[Any], front: int) -> None:
        """From now on only what bears on levels from ``lowest``, with shape (B), to the front counts, or is kept."""
        first = np.maximum(0, lowest - BELOW)
        self._stored[np.arange(self._stored.shape[1]) < first[:, None]] = 0
        joined = slice(self._slots.stop, (front + 1) * MEMORY)
        self._pairs[joined], self._sampled[joined] = 0.0, 0.0
        self._slots = slice(int(first.min()) * MEMORY, joined.stop)

    @precise()
    def products(self, force: Tensor) -> list[Tensor]:
        """Of the new dx and dD, k of each image's, and of N forces, (N, B, values), with the window's W vectors.

        Returns:
            With dx, of shape (B, 2 k + N, W), and the new dx with dD, (B, k, W).
        """
        of_x, of_d = self._sampled[self._slots].unbind(1)
        most = max(map(len, self._new))
        slots = np.array([new + [0] * (most - len(new)) for new in self._new], int)  # filled up with any
        new = self._sampled[uploaded(slots.T, force), :, uploaded(np.arange(len(slots)), force)]
        rows = torch.cat([*new.unbind(2), self._sample.of(force).flatten(2)])
        return [inner_products(rows, of_x), inner_products(rows[:most], of_d)]

    def learn(self, products: NDArray[Any], rows: int) -> None:
        """Takes in what :meth:`products` gave, looked at, one after the other; ``rows`` is N."""
        at, lengths = self._slots, self._lengths[:, None, self._slots]
        size, width, most = len(self._new), lengths.shape[2], max(map(len, self._new))
        parts = np.split(products, [size * (2 * most + rows) * width])
        of_x, of_d = (part.reshape(size, count, width) / lengths for part, count in zip(parts, (2 * most + rows, most)))
        self._forces = np.zeros((size, self._uu.shape[1], rows))
        self._forces[:, at] = of_x[:, 2 * most :].swapaxes(1, 2)
        for image, new in enumerate(self._new):
            uu, uv, own = self._uu[image], self._uv[image], self._lengths[image, new, None]
            uu[new, at], uv[new, at] = of_x[image, : len(new)] / own, of_d[image, : len(new)] / own
            uu[at, new], uv[at, new] = uu[new, at].T, (of_x[image, most : most + len(new)] / own).T
            new.clear()

    @precise()
    def solve(self, steps: Steps, forces: Tensor, x: Tensor, d: Tensor) -> None:
        r"""Takes x and D, with shape (N, B, values), the step that the secants expect to leave no force.

        .. math:: \alpha_p \delta_p - \delta_{p-1} + \sum_q \gamma_{pq} J_q \delta_q = F_p

        Arguments:
            steps: Those of the levels.
            forces: F, with shape (2 N, B, values): the second half is room to work in.
            x: The states.
            d: The answers.
        """
        count = len(x)
        kriged = self._kriged(steps.low, count)
        inverse, lever = steps.inverted(kriged.scalar)
        of_u, of_v = self._added(kriged, self._weights(kriged, inverse, lever) * steps.moving[:, :, None])
        of_x = np.concatenate([inverse, -lever], 2)  # of the forces, and of what the secants add to D
        of_d = kriged.scalar[..., None] * of_x + np.eye(count, 2 * count, count)
        both, (window_x, window_d) = forces.transpose(0, 1), self._pairs[self._slots].permute(1, 2, 0, 3)
        added = torch.bmm(uploaded(of_u, x), window_x, out=both[:, count:])
        added.baddbmm_(uploaded(of_v, x), window_d)
        for states, numbers in ((x, of_x), (d, of_d)):
            states.transpose(0, 1).baddbmm_(uploaded(numbers, x), both)

    def _added(self, kriged: Kriged, weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """:math:`(V - j U)` times weights, as numbers of the window's dx and dD: both (B, N, W)."""
        of_u, of_v = np.zeros((2, *weights.shape[:2], self._uu.shape[1]))
        levels = np.arange(weights.shape[1])[:, None]
        of_u[:, levels, kriged.slots] = -kriged.scalar[..., None] * weights
        of_v[:, levels, kriged.slots] = kriged.scale * weights
        at, lengths = self._slots, self._lengths[:, None, self._slots]
        return of_u[..., at] / lengths, of_v[..., at] / lengths

    def _weights(self, kriged: Kriged, inverse: NDArray[Any], lever: NDArray[Any]) -> NDArray[Any]:
        r""":math:`(U^\top U + \varepsilon)^{-1} U^\top \delta` of every level, with shape (B, N, L)."""
        size, count, width = kriged.scale.shape
        flat, level = kriged.slots.ravel(), np.repeat(np.arange(count), width)
        used = kriged.scale.any(0).ravel().nonzero()[0]  # those that no image knows have no weight
        meets = kriged.scale.reshape(size, 1, -1)[..., used] * self._uv[:, flat[:, None], flat[used]]
        meets -= kriged.scalar[:, None, level[used]] * self._uu[:, flat[:, None], flat[used]]
        meets *= lever[:, level[:, None], level[used]]
        reached = np.einsum("bpl,bpil->bpi", inverse, self._forces[:, kriged.slots])
        system = (kriged.inverse @ meets.reshape(size, count, width, -1)).reshape(size, count * width, -1)
        known = (kriged.inverse @ reached[..., None]).reshape(size, -1, 1)
        weights: NDArray[Any] = np.zeros_like(known)
        weights[:, used] = np.linalg.solve(system[:, used] + np.eye(len(used)), known[:, used])
        return weights.reshape(size, count, width)

    def _kriged(self, low: int, count: int) -> Kriged:
        levels = np.arange(low, low + count)[:, None]
        borrowed = np.repeat(np.arange(BELOW + 1), MEMORY)[None, :]
        number = np.tile(np.arange(MEMORY), BELOW + 1)
        of = np.maximum(levels - borrowed, 0)
        slots = np.where(levels >= borrowed, of * MEMORY + number, len(self._pairs))
        known = (number < self._stored[:, of]) & (levels >= borrowed)
        slope = self._uv[:, slots, slots]
        growth = turned(np.clip(slope, 0, 1), self._sigmas[of], self._sigmas[levels])
        scale = np.where(borrowed == 0, 1.0, growth) * known
        both = known[..., :, None] & known[..., None, :]
        among = np.where(both, self._uu[:, slots[:, :, None], slots[:, None, :]], 0.0)
        noise = np.where(borrowed == 0, OWN_NOISE, BORROWED_NOISE * borrowed) + ~known
        inverse = np.where(both, np.linalg.inv(among + noise[..., None] * np.eye(noise.shape[2])), 0.0)
        latest = number == (self._stored[:, of] - 1) % MEMORY
        newest = np.argmax(known & latest, 2)[..., None]  # the level's own, or else one of the levels below
        scalar = np.take_along_axis(np.clip(slope * scale, 0, 1), newest, 2)[..., 0]
        scalars = self._scalars[:, low : low + count]
        scalars[:] = np.where(known.any(2), scalar, scalars)
        return Kriged(slots, scale, inverse, scalars)
