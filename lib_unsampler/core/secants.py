r"""What a model's calls teach about its Jacobians, level by level, and the linear system that they enter.

A secant is a pair u = dx / \|dx\|, v = dD / \|dx\| of one level, so J u = v. The vectors are only ever multiplied with
each other and added up, by numbers found from their products: so the device has to be looked at once a round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .fixedpoint import turned

MEMORY, BELOW = 4, 2
"""Secants kept of a level, and levels below whose secants a level uses too."""

OWN_NOISE, BORROWED_NOISE = 1e-4, 1e-2
"""The kriging's epsilon for a level's own secants, and for those of the level below; of the next, twice that."""


@dataclass(frozen=True)
class Steps:
    """The steps of the levels low, low + 1, ...: their factors, and which of each image's levels move.

    ``start`` has shape (N), ``weights`` (N, N), ``moving`` (B, N).
    """

    low: int
    start: np.ndarray
    weights: np.ndarray
    moving: np.ndarray

    def inverted(self, scalars: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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

    slots: np.ndarray
    scale: np.ndarray
    inverse: np.ndarray
    scalar: np.ndarray


class Secants:
    """The secants of a batch of B images, each level's in MEMORY slots of its own."""

    def __init__(self, source: Tensor, sigmas: np.ndarray) -> None:
        """``source`` has shape (B, values)."""
        size, values = source.shape
        slots = MEMORY * len(sigmas)
        self._sigmas = sigmas
        self._u, self._v = source.new_zeros(2, size, slots, values)
        self._uu, self._uv = np.zeros((2, size, slots, slots))
        self._forces = np.zeros((size, slots, 0))  # u . F
        self._stored = np.zeros((size, len(sigmas)), int)  # of each level, since it was last forgotten
        self._scalars = np.zeros((size, len(sigmas)))  # the last j of each level
        self._slots = slice(0, 0)  # of the window
        self._new: list[list[int]] = [[] for _ in range(size)]

    def store(self, place: int, image: int, move: Tensor, change: Tensor, length: float) -> None:
        """Keeps a pair dx, dD; ``length`` is that of dx."""
        slot = place * MEMORY + self._stored[image, place] % MEMORY
        torch.div(move, length, out=self._u[image, slot])
        torch.div(change, length, out=self._v[image, slot])
        self._stored[image, place] += 1
        self._new[image].append(slot)

    def window(self, lowest: np.ndarray, front: int) -> None:
        """Looks only at levels that bear on those from ``lowest``, with shape (B), to the front; forgets those below."""
        first = np.maximum(0, lowest - BELOW)
        self._stored[np.arange(self._stored.shape[1]) < first[:, None]] = 0
        self._slots = slice(int(first.min()) * MEMORY, (front + 1) * MEMORY)

    def products(self, force: Tensor) -> list[Tensor]:
        """The new vectors' products with the window's, and its u's with forces of shape (N, B, values)."""
        parts: list[Tensor] = []
        for image, new in enumerate(self._new):
            u, v = self._u[image, self._slots], self._v[image, self._slots]
            fresh = self._u[image, new]
            parts += [fresh @ u.mT, fresh @ v.mT, self._v[image, new] @ u.mT, force[:, image] @ u.mT]
        return [part.flatten() for part in parts]

    def learn(self, products: np.ndarray, rows: int) -> None:
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

    def solve(self, steps: Steps, force: Tensor) -> Tensor:
        r"""The step of x and D, with shape (B, 2, N, values), that the secants expect to leave no force.

        .. math:: \alpha_p \delta_p - \delta_{p-1} + \sum_q \gamma_{pq} J_q \delta_q = F_p
        """
        count = len(force)
        numbers = torch.from_numpy(self._coefficients(steps)).to(force).flatten(1, 2)
        change = force.new_empty(len(numbers), 2 * count, force.shape[2])
        for image, (made, row) in enumerate(zip(change, numbers)):
            of_force, of_u, of_v = row.tensor_split((count, (count + row.shape[1]) // 2), 1)
            torch.mm(of_force, force[:, image], out=made)
            made.addmm_(of_u, self._u[image, self._slots]).addmm_(of_v, self._v[image, self._slots])
        return change.unflatten(1, (2, count))

    def _coefficients(self, steps: Steps) -> np.ndarray:
        """The numbers by which forces and the window's u's and v's make up the step, with shape (B, 2, N, ...)."""
        size, count = steps.moving.shape
        kriged = self._kriged(steps.low, count)
        inverse, lever = steps.inverted(kriged.scalar)
        weights = self._weights(kriged, inverse, lever)
        added = np.zeros((size, count, 2, self._uu.shape[1]))  # to j delta, of u's and v's
        levels = np.arange(count)[:, None]
        added[:, levels, 0, kriged.slots] = -kriged.scalar[..., None] * weights
        added[:, levels, 1, kriged.slots] = kriged.scale * weights
        added = (added[..., self._slots] * steps.moving[:, :, None, None]).reshape(size, count, -1)
        of_states = np.concatenate([inverse, -lever @ added], 2)
        of_answers = kriged.scalar[..., None] * of_states
        of_answers[..., count:] += added
        return np.stack([of_states, of_answers], 1)

    def _weights(self, kriged: Kriged, inverse: np.ndarray, lever: np.ndarray) -> np.ndarray:
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
