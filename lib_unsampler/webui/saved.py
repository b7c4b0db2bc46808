"""A saved trajectory in the place of new noise levels: whether it fits a request, and the plan that walks it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.schedule import Levels, noisy
from ..core.trajectory import Trajectory
from .driven import Plan


def refusal(saved: Trajectory, prediction: str, images: int, size: tuple[int, int], factor: int) -> str | None:
    """Why a trajectory cannot be used, whatever the schedule, if it cannot.

    Arguments:
        prediction: The loaded model's prediction type.
        images: Images in each batch of the request; a file of one picture serves each of them.
        size: Height and width of its latents.
        factor: How many times as long as its latents' a picture's side is.
    """
    if saved.prediction != prediction:
        return f"it is from a model of type {saved.prediction}, and the loaded one is of type {prediction}"
    height, width = saved.source.shape[-2:]
    if (height, width) != size or len(saved.source) not in (1, images):
        held = f"{len(saved.source)} of {factor * width} x {factor * height}"
        asked = f"{images} of {factor * size[1]} x {factor * size[0]}"
        return f"it holds other pictures: {held}, and a batch of this request is {asked}"
    return None


def other_schedule(saved: Trajectory, schedule: Tensor) -> str | None:
    """Why a trajectory cannot be sampled on from, on a schedule with shape (n + 1), if it cannot."""
    if _same(saved.schedule, schedule):
        return None
    held, asked = _said(saved.schedule), _said(schedule)
    if held == asked:
        held, asked = _apart(saved.schedule, schedule)
    return (
        f"it was made on another schedule: {held}, and this sampler, scheduler, steps and "
        f"denoising strength give {asked}"
    )


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = one.cpu().float(), other.cpu().float()
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _said(schedule: Tensor) -> str:
    return f"{len(schedule) - 1} steps from sigma {float(schedule[0]):.4g} to {float(schedule[-2]):.4g}"


def _apart(one: Tensor, other: Tensor) -> tuple[str, str]:
    """Two schedules of one length by the level at which they differ most, each number in full."""
    one, other = one.cpu().float(), other.cpu().float()
    step = int(((one - other).abs() / one.abs().maximum(other.abs()).clamp(1e-6)).argmax())
    return f"sigma {float(one[step]):.9g} at step {step}", f"sigma {float(other[step]):.9g} there"


def plan(saved: Trajectory, total: int, own_start: int | None) -> Plan:
    """The plan whose kept levels are the file's.

    Arguments:
        total: The ``steps`` of the host's schedule.
        own_start: The index at which img2img itself would start on it; None where nothing is sampled.
    """
    schedule, kept = saved.schedule.cpu().float(), [saved.start]
    for sigma in saved.sigmas.flip(0)[1:]:
        kept.append(next(i for i in range(kept[-1] + 1, len(schedule)) if schedule[i] == sigma))
    levels = Levels(schedule, tuple(range(noisy(schedule) - 1, saved.start - 1, -1)), tuple(reversed(kept)))
    return Plan(levels, saved.prediction, total, own_start in (None, saved.start))


def walk(saved: Trajectory, plan: Plan, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every level as (schedule index, z), least noisy first."""
    return ((index, z.to(like).expand_as(like)) for index, z in zip(plan.levels.kept, saved.z))
