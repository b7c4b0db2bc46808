"""A saved trajectory in the place of new noise levels: whether it fits a request, and the plan that walks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..core.noising import add_noise, implied_noise
from ..core.schedule import Levels, noisy
from ..core.trajectory import Trajectory
from .driven import Plan


def refusal(
    saved: Trajectory, prediction: str, images: int, size: tuple[int, int], schedule: Tensor | None, factor: int
) -> str | None:
    """Why a trajectory cannot be used, if it cannot.

    Arguments:
        prediction: The loaded model's prediction type.
        images: Images in each batch of the request; a file of one picture serves each of them.
        size: Height and width of its latents.
        schedule: The schedule that sampling goes on with, with shape (n + 1); None where nothing is sampled.
        factor: How many times as long as its latents' a picture's side is.
    """
    if saved.prediction != prediction:
        return f"it is from a model of type {saved.prediction}, and the loaded one is of type {prediction}"
    height, width = saved.source.shape[-2:]
    if (height, width) != size or len(saved.source) not in (1, images):
        held = f"{len(saved.source)} of {factor * width} x {factor * height}"
        asked = f"{images} of {factor * size[1]} x {factor * size[0]}"
        return f"it holds other pictures: {held}, and a batch of this request is {asked}"
    if schedule is not None and not _same(saved.schedule, schedule):
        held, asked = _said(saved.schedule), _said(schedule)
        if held == asked:
            held, asked = _apart(saved.schedule, schedule)
        return (
            f"it was made on another schedule: {held}, and this sampler, scheduler, steps and "
            f"denoising strength give {asked}"
        )
    return None


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


def unguidable(saved: Trajectory) -> str | None:
    """Why a file's levels cannot guide, if they cannot.

    Guidance needs one noise through all levels, every executed level, and z as a sampler knows it.
    """
    asked = saved.settings
    mode, noise = asked.get("mode", "noise"), asked.get("noise", "shared")
    if saved.blended:
        return "its levels are masked (a file of format 1), from which only sampling can begin (output init)"
    if mode == "replay" or (mode == "noise" and noise != "shared"):
        made = "mode replay" if mode == "replay" else f"noise {noise!r}"
        return f"it was made with {made}, whose levels have no noise in common"
    missing = int((saved.schedule[saved.start :] > 0).sum()) - len(saved.z)
    if mode != "noise" and missing > 0:
        return f"it lacks {missing} of the levels that are sampled; save it with a step_increment of 1"
    return None


def every_level(saved: Trajectory, plan: Plan, like: Tensor) -> Callable[[int], Tensor]:
    """Z of any executed level by schedule index; of shared noise, also one that the file does not hold."""
    held = dict(zip(plan.levels.kept, saved.z))
    sigma = saved.sigmas[-1]
    noise = implied_noise(saved.z[-1].float(), saved.source.float(), sigma, saved.prediction)

    def level(index: int) -> Tensor:
        if index in held:
            return held[index].to(like).expand_as(like)
        made = add_noise(saved.source.float(), noise, plan.levels.schedule[index], saved.prediction)
        return made.to(like).expand_as(like)

    return level


def walk(saved: Trajectory, plan: Plan, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every level as (schedule index, z), least noisy first."""
    return ((index, z.to(like).expand_as(like)) for index, z in zip(plan.levels.kept, saved.z))
