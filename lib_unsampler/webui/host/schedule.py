"""The loaded model and the noise schedule that the host makes for a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from modules import devices, sd_samplers, sd_samplers_common
from torch import Tensor

from ...core.schedule import Levels, levels
from .request import RefusedError, attribute


def prediction_type(model: Any) -> str:
    """``eps``, ``v`` or ``flow`` of the loaded model.

    Forge's and Neo's predictor names it; reForge and Classic have ComfyUI's classes instead, named
    after it; in A1111 only SD3 noises its latents itself, and it is a flow model.
    """
    forge = getattr(model, "forge_objects", None)
    inner: Any = None if forge is None else forge.unet.model
    if hasattr(inner, "predictor"):
        return {"const": "flow", "v_prediction": "v"}.get(inner.predictor.prediction_type, "eps")
    kinds = [kind.__name__ for kind in type(getattr(inner, "model_sampling", None)).__mro__]
    if "CONST" in kinds or hasattr(model, "add_noise_to_latent"):
        return "flow"
    return "v" if "V_PREDICTION" in kinds or getattr(model, "parameterization", "eps") == "v" else "eps"


def is_inpainting_model(model: Any) -> bool:
    """Whether a model is also shown the mask and the masked picture."""
    inner = getattr(model, "model", None)
    return bool(getattr(model, "is_inpaint", False)) or getattr(inner, "conditioning_key", None) in ("hybrid", "concat")


def make_sampler(p: Any) -> Any:
    """The sampler that the host will make for this request."""
    return sd_samplers.create_sampler(p.sampler_name, p.sd_model)


def has_sigmas(sampler: Any) -> bool:
    """Whether a sampler walks sigmas (k-diffusion's dialect) rather than timesteps."""
    return hasattr(sampler, "get_sigmas")


def get_sigmas(p: Any, sampler: Any, steps: int) -> Tensor:
    r"""The host's schedule for a sampler, descending, with every setting of the host applied.

    Timestep samplers (DDIM, PLMS, UniPC) have none: their timesteps' noise levels are
    :math:`s = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}`.
    """
    if has_sigmas(sampler):
        return sampler.get_sigmas(p, steps)
    alphas = p.sd_model.alphas_cumprod
    alpha = alphas[sampler.get_timesteps(p, steps).to(alphas.device)].double()
    sigmas = ((1 - alpha) / alpha).sqrt().flip(0).float().cpu()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def scheduler(p: Any) -> str:
    """The name of a request's scheduler; older hosts have it in the sampler's own name (Forge Classic)."""
    return str(getattr(p, "scheduler", None) or "Automatic")


def host_levels(p: Any, sampler: Any, total: int, end: int, increment: int) -> Levels:
    """The walk through the host's schedule, of the host's own length and to the host's own end.

    Some schedulers give a level more or less than ``total`` steps have; img2img can start at the latter's alone.

    Raises:
        ValueError: naming the scheduler, if its sigmas are no schedule.
    """
    name = scheduler(p)
    try:
        return levels(get_sigmas(p, sampler, total), min(end, max(total - 1, 0)), increment, whole=True)
    except ValueError as error:
        raise ValueError(f"scheduler: {name!r} with {total} steps cannot be walked: {error}") from None


def img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
    """(schedule steps, index of the start level) of img2img's own sampling."""
    total, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
    return total, total - t_enc - 1


def strength_of(total: int, start: int) -> float:
    """The denoising strength of the fewest decimals at which img2img starts at a level of ``total`` steps.

    The host's ``int(min(strength, 0.999) * steps)`` is ``total - start - 1`` (*img2img steps exactly* off).
    """
    wanted = total - start - 1
    for decimals in range(1, 9):
        for strength in (round(wanted / total + 0.5 / total, decimals), round((wanted + 0.1) / total, decimals)):
            if 0 <= strength <= 1 and int(min(strength, 0.999) * total) == wanted:
                return strength
    return (wanted + 0.5) / total


@contextmanager
def start_at(p: Any, total: int, start: int) -> Iterator[int]:
    """Has img2img's own arithmetic start at another level of a schedule of ``total`` steps.

    Yields the ``steps`` argument for ``sample_img2img``; the denoising strength is the request's
    own again afterwards.

    Raises:
        RefusedError: if the host's arithmetic cannot express that start.
    """
    steps = total - start
    with attribute(p, "denoising_strength", steps / (total + 0.5)):
        if img2img_steps(p, steps) != (total, start):
            raise RefusedError(f"end_at_step: {start} of {total} steps cannot be a start level of this WebUI")
        yield steps


def timestep(p: Any, sigma: Tensor) -> float | None:
    """The model's timestep of a noise level; None where it counts none."""
    wrap: Any = getattr(p.sampler, "model_wrap", None)
    if not has_sigmas(p.sampler) or not hasattr(wrap, "sigma_to_t"):
        return None
    return float(wrap.sigma_to_t(sigma.reshape(1).to(devices.device)))


def guiding_timestep(p: Any, sigma: Tensor, prediction: str) -> float:
    """The timestep, out of 1000, by which guidance weighs a noise level: on flow models s T."""
    known = None if prediction == "flow" else timestep(p, sigma)
    return 1000.0 * float(sigma) if known is None else known


def timesteps(p: Any, schedule: Tensor) -> list[float] | None:
    """The model's timesteps of a whole schedule; None where it counts none, and for the clean end."""
    wrap: Any = getattr(p.sampler, "model_wrap", None)
    if not has_sigmas(p.sampler) or not hasattr(wrap, "sigma_to_t"):
        return None
    noisy = schedule[schedule > 0].to(devices.device)
    try:
        return [float(t) for t in wrap.sigma_to_t(noisy)]
    except (RuntimeError, TypeError, ValueError):  # a scheduler of another kind: the curve goes without
        return None
