"""What a request cannot have, found before any work: each error names the field, its value and what is allowed.

What a request says itself is checked before the host begins (:func:`check`). What its schedule decides is checked
where the host samples (:func:`check_schedule`), before any model call: only there has the host set all that the
schedule depends on (Neo's shift, zero terminal SNR, what other extensions put on the model).
"""

from __future__ import annotations

import inspect
from typing import Any

from ..core import comfy
from ..core.held import unguidable
from ..core.inversion import kin
from ..core.replay import check_function
from ..core.schedule import Levels, step_at
from ..core.trajectory import Trajectory, TrajectoryError
from ..page import shelf
from ..pictures.animation import check_format
from ..settings import SAMPLING, TITLE, Settings, remarks, surface_fields
from ..settings.effects import clamped
from . import saved
from .filing import ENDINGS
from .host.codec import factor, latent_scale
from .host.guiding import sampler_function
from .host.page import field_defaults, output_folder
from .host.request import refiner
from .host.schedule import (
    get_sigmas,
    has_sigmas,
    host_levels,
    img2img_steps,
    is_inpainting_model,
    prediction_type,
)


def check(p: Any, settings: Settings, sampler: Any) -> Trajectory | None:
    """Refuses what cannot be done here, whatever the schedule; reads the latents file that is asked for, if one is.

    Arguments:
        sampler: The host's, as it would sample this request.

    Raises:
        ValueError: saying why.
    """
    if "animation" in settings.output:
        _check_format(settings)
    _check_sampler(p, settings, sampler)
    _check_onward(p, settings, sampler)
    _check_strength(p, settings)
    return _fitting(p, settings) if settings.trajectory else None


def check_schedule(p: Any, settings: Settings, sampler: Any, most: int, file: Trajectory | None) -> None:
    """Refuses what cannot be done on the schedule that the host samples with.

    Arguments:
        sampler: The host's, when all that its schedule depends on is set.
        most: Megapixels of frames that the WebUI's owner allows.
        file: What :func:`check` has read.

    Raises:
        ValueError: saying why.
    """
    if file is not None:
        schedule = get_sigmas(p, sampler, img2img_steps(p)[0]) if settings.samples else None
        if schedule is not None and (why := saved.other_schedule(file, schedule)):
            raise ValueError(f"trajectory: {settings.trajectory!r} does not fit: {why}")
        return
    walked = asked_levels(p, settings, sampler)
    if set(settings.output) - (SAMPLING - {"strength sweep"}):
        _check_work(p, settings, asked_steps(p, settings, sampler)[0], walked, most)


def remarked(p: Any, settings: Settings, sampler: Any, script: str | None) -> list[str]:
    """What is to be said of a request that can be done: what changes nothing, or less than it says.

    Arguments:
        script: The title of the script that drives the request, if one does.
    """
    defaults = field_defaults()
    values = {f.name: (getattr(settings, f.name), f.default) for f in surface_fields("host")}
    given = {name for name, (value, own) in values.items() if value not in (own, defaults.get(name, own))}
    said = remarks(settings, given, settings.output)
    said += [] if settings.trajectory else clamped(settings, asked_steps(p, settings, sampler)[0])
    if not has_sigmas(sampler):
        said.append(f"{p.sampler_name} has no sigma schedule: its timesteps' noise levels are shown")
    if script is not None and set(settings.output) - SAMPLING - {"latents", "comfyui"}:
        said.append(f"{script} gets one picture for each image; the others are only saved to disk")
    return said


def asked_steps(p: Any, settings: Settings, sampler: Any) -> tuple[int, int]:
    """(steps of the schedule, the index where it ends), as the request and img2img say."""
    total, start = img2img_steps(p) if settings.samples else (settings.steps or p.steps, 0)
    if settings.end_at_sigma > 0:
        return total, step_at(get_sigmas(p, sampler, total), settings.end_at_sigma)[0]
    return total, settings.end_at_step if settings.end_at_step >= 0 else start


def asked_levels(p: Any, settings: Settings, sampler: Any) -> Levels:
    """The levels of the host's schedule that the request asks for.

    Raises:
        ValueError: naming the scheduler, if its sigmas are no schedule.
    """
    return host_levels(p, sampler, *asked_steps(p, settings, sampler), settings.step_increment)


def _check_format(settings: Settings) -> None:
    try:
        check_format(ENDINGS[settings.format])
    except ValueError as error:
        raise ValueError(f"format: {error}") from None


