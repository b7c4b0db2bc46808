"""What a request cannot have, found before any work: each error names the field, its value and what is allowed."""

from __future__ import annotations

from typing import Any

from ..core.inversion import kin
from ..core.replay import check_function
from ..core.schedule import Levels
from ..core.trajectory import Trajectory, TrajectoryError
from ..pictures.animation import check_format
from ..settings import TITLE, Settings
from . import saved, shelf
from .filing import ENDINGS
from .host.guiding import sampler_function
from .host.page import output_folder
from .host.request import refiner
from .host.schedule import get_sigmas, has_sigmas, host_levels, img2img_steps, prediction_type


def check(p: Any, settings: Settings, sampler: Any, most: int) -> Trajectory | None:
    """Refuses what cannot be done here; reads the latents file that is asked for, if one is.

    Arguments:
        sampler: The host's, as it would sample this request.
        most: Megapixels of frames that the WebUI's owner allows.

    Raises:
        ValueError: saying why.
    """
    if "animation" in settings.output:
        _check_format(settings)
    _check_sampler(p, settings, sampler)
    if settings.trajectory:
        return _fitting(p, settings, sampler)
    walked = asked_levels(p, settings, sampler)
    if set(settings.output) - {"init"}:
        _check_work(p, settings, walked, most)
    return None


def asked_steps(p: Any, settings: Settings) -> tuple[int, int]:
    """(steps of the schedule, the index where it ends), as the request and img2img say."""
    total, start = img2img_steps(p) if settings.samples else (settings.steps or p.steps, 0)
    return total, settings.end_at_step if settings.end_at_step >= 0 else start


def asked_levels(p: Any, settings: Settings, sampler: Any) -> Levels:
    """The levels of the host's schedule that the request asks for.

    Raises:
        ValueError: naming the scheduler, if its sigmas are no schedule.
    """
    return host_levels(p, sampler, *asked_steps(p, settings), settings.step_increment)


def _check_format(settings: Settings) -> None:
    try:
        check_format(ENDINGS[settings.format])
    except ValueError as error:
        raise ValueError(f"format: {error}") from None


def _check_sampler(p: Any, settings: Settings, sampler: Any) -> None:
    mode, driving = settings.mode, settings.mode != "noise"
    if not has_sigmas(sampler):
        if settings.samples or driving:
            needs = "output: init" if settings.samples else f"mode: {mode}"
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


def _fitting(p: Any, settings: Settings, sampler: Any) -> Trajectory:
    name = settings.trajectory
    try:
        file = shelf.read(output_folder(), name)
    except TrajectoryError as error:
        raise ValueError(f"trajectory: {error}") from None
    if settings.mode == "replay" and file.replay is None:
        raise ValueError(f"trajectory: {name!r} holds no noises to replay; it was not made with mode replay")
    images = len(p.init_images) if len(p.init_images) > 1 else p.batch_size
    schedule = get_sigmas(p, sampler, img2img_steps(p)[0]) if settings.samples else None
    why = saved.refusal(file, prediction_type(p.sd_model), images, (p.height // 8, p.width // 8), schedule)
    if why:
        raise ValueError(f"trajectory: {name!r} does not fit: {why}")
    return file


def _check_work(p: Any, settings: Settings, walked: Levels, most: int) -> None:
    total, _ = asked_steps(p, settings)
    frames = len(walked.kept) + settings.include_clean
    images = p.batch_size * p.n_iter
    megapixels = frames * images * p.width * p.height / 1e6
    if megapixels > most:
        raise ValueError(
            f"steps: {total} give {frames} frames of {images} x {p.width} x {p.height}, "
            f"{megapixels:.0f} megapixels; at most {most} are allowed (Settings, {TITLE}). "
            "Take fewer steps or a larger step_increment"
        )
