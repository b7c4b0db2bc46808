r"""What a model's calls teach about its Jacobians, level by level, and the linear system that they enter.

A secant is a pair u = dx / \|dx\|, v = dD / \|dx\| of one level, so J u = v. The vectors are only ever multiplied with
each other and added up, by numbers found from their products: so the device has to be looked at once a round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fixedpoint import Sample, turned, uploaded

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
        self._u, self._v = source.new_zeros(2, size, slots, values)
        self._change = source.new_empty(2, len(sigmas), values)
        self._sample = Sample(values, SAMPLED)
        self._small_u, self._small_v = source.new_zeros(2, size, slots, self._sample.size)
        self._uu, self._uv = np.zeros((2, size, slots, slots))
        self._forces = np.zeros((size, slots, 0))  # u . F
        self._stored = np.zeros((size, len(sigmas)), int)  # of each level, since it was last forgotten
        self._scalars = np.zeros((size, len(sigmas)))  # the last j of each level
        self._slots = slice(0, 0)  # of the window
        self._new: list[list[int]] = [[] for _ in range(size)]

    def store(self, place: int, image: int, x: tuple[Tensor, Tensor], d: tuple[Tensor, Tensor], length: float) -> None:
        """Keeps the pair of two calls, each of x and D newest first; ``length`` is that of dx."""
        slot = place * MEMORY + self._stored[image, place] % MEMORY
        for (now, old), kept, small in ((x, self._u, self._small_u), (d, self._v, self._small_v)):
            torch.sub(now, old, out=kept[image, slot]).div_(length)
            small[image, slot] = self._sample.of(kept[image, slot])
        self._stored[image, place] += 1
        self._new[image].append(slot)

    def window(self, lowest: NDArray[Any], front: int) -> None:
        """From now on only what bears on levels from ``lowest``, with shape (B), to the front counts, or is kept."""
        first = np.maximum(0, lowest - BELOW)
        self._stored[np.arange(self._stored.shape[1]) < first[:, None]] = 0
        self._slots = slice(int(first.min()) * MEMORY, (front + 1) * MEMORY)

    def products(self, force: Tensor) -> list[Tensor]:
        """The new vectors' products with the window's, and its u's with forces of shape (N, B, values)."""
        parts: list[Tensor] = []
        force = self._sample.of(force)
        for image, new in enumerate(self._new):
            u, v = self._small_u[image], self._small_v[image]
            fresh, other = u[self._slots].mT, v[self._slots].mT
            rows = uploaded(np.array(new, int), u)
            parts += [u[rows] @ fresh, u[rows] @ other, v[rows] @ fresh, force[:, image] @ fresh]
        return [part.flatten() for part in parts]

    def learn(self, products: NDArray[Any], rows: int) -> None:
        """Takes in what :meth:`products` gave, looked at; ``rows`` is the number of forces, N."""
        at, count = self._slots, self._slots.stop - self._slots.start
        self._forces = np.zeros((len(self._new), self._uu.shape[1], rows))
        for image, new in enumerate(self._new):
            mine, products = np.split(products, [count * (3 * len(new) + rows)])
            among, across = self._uu[image], self._uv[image]
            among[new, at], across[new, at], turn, fu = np.split(mine.reshape(-1, count), np.cumsum([len(new)] * 3))
            among[at, new], across[at, new] = among[new, at].T, turn.T
            self._forces[image, at] = fu.T
            new.clear()

    def solve(self, steps: Steps, force: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        r"""The step of x and D, with shape (N, values), image by image, that the secants expect to leave no force.

        .. math:: \alpha_p \delta_p - \delta_{p-1} + \sum_q \gamma_{pq} J_q \delta_q = F_p
        """
        kriged = self._kriged(steps.low, len(force))
        inverse, lever = steps.inverted(kriged.scalar)
        of_u, of_v = self._added(kriged, self._weights(kriged, inverse, lever) * steps.moving[:, :, None])
        numbers = [uploaded(each, force) for each in (inverse, -lever, kriged.scalar[..., None], of_u, of_v)]
        x, d = self._change[:, : len(force)]
        for image in range(force.shape[1]):
            to_force, to_added, scalar, to_u, to_v = (each[image] for each in numbers)
            torch.mm(to_u, self._u[image, self._slots], out=d).addmm_(to_v, self._v[image, self._slots])
            torch.mm(to_force, force[:, image], out=x).addmm_(to_added, d)
            yield x, d.addcmul_(x, scalar)

    def _added(self, kriged: Kriged, weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """:math:`(V - j U)` times weights, as numbers by which the window's u's and v's are added: both (B, N, ...)."""
        of_u, of_v = np.zeros((2, *weights.shape[:2], self._uu.shape[1]))
        levels = np.arange(weights.shape[1])[:, None]
        of_u[:, levels, kriged.slots] = -kriged.scalar[..., None] * weights
        of_v[:, levels, kriged.slots] = kriged.scale * weights
        return of_u[..., self._slots], of_v[..., self._slots]

    def _weights(self, kriged: Kriged, inverse: NDArray[Any], lever: NDArray[Any]) -> NDArray[Any]:
        r""":math:`(U^\top U + \varepsilon)^{-1} U^\top \delta` of every level, with shape (B, N, L)."""
        size, count, width = kriged.scale.shape
        flat = kriged.slots.ravel()
        meets = kriged.scale.reshape(size, 1, -1) * self._uv[:, flat[:, None], flat]
        meets -= np.repeat(kriged.scalar, width, 1)[:, None] * self._uu[:, flat[:, None], flat]
        meets *= np.repeat(np.repeat(lever, width, 1), width, 2)
        reached = np.einsum("bpl,bpil->bpi", inverse, self._forces[:, kriged.slots])
        system = (kriged.inverse @ meets.reshape(size, count, width, -1)).reshape(size, count * width, -1)
        known = (kriged.inverse @ reached[..., None]).reshape(size, -1, 1)
        return np.linalg.solve(system + np.eye(count * width), known).reshape(size, count, width)

    def _kriged(self, low: int, count: int) -> Kriged:
        levels = np.arange(low, low + count)[:, None]
        borrowed = np.repeat(np.arange(BELOW + 1), MEMORY)[None, :]
        number = np.tile(np.arange(MEMORY), BELOW + 1)
        of = np.maximum(levels - borrowed, 0)
        slots = of * MEMORY + number
        known = (number < self._stored[:, of]) & (levels >= borrowed)
        slope = self._uv[:, slots, slots]
        scale = np.where(borrowed == 0, 1.0, turned(slope, self._sigmas[of], self._sigmas[levels])) * known
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
