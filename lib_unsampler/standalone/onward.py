"""From the noise back to a picture: the embedded model under its prompts, and what is sampled with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core import inversion, replay
from ..core.guidance import skip_residual
from ..core.kept import Store
from ..core.noising import SeededDraws, add_noise, blend, normalize_noise, walk
from ..core.replay import Recording
from ..core.schedule import Levels, levels
from ..core.trajectory import Trajectory
from ..pictures import render
from ..settings import Settings, to_infotext
from . import sampling
from .embedded import Denoiser, guided, make_model, masked
from .progress import Bars

WRITTEN_BY = "Batch Unsampler"
"""What the text in every file begins with."""
Listen = Callable[[int, Tensor, Tensor], None]
"""Told each step of a sampling: its number from 0, the state before it, and the model's estimate."""
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
    positive, negative = (make_model(settings.model, p, *source.shape[-2:]) for p in prompts)
    model = guided(positive, negative, scale)
    return model if mask is None else masked(model, source, mask)


@contextmanager
def bar(name: str, steps: int | None, bars: Bars, listen: Listen | None = None) -> Iterator[Callable[[Any], None]]:
    """A progress bar with a name, as the callback of a sampler; ``listen`` is told each step too."""
    with bars(name, steps, "step") as shown:

        def callback(info: Any) -> None:
            if listen is not None:
                listen(int(info["i"]), info["x"], info["denoised"])
            shown.update()

        yield callback


def first_draw(settings: Settings, schedule: Tensor, start: int) -> int:
    """The first draw of a seed that did not make z: shared noise is one draw, other kinds have one for each level."""
    return 1 if settings.mode != "noise" or settings.noise == "shared" else len(schedule) - 1 - start


def resampler(settings: Settings) -> str:
    """The sampler that comes back from the noise: what was inverted as another one comes back by that one."""
    return inversion.kin(settings.sampler, settings.solver)[0] if settings.mode == "invert" else settings.sampler


def shared_levels(source: Tensor, schedule: Tensor, settings: Settings) -> Callable[[int], Tensor]:
    """Z of any schedule index with shared noise; it stands until the next is asked for."""
    noise = SeededDraws((settings.seed,), tuple(source.shape[1:]))(0)
    noise = normalize_noise(noise) if settings.normalize else noise
    z = torch.empty_like(source)
    return lambda index: add_noise(source, noise, schedule[index], PREDICTION[settings.model], z)


def guide_by(level: Callable[[int], Tensor], schedule: Tensor, start: int, settings: Settings) -> sampling.Guide | None:
    """What draws the resampling from schedule index ``start`` towards the levels, if it is to be drawn."""
    if not settings.guide:
        return None
    times = [sampling.timestep(float(sigma), PREDICTION[settings.model]) for sigma in schedule[start:-1]]
    asked = settings.guide_alpha, settings.guide_strength, settings.guide_from, settings.guide_until
    return sampling.Guide(skip_residual(times, *asked), lambda step: level(start + step))


def carry_back(
    z: Tensor,
    source: Tensor,
    mask: Tensor | None,
    sigmas: Tensor,
    settings: Settings,
    sampler: str,
    first: int,
    bars: Bars,
    guide: sampling.Guide | None = None,
    listen: Listen | None = None,
) -> Image.Image:
    """The picture that a level becomes when it is carried down the rest of the schedule.

    Arguments:
        z: The unmasked latent at ``sigmas[0]`` with shape (1, 3, H, W).
        first: The first draw that the sampler may use.
        guide: What it is drawn towards, if anything.
        listen: Told each step, if anybody wants to know.
    """
    model = resampling_model(settings, source, mask)
    steps = None if sampler in ("dpm_fast", "dpm_adaptive") else len(sigmas) - 1
    with bar("sampling back", steps, bars, listen) as callback:
        clean = sampling.sample(model, z, sigmas, sampler, (settings.seed,), first, callback, guide)
    return render.to_pictures(blend(clean, source, mask))[0]


def recorded_levels(plan: Levels, settings: Settings) -> Levels:
    """Every level that a replay samples: from ``skip`` steps below the walk's noisiest."""
    return levels(plan.schedule, plan.kept[-1] + settings.skip)


def remaining(plan: Levels) -> Tensor:
    """The schedule from the walk's noisiest level to 0."""
    return plan.schedule[plan.kept[-1] :]


def record(
    source: Tensor, plan: Levels, settings: Settings, mask: Tensor | None, bars: Bars, store: Callable[[], Store]
) -> Recording:
    """The picture as its sampler's noises; ``store`` is where its levels and theirs are kept."""
    below = recorded_levels(plan, settings)
    prediction = PREDICTION[settings.model]
    draw = SeededDraws((settings.seed,), tuple(source.shape[1:]))
    with store() as levels_of:
        for _, z in walk(source, below, draw, settings.noise, prediction, settings.normalize):
            levels_of.add(z)
        states = levels_of.stack()
    fresh = (draw(j) for j in count(len(plan.schedule) - 1))
    model, function = source_model(settings, source, mask), sampling.function(settings.sampler)
    with bar("recording", len(states), bars) as callback:
        options: dict[str, Any] = {"callback": callback, "disable": True}
        return replay.record(
            function, model, remaining(below), states, source, fresh, prediction, store=store, **options
        )


def play_back(
    recording: Recording,
    skip: int,
    source: Tensor,
    mask: Tensor | None,
    settings: Settings,
    bars: Bars,
    listen: Listen | None = None,
) -> Image.Image:
    """The picture that a recording becomes under the resampling's prompts.

    Arguments:
        skip: Steps to leave out at the recording's beginning.
        listen: Told each step, if anybody wants to know.
    """
    model, function = resampling_model(settings, source, mask), sampling.function(settings.sampler)
    with bar("sampling back", len(recording.states) - skip, bars, listen) as callback:
        clean = replay.replay(function, model, recording.sigmas, recording, skip, callback=callback, disable=True)
    return render.to_pictures(clean)[0]


def check_saved(saved: Trajectory, recording: Recording, settings: Settings) -> int:
    """How many steps of a saved recording ``skip`` leaves out: it counts from the trajectory's noisiest level.

    Raises:
        ValueError: if the maps begin only below the level that is asked for, or do not fit the settings.
    """
    begun = len(saved.schedule) - 1 - len(recording.states) - saved.start
    if settings.skip < begun:
        raise ValueError(f"skip: {settings.skip} is below {begun}, where the saved maps begin")
    replay.check_replay(sampling.function(settings.sampler), recording.sigmas, recording, settings.skip - begun)
    asked = sampling.noise_steps(settings.sampler, recording.sigmas)
    if asked != recording.steps:
        raise ValueError(f"maps: {len(recording.steps)}, where {settings.sampler!r} asks for {len(asked)} at its steps")
    return settings.skip - begun


def parameters(settings: Settings) -> str:
    """What is written into the files: the settings that are not default, as generation parameters.

    Text with a comma, colon or line break is quoted, as the WebUI does.
    """
    pairs = to_infotext(settings, "cli")
    quoted = {k: json.dumps(v, ensure_ascii=False) if set(v) & set(",:\n") else v for k, v in pairs.items()}
    return ", ".join([WRITTEN_BY] + [f"{key}: {value}" for key, value in quoted.items()])
