"""A saved trajectory in the place of new noise levels: whether it fits a request, and the plan that walks it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.noising import blend
from ..core.schedule import Levels, noisy
from ..core.trajectory import Trajectory
from .driven import Plan


def refusal(
    saved: Trajectory, prediction: str, images: int, size: tuple[int, int], schedule: Tensor | None
) -> str | None:
    """Why a trajectory cannot be used, if it cannot.

    Arguments:
        prediction: The loaded model's prediction type.
        images: Images in each batch of the request; a file of one picture serves each of them.
        size: Height and width of its latents.
        schedule: The schedule that sampling goes on with, with shape (n + 1); None where nothing is sampled.
    """
    if saved.prediction != prediction:
        return f"it is from a model of type {saved.prediction}, and the loaded one is of type {prediction}"
    height, width = saved.source.shape[-2:]
    if (height, width) != size or len(saved.source) not in (1, images):
        held, asked = f"{len(saved.source)} of {8 * width} x {8 * height}", f"{images} of {8 * size[1]} x {8 * size[0]}"
        return f"it holds other pictures: {held}, and a batch of this request is {asked}"
    if schedule is not None and not _same(saved.schedule, schedule):
        return (
            f"it was made on another schedule: {_said(saved.schedule)}, and this sampler, scheduler, steps and "
            f"denoising strength give {_said(schedule)}"
        )
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = one.cpu().float(), other.cpu().float()
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _said(schedule: Tensor) -> str:
    return f"{len(schedule) - 1} steps from sigma {float(schedule[0]):.4g} to {float(schedule[-2]):.4g}"


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
    """Every level as (schedule index, z), least noisy first; the last is unmasked, where the file has it so."""
    levels = [*saved.z[:-1], saved.z[-1] if begins_elsewhere(saved) else saved.latent]
    return ((index, z.to(like).expand_as(like)) for index, z in zip(plan.levels.kept, levels))


def begins_elsewhere(saved: Trajectory) -> bool:
    """Whether sampling goes on from another state than the noisiest level (img2img's extra noise)."""
    level = blend(saved.latent.float(), saved.source, saved.mask)
    return not torch.allclose(level, saved.z[-1].float(), rtol=1e-3, atol=1e-3)
