"""What guides from a saved trajectory: whether its levels can, and every one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .noising import add_noise, implied_noise
from .trajectory import Trajectory


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


def every_level(saved: Trajectory, kept: Sequence[int], like: Tensor) -> Callable[[int], Tensor]:
    """Z of any executed level by schedule index; of shared noise, also one that the file does not hold.

    Arguments:
        kept: The schedule indices of the file's own levels, least noisy first.
        like: What a level is to be like, with shape (B, C, [T,] H, W); a file of one picture serves each of its images.
    """
    held = dict(zip(kept, saved.z))
    sigma = saved.sigmas[-1]
    noise = implied_noise(saved.z[-1].float(), saved.source.float(), sigma, saved.prediction)

    def level(index: int) -> Tensor:
        made = held.get(index)
        if made is None:
            made = add_noise(saved.source.float(), noise, saved.schedule[index].cpu().float(), saved.prediction)
        made = made.to(like)
        return made.expand_as(like)

    return level
