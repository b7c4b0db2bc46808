r"""Levels: which noise levels of a descending schedule are visited, and which are kept.

The schedule is the sampler's own, :math:`s_0 \ge s_1 \ge \dots \ge s_n`, where sampling ends: mostly at 0,
sometimes above it (*KL Optimal* ends at the model's least sigma). Unsampling begins there with the clean
picture and walks upwards, :math:`s_{n-1}, \dots, s_e`, where e is ``end_at_step`` (ComfyUI_Noise's meaning:
the level at which a sampler that starts at step e would go on). Every m-th level is kept, counted from the
noisiest, :math:`s_e`, downwards, so that the hand-off level is always there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The walk through a schedule.

    Attributes:
        schedule: The whole descending schedule in float32, to where sampling ends, with shape (n + 1).
        visited: Schedule indices of every noisy level of the walk, least noisy first: n - 1, ..., e.
        kept: The subset that becomes frames and files, in the same order; its last is e.
    """

    schedule: Tensor
    visited: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def sigmas(self) -> Tensor:
        """The kept levels' sigmas, least noisy first, with shape (L)."""
        return self.schedule[list(self.kept)]

    def draw_index(self, index: int) -> int:
        """The number of the noise draw that belongs to a schedule index: 0 for the least noisy."""
        return len(self.schedule) - 2 - index


def noisy(schedule: Tensor) -> int:
    """How many levels of a descending schedule are noisier than its end: the first ones."""
    return int((schedule > schedule[-1]).sum())  # a repeated end is no noise level


def levels(sigmas: Tensor, end_at_step: int = 0, step_increment: int = 1, *, whole: bool = False) -> Levels:
    """The levels of a descending schedule.

    Arguments:
        sigmas: Descending noise levels with shape (n + 1), or (n) if the final zero is missing.
        end_at_step: Index of the noisiest level, clamped to n - 1 so that one noisy level remains.
        step_increment: Keep every m-th level.
        whole: Whether no final zero can be missing: sampling ends at the last sigma, whatever it is.

    Raises:
        ValueError: if the schedule is empty, not finite, negative, or not descending.
    """
    schedule = torch.as_tensor(sigmas).detach().to("cpu", torch.float32).flatten()
    if schedule.numel() == 0 or not torch.isfinite(schedule).all() or (schedule < 0).any():
        raise ValueError(f"schedule: {schedule.tolist()} is not a list of finite sigmas of 0 or more")
    if (schedule.diff() > 0).any():
        raise ValueError(f"schedule: {schedule.tolist()} does not descend")
    if schedule[0] == 0:
        raise ValueError("schedule: it has no sigma above 0")
    if schedule[-1] > 0 and not whole:
        schedule = torch.cat([schedule, schedule.new_zeros(1)])
    if end_at_step < 0 or step_increment < 1:
        raise ValueError(f"end_at_step {end_at_step} is below 0 or step_increment {step_increment} below 1")
    last = noisy(schedule) - 1
    if last < 0:
        raise ValueError(f"schedule: it has no sigma above its end, {float(schedule[-1]):.4g}")
    end = min(end_at_step, last)
    visited = tuple(range(last, end - 1, -1))
    kept = tuple(reversed(visited[::-1][::step_increment]))
    return Levels(schedule, visited, kept)


def step_at(sigmas: Tensor, sigma: float) -> tuple[int, bool]:
    """The schedule index of the noisiest level at or below a sigma, and whether there is one.

    Below the lowest noisy level it is that one.

    Arguments:
        sigmas: The descending schedule, with shape (n + 1).
        sigma: A noise level, in the schedule's own space.
    """
    noisy = [float(s) for s in sigmas if s > 0]
    found = next((i for i, s in enumerate(noisy) if s <= sigma * (1 + 1e-6)), None)
    return (len(noisy) - 1, False) if found is None else (found, True)