def _check_strength(p: Any, settings: Settings) -> None:
    """At strength 0 with *img2img_fix_steps* on, img2img has no step: it gives the source back."""
    if settings.samples and img2img_steps(p)[0] < 1:
        raise ValueError(
            f"denoising_strength: {p.denoising_strength:g} leaves no noise level to sample from where the WebUI does "
            "img2img's steps exactly (img2img_fix_steps); take more than 0, or leave init out of output"
        )


def _check_sampler(p: Any, settings: Settings, sampler: Any) -> None:
    mode, driving = settings.mode, settings.mode != "noise"
    if not has_sigmas(sampler):
        if settings.samples or driving:
            needs = f"output: {_sampling_output(settings)}" if settings.samples else f"mode: {mode}"
            raise ValueError(
                f"{needs} needs a sampler with a sigma schedule, and {p.sampler_name!r} has timesteps; "
                "choose a k-diffusion sampler (Euler, DPM++, Heun, LMS, ...)"
            )
        return
    other = refiner(p)
    if driving and other is not None:
        raise ValueError(f"refiner: {other!r} takes the model's place on the way; mode {mode} needs one model (None)")
    if mode == "invert":
        kin(sampler_function(sampler), settings.solver)
    elif mode == "replay":
        check_function(sampler.func)


def _sampling_output(settings: Settings) -> str:
    """The first wanted output for which img2img samples."""
    return next(name for name in settings.output if name in SAMPLING)


def _check_onward(p: Any, settings: Settings, sampler: Any) -> None:
    """What guide and film need of the sampler, and a map of the mask."""
    listens = settings.samples and settings.film != "noising"
    if "guide" in settings.output or listens:
        needs = "output: guide" if "guide" in settings.output else f"film: {settings.film}"
        if "sigmas" not in inspect.signature(sampler.func).parameters:
            raise ValueError(
                f"{needs} needs a sampler that walks the schedule; {p.sampler_name!r} chooses its own steps"
            )
    if "comfyui" in settings.output and not comfy.form_of(*latent_scale(p.sd_model)):
        scale, shift = latent_scale(p.sd_model)
        raise ValueError(
            f"output: comfyui knows the latent formats {', '.join(comfy.SCALES)}, and this model's is another "
            f"(scale {scale:g}, shift {shift:g})"
        )
    if not settings.maps:
        return
    if getattr(p, "image_mask", None) is None and getattr(p, "nmask", None) is None:
        raise ValueError("guide_weight: 'map' needs an inpaint mask, which it reads as a map of strengths")
    if getattr(p, "inpainting_fill", 1) != 1:
        raise ValueError("guide_weight: 'map' needs masked content 'original'; the others put something else there")
    if getattr(p, "inpaint_full_res", False):
        raise ValueError("guide_weight: 'map' needs inpaint area 'whole picture'; 'only masked' crops the map")
    if is_inpainting_model(p.sd_model):
        raise ValueError(f"guide_weight: 'map' does not go with an inpainting checkpoint ({p.sd_model_name})")


def _fitting(p: Any, settings: Settings) -> Trajectory:
    name = settings.trajectory
    try:
        file = shelf.read(output_folder(), name)
    except TrajectoryError as error:
        raise ValueError(f"trajectory: {error}") from None
    if settings.mode == "replay" and file.replay is None:
        raise ValueError(f"trajectory: {name!r} holds no noises to replay; it was not made with mode replay")
    images = len(p.init_images) if len(p.init_images) > 1 else p.batch_size
    size = (p.height // factor(), p.width // factor())
    why = saved.refusal(file, prediction_type(p.sd_model), images, size, factor())
    if why:
        raise ValueError(f"trajectory: {name!r} does not fit: {why}")
    if "guide" in settings.output and (why := unguidable(file)):
        raise ValueError(f"trajectory: {name!r} cannot guide: {why}")
    if "strength sweep" in settings.output and file.blended:
        raise ValueError(f"trajectory: {name!r} cannot be swept: its levels are masked (a file of format 1)")
    return file


def _check_work(p: Any, settings: Settings, total: int, walked: Levels, most: int) -> None:
    levels = len(walked.kept)
    frames = levels + settings.include_clean + levels * ("strength sweep" in settings.output)
    images = p.batch_size * p.n_iter
    megapixels = frames * images * p.width * p.height / 1e6
    if megapixels > most:
        raise ValueError(
            f"steps: {total} give {frames} frames of {images} x {p.width} x {p.height}, "
            f"{megapixels:.0f} megapixels; at most {most} are allowed (Settings, {TITLE}). "
            "Take fewer steps or a larger step_increment"
        )
