"""How long each frame of an animation is shown, and in what order. Seconds, standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SHORTEST = 0.02
"""Browsers play frames of 0.01 seconds and below as if they had none, at 0.1."""


@dataclass(frozen=True)
class Timing:
    """The showing of frames that come least noisy first.

    Attributes:
        durations: Seconds of each frame, in the order they come.
        hold_first: Seconds that the first frame shown stays beyond its own.
        hold_last: Seconds that the last frame shown stays beyond its own; in a ping-pong, the one it turns at.
        reverse: Whether it is shown from the noisiest frame.
        ping_pong: Whether it is shown there and back; the frames at both ends are shown once.
        plays: How often it is played; 0 is for ever.
    """

    durations: Sequence[float]
    hold_first: float = 0.0
    hold_last: float = 0.0
    reverse: bool = False
    ping_pong: bool = False
    plays: int = 0

    def shown(self, count: int) -> list[tuple[int, float]]:
        """(frame, its seconds) in the order of showing, when ``count`` frames have come.

        Raises:
            ValueError: for no frames, or more than there are durations.
        """
        if not 0 < count <= len(self.durations):
            raise ValueError(f"{count} frames for {len(self.durations)} durations")
        there = [(frame, self.seconds(frame)) for frame in range(count)]
        if self.reverse:
            there.reverse()
        there[0] = (there[0][0], there[0][1] + self.hold_first)
        there[-1] = (there[-1][0], there[-1][1] + self.hold_last)
        return there + there[-2:0:-1] if self.ping_pong else there

    def seconds(self, frame: int) -> float:
        """A frame's own seconds, without holds."""
        return max(SHORTEST, self.durations[frame])

    def mean(self) -> float:
        """A frame's own seconds, without holds, on average."""
        return sum(map(self.seconds, range(len(self.durations)))) / len(self.durations)

    def longest(self) -> float:
        """No frame is shown for longer."""
        return max(self.durations, default=0.0) + self.hold_first + self.hold_last


def even(sigmas: Sequence[float], duration: float) -> list[float]:
    """The same time for every frame."""
    return [duration] * len(sigmas)


def log_sigma(sigmas: Sequence[float], duration: float) -> list[float]:
    r"""Times in proportion to each level's share of the way in log sigma; ``duration`` on average.

    A level's share is the mean of the steps to its neighbours,
    :math:`(|\log s_{i+1} - \log s_i| + |\log s_i - \log s_{i-1}|) / 2`; at the ends the one step there is. A level at
    sigma 0 has no logarithm and gets ``duration``.

    Arguments:
        sigmas: The frames' noise levels: rising, falling, or there and back.
        duration: Mean seconds of a frame.
    """
    noisy = [math.log(s) for s in sigmas if s > 0]
    steps = [abs(after - before) for before, after in pairwise(noisy)]
    if sum(steps) <= 0:
        return even(sigmas, duration)
    shares = [(before + after) / 2 for before, after in zip(steps[:1] + steps, steps + steps[-1:])]
    unit = duration * len(shares) / sum(shares)
    times = iter([share * unit for share in shares])
    return [next(times) if s > 0 else duration for s in sigmas]


def evenly(number: int, total: int, most: int) -> bool:
    """Whether ``number`` of ``total`` is one of the ``most`` that are spread evenly over them, the last included."""
    return total <= most or (number + 1) * most // total > number * most // total


TIMINGS = {"even": even, "log sigma": log_sigma}


class Ticks:
    """Durations as whole ticks, one after the other, rounded so that the sum never drifts; none below ``SHORTEST``."""

    def __init__(self, per_second: int) -> None:
        self._per_second, self._end, self._seconds = per_second, 0, 0.0

    def next(self, seconds: float) -> int:
        """The ticks of the next frame."""
        self._seconds += seconds
        begun, self._end = self._end, round(self._seconds * self._per_second)
        return max(math.ceil(SHORTEST * self._per_second), self._end - begun)
