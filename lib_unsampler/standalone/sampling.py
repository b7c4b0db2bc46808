"""The real k-diffusion, by name: its schedules, and its samplers with seeded noise per image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..core.guidance import GuidanceError, Weight, first_calls, mix, sample_guided
from ..core.noising import SeededDraws
from ..settings import STOCHASTIC
from . import kdiffusion
from .embedded import Denoiser

kd = kdiffusion.sampling()

SIGMA_RANGE = {"eps": (0.0291675, 14.614642), "flow": (0.03, 1.0)}
"""Lowest and highest sigma of the embedded models: SD 1's for sigma space, and up to pure noise on flow."""


def get_sigmas(scheduler: str, steps: int, prediction: str) -> Tensor:
    """A k-diffusion schedule: descending, ending in 0, with shape (steps + 1).

    Raises:
        ValueError: for ``vp`` on a flow model, whose sigma ends at 1.
    """
    low, high = SIGMA_RANGE[prediction]
    if scheduler == "vp":
        if prediction == "flow":
            raise ValueError("scheduler: 'vp' reaches sigma 152, but a flow model ends at 1; choose another")
        return kd.get_sigmas_vp(steps)
    return getattr(kd, f"get_sigmas_{scheduler}")(steps, low, high)


def check_sampler(sampler: str, prediction: str) -> None:
    """Raises ValueError where k-diffusion's sampler is wrong for the prediction type."""
    if prediction == "flow" and sampler in STOCHASTIC:
        raise ValueError(
            f"sampler: {sampler!r} adds noise by sigma space's rule, which is wrong on a flow model; "
            "choose one without noise, such as 'euler'"
        )


def timestep(sigma: float, prediction: str) -> float:
    """The timestep, out of 1000, of a noise level: s T on flow, SD 1's own table in sigma space.

    Between two timesteps log sigma is interpolated, as k-diffusion's ``DiscreteSchedule.sigma_to_t`` does.
    """
    if prediction == "flow":
        return 1000.0 * sigma
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return float(np.interp(np.log(sigma), np.log((1 - kept) / kept) / 2, np.arange(1000)))


@dataclass(frozen=True, eq=False)
class Guide:
    """What draws a sampling: c of each guided step, from 0, and z of a step."""

    weights: Mapping[int, Weight]
    level: Callable[[int], Tensor]


def check_walks(sampler: str, sigmas: Tensor) -> None:
    """Raises GuidanceError, by name, for a sampler that does not take a schedule's steps one after the other."""
    if (sigmas > 0).sum() > 1:
        first_calls(function(sampler), None, sigmas.new_zeros(1, 1, 1, 1), sigmas)
    elif "sigmas" not in inspect.signature(function(sampler)).parameters:
        raise GuidanceError(f"sampler: {sampler!r} chooses its own steps and cannot be guided")


def function(sampler: str) -> Callable[..., Tensor]:
    """k-diffusion's own function of a sampler."""
    return getattr(kd, f"sample_{sampler}")


def sample(
    model: Denoiser,
    z: Tensor,
    sigmas: Tensor,
    sampler: str,
    seeds: tuple[int, ...],
    first: int = 1,
    callback: Callable[[Any], None] | None = None,
    guide: Guide | None = None,
) -> Tensor:
    """Carries latents down a schedule with a k-diffusion sampler.

    Arguments:
        model: The denoiser, ``model(z, sigma)``.
        z: Latents at ``sigmas[0]`` with shape (B, C, H, W).
        sigmas: The descending schedule from there, ending in 0.
        sampler: The name after ``sample_`` in k-diffusion.
        seeds: One per image, for the noise that stochastic samplers add.
        first: The first draw of each seed that they may use: those before it made z, and are not used again.
        callback: Called once in each step.
        guide: What the state is drawn towards before each step, if anything.

    Returns:
        The latents at the end, with the shape of z. ``dpm_fast`` and ``dpm_adaptive`` end at the
        last sigma above 0, as they do in the WebUI. From the last level alone the answer is
        ``model(z, sigma)``, every sampler's last step (k-diffusion's ``dpmpp_2m_sde`` fails there).
    """
    if (sigmas > 0).sum() == 1:
        return _last_step(model, z, sigmas, callback, guide)
    own = function(sampler)
    accepted = inspect.signature(own).parameters
    options: dict[str, Any] = {"callback": callback, "disable": True}
    if sampler in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        options["noise_sampler"] = _brownian(z, sigmas[sigmas > 0], seeds)
    elif "noise_sampler" in accepted:
        draws = SeededDraws(seeds, tuple(z.shape[1:]))
        counter = iter(range(first, 2**31))
        options["noise_sampler"] = lambda *_: draws(next(counter)).to(z)
    if guide is not None and guide.weights:
        calls = first_calls(own, model, z, sigmas, **options)
        return sample_guided(own, model, z, sigmas, guide.weights, guide.level, calls, **options)
    if "sigmas" in accepted:
        return own(model, z, sigmas, **options)
    span = (float(sigmas[sigmas > 0].min()), float(sigmas[0]))
    if sampler == "dpm_fast":
        options["n"] = len(sigmas) - 1
    return own(model, z, *span, **options)


def _last_step(
    model: Denoiser, z: Tensor, sigmas: Tensor, callback: Callable[[Any], None] | None, guide: Guide | None
) -> Tensor:
    """D(z), every sampler's last step."""
    if guide is not None and 0 in guide.weights:
        z = z.clone()
        mix(z, guide.level(0).to(z), guide.weights[0])
    denoised = model(z, sigmas[:1].expand(len(z)))
    if callback is not None:
        callback({"i": 0, "x": z, "sigma": sigmas[0], "denoised": denoised})
    return denoised


def noise_steps(sampler: str, sigmas: Tensor) -> tuple[int, ...]:
    """The step, from 0, of each noise that a sampler asks for on a schedule: it is run on a single 0."""
    asked: list[int] = []
    begun: list[Any] = []

    def noise(*_: Any) -> Tensor:
        asked.append(len(begun) - 1)
        return sigmas.new_zeros(1, 1, 1, 1)

    options = {"noise_sampler": noise, "callback": begun.append, "disable": True}
    function(sampler)(lambda x, _: 0 * x, sigmas.new_zeros(1, 1, 1, 1), sigmas, **options)
    return tuple(asked)


def _brownian(z: Tensor, sigmas: Tensor, seeds: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """k-diffusion's Brownian tree with a seed per image."""
    low, high = sigmas.min() * (1 - 1e-5), sigmas.max() * (1 + 1e-5)  # torchsde rounds its ends, then warns
    return kd.BrownianTreeNoiseSampler(z, low, high, seed=list(seeds))
