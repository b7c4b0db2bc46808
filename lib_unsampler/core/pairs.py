r"""What the calls for one image have taught about its model's Jacobian J, for :mod:`.fixedpoint`: secant pairs.

A pair (dx, dF) of a level is a pair (dx, J dx), since :math:`dF = (1 - c) dx + c\, J dx` with
:math:`c = 1 - s_{i+1} / s_i`. Along dx the model is taken for a Gaussian prior's, :math:`J = v / (v + s^2)`, which
says what the pair would be at another level. All of it are a few plain numbers, which a CPU is quickest with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MEMORY = 3
"""Pairs kept for each image, from level to level."""

WIDTH = 2 * MEMORY + 1
"""All dx and dF in turn, and F."""


def turned(slope: Any, sigma: Any, to_sigma: Any) -> Any:
    """By what J grows along a vector from one level to another, if the model is a Gaussian prior's along it.

    There :math:`J = v / (v + s^2)`, v the prior's variance; ``slope`` is J at the first, within 0 and 1. Numbers or
    arrays.
    """
    return sigma**2 / (sigma**2 * slope + to_sigma**2 * (1 - slope))


class Pairs:
    """Of one image, each in one of MEMORY slots.

    Attributes:
        products: Of all WIDTH vectors with each other, row after row.
    """

    def __init__(self) -> None:
        """None is known."""
        self.products = [0.0] * WIDTH**2
        self._count = 0  # ever kept
        self._rest = [0.0] * MEMORY  # 1 - c of the level that a pair was learnt at
        self.forget()

    def forget(self) -> None:
        """Leaves everything learnt behind."""
        self._growth = [0.0] * MEMORY  # by what J has grown since along dx, over c; 0 where no pair is known
        self._makes = [(0.0, 0.0)] * MEMORY  # what a pair changes in F at this level, of its dx and its dF

    @property
    def free(self) -> int:
        """The slot of the next pair."""
        return self._count % MEMORY

    def keep(self, part: float) -> None:
        """Counts the next pair in, of a level whose c is ``part``."""
        slot = self.free
        self._rest[slot], self._growth[slot], self._makes[slot] = 1 - part, 1 / part, (0.0, 1.0)
        self._count += 1

    def turn(self, sigma: float, to_sigma: float, part: float) -> None:
        r"""Moves what was learnt to a new level; :math:`J dx = g (dF - r dx)`, g a pair's growth and r its rest."""
        for slot, growth in enumerate(self._growth):
            if growth > 0:
                at, rest = 2 * slot * (WIDTH + 1), self._rest[slot]
                squared, crossed = self.products[at : at + 2]
                slope = growth * (crossed / squared - rest) if squared > 0 else 1.0
                growth *= turned(min(max(slope, 0.0), 1.0), sigma, to_sigma)
                self._growth[slot], of_force = growth, part * growth
                self._makes[slot] = 1 - part - of_force * rest, of_force

    def step(self, ridge: float) -> list[float]:
        r"""The numbers that Anderson's step adds up all vectors by: :math:`-\sum_j w_j dx_j - q (F - \sum_j w_j y_j)`.

        y are the pairs' changes of F, and :math:`\| F - \sum_j w_j y_j \|` is least; q is the speed of the plain
        iteration, in the rest of the space, that the newest of them suggests. ``ridge``: see :func:`weights`.
        """
        p = self.products
        rows = zip(self._makes, range(0, 2 * MEMORY * WIDTH, 2 * WIDTH))
        meets = [[a * p[k] + b * p[k + WIDTH] for k in range(row, row + WIDTH)] for (a, b), row in rows]  # y, vectors
        among = [[a * row[2 * k] + b * row[2 * k + 1] for k, (a, b) in enumerate(self._makes)] for row in meets]
        least = weights(among, [row[-1] for row in meets], ridge)
        newest = (self._count - 1) % MEMORY
        size, along = among[newest][newest], meets[newest][2 * newest]
        speed = min(max(along / size, 0.1), 2.0) if size > 0 and along > 0 else 1.0
        of_pairs = ((w * (speed * a - 1), w * speed * b) for w, (a, b) in zip(least, self._makes))
        return [*(number for pair in of_pairs for number in pair), -speed]


def weights(among: Sequence[Sequence[float]], wanted: Sequence[float], ridge: float) -> list[float]:
    r"""The w of the least :math:`\| f - \sum_j w_j y_j \|`, by elimination.

    Arguments:
        among: The products of y with each other; one that is nothing, or nothing new, has no weight.
        wanted: Their products with f.
        ridge: What those of each y with itself are multiplied by, a little over 1.
    """
    count = len(wanted)
    rows = [[*products, goal] for products, goal in zip(among, wanted)]
    for k, row in enumerate(rows):
        row[k] *= ridge
    for k, row in enumerate(rows):
        if row[k] > 0:
            for below in rows[k + 1 :]:
                factor = below[k] / row[k]
                for j in range(k + 1, count + 1):
                    below[j] -= factor * row[j]
    found = [0.0] * count
    for k in reversed(range(count)):
        row = rows[k]
        if row[k] > 0:
            found[k] = (row[count] - sum(row[j] * found[j] for j in range(k + 1, count))) / row[k]
    return found
