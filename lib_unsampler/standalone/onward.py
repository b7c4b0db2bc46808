"""From the noise back to a picture: the embedded model under its prompts, and what is sampled with it."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from torch import Tensor

from ..core import replay
from ..core.noising import SeededDraws, blend, unsample
from ..core.replay import Recording
from ..core.schedule import Levels, levels
from ..core.trajectory import Trajectory
from ..pictures import animation, render
from ..settings import Settings, to_infotext
from . import sampling
from .embedded import Denoiser, guided, make_model, masked

PREDICTION = {"gaussian": "eps", "gaussian-flow": "flow", "mixture": "eps"}


def source_model(settings: Settings, source: Tensor, mask: Tensor | None) -> Denoiser:
    """The embedded model under the source's own prompts and scale."""
    return _model(settings, (settings.positive, settings.negative), settings.cfg, source, mask)


def resampling_model(settings: Settings, source: Tensor, mask: Tensor | None) -> Denoiser:
    """The embedded model under the resampling's prompts and scale."""
    prompts = (settings.resample_positive or settings.positive, settings.resample_negative or settings.negative)
    scale = settings.cfg if settings.resample_cfg < 0 else settings.resample_cfg
    return _model(settings, prompts, scale, source, mask)


def _model(settings: Settings, prompts: tuple[str, str], scale: float, source: Tensor, mask: Tensor | None) -> Denoiser:
    model = guided(*(make_model(settings.model, p, *source.shape[-2:]) for p in prompts), scale)
    return model if mask is None else masked(model, source, mask)


def carry_back(z: Tensor, source: Tensor, mask: Tensor | None, sigmas: Tensor, settings: Settings, path: Path) -> None:
    """Carries the hand-off latent down the rest of the schedule and writes the picture it becomes.

    Arguments:
        z: The unmasked latent at ``sigmas[0]`` with shape (1, 3, H, W).
    """
    model = resampling_model(settings, source, mask)
    clean = blend(sampling.sample(model, z, sigmas, settings.sampler, (settings.seed,)), source, mask)
    animation.write_png(path, render.to_pictures(clean)[0], parameters(settings))


def recorded_levels(plan: Levels, settings: Settings) -> Levels:
    """Every level that a replay samples: from ``skip`` steps below the walk's noisiest."""
    return levels(plan.schedule, plan.kept[-1] + settings.skip)


def remaining(plan: Levels) -> Tensor:
    """The schedule from the walk's noisiest level to 0."""
    return plan.schedule[plan.kept[-1] :]


def record(source: Tensor, plan: Levels, settings: Settings, mask: Tensor | None, quiet: bool) -> Recording:
    """The picture as its sampler's noises."""
    below = recorded_levels(plan, settings)
    prediction = PREDICTION[settings.model]
    draw = SeededDraws((settings.seed,), tuple(source.shape[1:]))
    states = unsample(source, below, draw, settings.noise, prediction, settings.normalize)
    fresh = (draw(j) for j in count(len(plan.schedule) - 1))
    model, function = source_model(settings, source, mask), sampling.function(settings.sampler)
    return replay.record(function, model, remaining(below), states, source, fresh, prediction, disable=quiet)


def play_back(
    recording: Recording, skip: int, source: Tensor, mask: Tensor | None, settings: Settings, path: Path, quiet: bool
) -> None:
    """Samples a recording under the resampling's prompts and writes the picture it becomes.

    Arguments:
        skip: Steps to leave out at the recording's beginning.
    """
    model, function = resampling_model(settings, source, mask), sampling.function(settings.sampler)
    clean = replay.replay(function, model, recording.sigmas, recording, skip, disable=quiet)
    animation.write_png(path, render.to_pictures(clean)[0], parameters(settings))


def check_saved(saved: Trajectory, recording: Recording, settings: Settings) -> int:
    """How many steps of a saved recording ``skip`` leaves out: it counts from the trajectory's noisiest level.

    Raises:
        ValueError: if the maps begin only below the level that is asked for, or do not fit the settings.
    """
    begun = len(saved.schedule) - 1 - len(recording.states) - saved.start
    if settings.skip < begun:
        raise ValueError(f"skip: {settings.skip} is below {begun}, where the saved maps begin")
    replay.check_replay(sampling.function(settings.sampler), recording.sigmas, recording, settings.skip - begun)
    return settings.skip - begun


def parameters(settings: Settings) -> str:
    """What is written into the files: the settings that are not default, as generation parameters.

    Text with a comma, colon or line break is quoted, as the WebUI does.
    """
    pairs = to_infotext(settings, "cli")
    quoted = {k: json.dumps(v, ensure_ascii=False) if set(v) & set(",:\n") else v for k, v in pairs.items()}
    return ", ".join(["Batch Unsampler"] + [f"{key}: {value}" for key, value in quoted.items()])
