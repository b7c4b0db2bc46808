"""A request of the page: the form and the page's own controls, as what the command line runs; the page foresees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core.trajectory import Trajectory, TrajectoryError
from ...page import shelf
from ...pictures.animation import check_format
from ...pictures.estimate import Estimate, estimate
from ...settings import Preferences, Settings, SettingsError, parse, surface_fields
from .. import sampling
from ..cli import PIXELS, RESUMABLE
from ..onward import PREDICTION, check_saved
from ..running import (
    Story,
    Targets,
    check,
    check_resume,
    first_sampled,
    kept_indices,
    plan_levels,
    planned_story,
    stored_settings,
    story,
)

ENDINGS = {"gif": ".gif", "webp": ".webp", "apng": ".png", "mp4": ".mp4"}
TWICE = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
"""Samplers whose step asks the model twice."""

BOUNDS = {"steps": (1, 1000), "denoising_strength": (0, 1), "size": (16, 2048)}
"""What the page's own numbers may be that are no field of ours, ``size`` a picture's long side."""


class Asked:
    """What is asked, checked on demand: the page's script asks about requests that cannot be made yet."""

    def __init__(self, told: Mapping[str, Any], form: Settings, folder: Path) -> None:
        """Of the page's own controls (img2img's, and ``model``), the form's settings and the folder of results.

        Raises:
            SettingsError: naming the controls whose values are none.
        """
        self.form, self._folder, self._told = form, folder, dict(told)
        numbers = {name: _number(name, told.get(name), *bounds) for name, bounds in BOUNDS.items()}
        self.steps, self.size = int(numbers["steps"]), int(numbers["size"])
        self.strength = numbers["denoising_strength"]
        self.start = self.steps - int(min(self.strength, 0.999) * self.steps) - 1  # img2img's start level

    @cached_property
    def saved(self) -> Trajectory | None:
        """The latents file that is gone on from, if one is; in mode noise its z alone."""
        name = self.form.trajectory
        if not name:
            return None
        try:
            file = shelf.read(self._folder, name)
            stored_settings(file, repr(name))
        except (TrajectoryError, ValueError) as error:
            raise ValueError(f"trajectory: {error}") from None
        if self.form.mode == "replay" and file.replay is None:
            raise ValueError(f"trajectory: {name!r} holds no noises to replay; it was not made with mode replay")
        return file if self.form.mode == "replay" else replace(file, replay=None)

    @cached_property
    def settings(self) -> Settings:
        """The command line's settings.

        Raises:
            SettingsError: for what it does not allow. ValueError: for a latents file that cannot be gone on from.
        """
        form, told = self.form, self._told
        both = {f.name for f in surface_fields("host")} & {f.name for f in surface_fields("cli")}
        values = {name: getattr(form, name) for name in both}
        values |= {name: told.get(name) for name in ("sampler", "scheduler", "model", "seed")}
        values["steps"] = self.steps if form.samples or not form.steps else form.steps
        if form.samples and form.end_at_step < 0 and not form.end_at_sigma:
            values["end_at_step"] = self.start
        for name in ("positive", "negative"):
            own = str(told.get(name, ""))
            values |= {name: getattr(form, name) or own, f"resample_{name}": own or " "}
        values |= {"resample_cfg": told.get("cfg_scale"), "guide": "guide" in form.output}
        file = self.saved
        if file is None:
            return parse(values, "cli")
        stored = stored_settings(file, repr(form.trajectory))
        if form.mode != "replay" and stored.get("mode") == "replay":
            stored |= {"mode": "noise", "noise": "independent", "skip": 0}  # what its levels are without their noises
        return parse({**stored, **{name: values[name] for name in RESUMABLE if name in values}}, "cli")

    def targets(self, folder: Path, name: str) -> Targets:
        """What is to be made, as files of a folder whose names end in ``name``."""
        moving = ENDINGS[self.form.format]
        files = {
            "animation": ("animation", "animation", moving),
            "frames": ("frames", "frames", ""),
            "sheet": ("contact sheet", "sheet", ".png"),
            "curve": ("sigma curve", "curve", ".png"),
            "latents": ("latents", "latents", ".safetensors"),
            "sweep": ("strength sweep", "sweep", moving),
            "sweep_pictures": ("strength sweep", "swept", ""),
        }
        wanted = set(self.form.output)
        made = {k: folder / f"{stem}-{name}{end}" for k, (output, stem, end) in files.items() if output in wanted}
        if wanted & {"init", "guide"}:
            made["resample"] = folder / f"picture-{name}.png"
        if self.form.report:
            made["report"] = folder / f"report-{name}.png"
        return Targets(**made)

    def story(self, targets: Targets) -> Story:
        """What the frames show."""
        file = self.saved
        if file is None:
            return planned_story(self.settings, targets, plan_levels(self.settings))
        skip = 0 if file.replay is None else check_saved(file, file.replay, self.settings)
        return story(self.settings, targets, file.schedule, kept_indices(file), first_sampled(file, skip))

    # What the page is told before (:class:`...page.questions.Prospect`)

    @property
    def model(self) -> str:
        """The embedded model's name."""
        return str(self._told.get("model"))

    def curve(self) -> dict[str, Any]:
        """The schedule that is walked."""
        levels = self.walked
        prediction = PREDICTION[self.settings.model]
        ends = bool(self.form.trajectory) or self.form.end_at_sigma > 0
        return {
            "sigmas": levels.schedule,
            "timesteps": [sampling.timestep(sigma, prediction) for sigma in levels.schedule if sigma > 0],
            "total": len(levels.schedule) - 1,
            "own": [self.steps, self.start],
            "fixed": False,
            "kept": levels.kept if ends else None,
            "flow": prediction == "flow",
            "note": "",
        }

    @cached_property
    def walked(self) -> Walked:
        """The levels.

        Raises:
            ValueError: as :attr:`settings`.
        """
        file = self.saved
        if file is not None:
            return Walked(file.schedule.tolist(), kept_indices(file), 0)
        plan = plan_levels(self.settings)
        return Walked(plan.schedule.tolist(), list(plan.kept), len(plan.visited))

    def refused(self) -> list[str]:
        """Why it cannot be made, if it cannot."""
        try:
            self.check()
        except SettingsError as error:
            return error.errors
        except ValueError as error:
            return [str(error)]
        return []

    def check(self) -> list[str]:
        """Refuses what cannot be made; returns what there is to say of it.

        Raises:
            ValueError: saying why.
        """
        form, settings = self.form, self.settings
        targets = self.targets(Path("unmade"), "")
        if "comfyui" in form.output:
            raise ValueError(f"output: comfyui does not go with the embedded models; {PIXELS}")
        if form.maps:
            raise ValueError("guide_weight: 'map' needs an inpaint mask, which this page has not")
        if {"animation", "strength sweep"} & set(form.output):
            try:
                check_format(ENDINGS[form.format])
            except ValueError as error:
                raise ValueError(f"format: {error}") from None
        said = (
            check(settings, targets)
            if self.saved is None
            else check_resume(self.saved, settings, chosen=True, targets=targets)
        )
        cost = self.cost()
        if cost and cost[0].megapixels > Preferences.megapixels:
            raise ValueError(
                f"steps: {cost[0].frames} frames are {cost[0].megapixels:.0f} megapixels; at most "
                f"{Preferences.megapixels} are made. Take fewer steps or a larger step_increment"
            )
        return said

    def cost(self) -> tuple[Estimate, str] | None:
        """What it costs, if nothing stands in the way of knowing it."""
        try:
            levels, settings = self.walked, self.settings
        except ValueError:
            return None
        width, height = (int(_number(side, self._told.get(side, 512), 1, 2048)) for side in ("width", "height"))
        sampled = len(levels.schedule) - 1 - levels.kept[-1] if self.form.samples else 0
        sigmas = [levels.schedule[index] for index in levels.kept]
        calls = 2 if settings.sampler in TWICE else 1
        made = estimate(
            *(self.form, sigmas, levels.visited, sampled, width, height), 1, calls, "2m" in settings.sampler
        )
        return made, self.form.format


@dataclass(frozen=True)
class Walked:
    """A schedule's sigmas, the kept levels' indices, least noisy first, and how many levels are walked anew."""

    schedule: list[float]
    kept: list[int]
    visited: int


def _number(name: str, value: Any, low: float, high: float) -> float:
    """A number of the page's own controls."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise SettingsError([f"{name.replace('_', ' ')}: {value!r} is not a number from {low:g} to {high:g}"])
    return number
