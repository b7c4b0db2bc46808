"""The real k-diffusion, by name: its schedules, and its samplers with seeded noise per image."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.noising import SeededDraws
from ..settings import STOCHASTIC
from .embedded import Denoiser

with warnings.catch_warnings():
    # k-diffusion pulls in clip, which warns about pkg_resources; no user can do anything about it.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from k_diffusion import sampling as kd

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

    Returns:
        The latents at the end, with the shape of z. ``dpm_fast`` and ``dpm_adaptive`` end at the
        last sigma above 0, as they do in the WebUI. From the last level alone the answer is
        ``model(z, sigma)``, every sampler's last step (k-diffusion's ``dpmpp_2m_sde`` fails there).
    """
    if (sigmas > 0).sum() == 1:
        return model(z, sigmas[:1].expand(len(z)))
    own = function(sampler)
    accepted = inspect.signature(own).parameters
    options: dict[str, Any] = {"callback": callback, "disable": True}
    if sampler in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        options["noise_sampler"] = _brownian(z, sigmas[sigmas > 0], seeds)
    elif "noise_sampler" in accepted:
        draws = SeededDraws(seeds, tuple(z.shape[1:]))
        counter = iter(range(first, 2**31))
        options["noise_sampler"] = lambda *_: draws(next(counter)).to(z)
    if "sigmas" in accepted:
        return own(model, z, sigmas, **options)
    span = (float(sigmas[sigmas > 0].min()), float(sigmas[0]))
    if sampler == "dpm_fast":
        options["n"] = len(sigmas) - 1
    return own(model, z, *span, **options)


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
