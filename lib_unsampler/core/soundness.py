"""What a trajectory can be: shapes that fit, levels of its own schedule, values that a run makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .kept import finite
from .noising import PREDICTIONS
from .replay import Recording

if TYPE_CHECKING:
    from .trajectory import Trajectory

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The types of latents by their names in safetensors."""


def misfits(saved: Trajectory) -> list[str]:
    """What does not fit together in a trajectory, by shapes, types and levels: a sentence each."""
    shape, found = tuple(saved.source.shape), _bad_types(saved)
    if saved.prediction not in PREDICTIONS:
        found.append(f"prediction {saved.prediction!r} is not one of {', '.join(PREDICTIONS)}")
    if len(shape) not in (4, 5) or saved.z.shape[1:] != saved.source.shape or saved.z.numel() == 0:
        found.append(f"z {tuple(saved.z.shape)} does not fit source {shape}")
    if shape[:1] != (len(saved.seeds),):
        found.append(f"{len(saved.seeds)} seeds do not fit a source of {shape}")
    if not all(type(seed) is int for seed in saved.seeds):
        found.append(f"seeds {list(saved.seeds)} are not whole numbers")
    if saved.mask is not None and not _broadcasts(tuple(saved.mask.shape), shape):
        found.append(f"mask {tuple(saved.mask.shape)} does not fit source {shape}")
    if saved.blended and (saved.mask is None or saved.handoff is None):
        found.append("mask and handoff come together in format 1")
    if saved.handoff is not None and tuple(saved.handoff.shape) != shape:
        found.append(f"handoff {tuple(saved.handoff.shape)} does not fit source {shape}")
    return found or _level_misfits(saved) or ([] if saved.replay is None else _replay_misfits(saved, saved.replay))


def _bad_types(saved: Trajectory) -> list[str]:
    wrong = {name: tensor.dtype for name, tensor in saved.tensors().items() if tensor.dtype not in DTYPES}
    return [f"{name} is of type {str(dtype).removeprefix('torch.')}, not floating" for name, dtype in wrong.items()]


def _level_misfits(saved: Trajectory) -> list[str]:
    """The schedule and the levels that are said to be from it."""
    schedule, sigmas = saved.schedule, saved.sigmas
    if schedule.ndim != 1 or not schedule.isfinite().all() or (schedule.diff() > 0).any():
        return ["the schedule does not descend"]
    if len(schedule) < 2 or schedule[0] <= 0 or schedule[-1] < 0:
        return [f"the schedule of {len(schedule)} does not lead down to 0 or above"]
    if saved.prediction == "flow" and schedule[0] > 1 + 1e-3:
        return [f"the schedule begins at sigma {float(schedule[0]):.4g}, above the 1 of a flow model"]
    if sigmas.shape != saved.z.shape[:1]:
        return [f"sigmas {tuple(sigmas.shape)} do not fit z {tuple(saved.z.shape)}"]
    if (sigmas.diff() < 0).any() or not torch.isin(sigmas, schedule).all() or sigmas[0] <= 0:
        return ["the sigmas are not rising levels of the schedule"]
    if not 0 <= saved.start < len(schedule) or schedule[saved.start] != sigmas[-1]:
        return [f"start {saved.start} does not name the noisiest level in the schedule of {len(schedule)}"]
    return []


def _replay_misfits(saved: Trajectory, recorded: Recording) -> list[str]:
    """A replay's steps, counts and options."""
    shape, steps = tuple(saved.source.shape), len(recorded.states)
    if tuple(recorded.residual.shape) != shape or not 1 <= steps <= len(saved.schedule) - 1 - saved.start:
        return [f"states {tuple(recorded.states.shape)} do not fit source {shape} and start"]
    if not torch.equal(recorded.sigmas.cpu().float(), saved.schedule.cpu().float()[-steps - 1 :]):
        return ["the maps were made on another schedule"]
    falls = (recorded.sigmas.diff() < 0)[:-1].nonzero().flatten().tolist()  # a repeated level takes no noise
    bare = sorted(set(falls) - set(recorded.steps))
    found = [f"no map belongs to step {bare[0]} of {steps}"] if bare else []
    for name, value in recorded.options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            found.append(f"the replay's {name} {value!r} is neither number nor word")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"the replay's {name} {value!r} is not finite")
    return found


def bad_values(saved: Trajectory) -> list[str]:
    """What a trajectory's tensors hold that none can: a sentence each. Reads everything."""
    wrong = [name for name, tensor in saved.tensors().items() if not finite(tensor)]
    found = [f"{name} holds values that are not finite" for name in wrong]
    if saved.mask is not None and "mask" not in wrong and not 0 <= saved.mask.min() <= saved.mask.max() <= 1:
        low, high = float(saved.mask.min()), float(saved.mask.max())
        found.append(f"mask holds values from {low:g} to {high:g}, not from 0 to 1")
    return found


def _broadcasts(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(onto))
    return len(shape) <= len(onto) and all(one in (1, other) for one, other in pairs)
