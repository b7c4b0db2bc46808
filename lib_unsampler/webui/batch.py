"""One batch of a request: its levels are made where the host would sample, then shown, and sampled on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..core.ahead import Ahead
from ..core.held import every_level
from ..core.inversion import from_below, unconverged
from ..core.noising import add_noise, normalize_noise, walk
from ..core.replay import SAME, Recording
from ..core.schedule import step_at
from ..core.trajectory import Trajectory
from ..pictures.film import Film
from ..settings import SAMPLING, Settings
from . import driven, onward, refusals, saved
from .driven import Batch, Inverted, Plan
from .host.draws import HostDraws, pass_draws
from .host.guiding import sampler_function
from .host.progress import add_jobs, stopped
from .host.request import comment, same_shape
from .host.saving import temporary_file
from .host.schedule import guiding_timestep, img2img_steps, prediction_type
from .onward import Guide, StrengthMap
from .sweep import Sweep

VISIBLE = 0.02
"""How far an inversion may be off, as a share of the latents' deviation: about a step of 255 in the picture."""


def extra_jobs(settings: Settings, resumed: bool) -> int:
    """Jobs of one batch for the host's progress bar, beyond its own one; ``resumed`` is from a latents file."""
    makes = bool(set(settings.output) - SAMPLING) or settings.report
    return driven.jobs(settings, resumed) + (settings.samples and makes)


class BatchRun:
    """The run of one batch where the host samples: :meth:`start`; what it found is shown afterwards."""

    def __init__(
        self, p: Any, settings: Settings, file: Trajectory | None, strengths: StrengthMap | None = None
    ) -> None:
        """Begins nothing yet.

        Arguments:
            p: The host's request, at one of its batches.
            settings: What is wanted.
            file: The latents file whose levels are taken, if one is.
            strengths: The map that guides, if one does.
        """
        self.p, self.settings, self.file, self.map = p, settings, file, strengths
        self.wanted = set(settings.output)
        self.inverted: Inverted | None = None
        self.recording: Recording | None = None
        self.film: Film | None = None
        self.sweep: Sweep | None = None
        self._stack = ExitStack()
        self._found: tuple[Tensor, Tensor, Plan] | None = None
        self.began: Tensor | None = None if file is None else file.latent

    @property
    def started(self) -> bool:
        """Whether the host came to sample this batch in img2img's own way."""
        return self._found is not None

    @property
    def found(self) -> tuple[Tensor, Tensor, Plan]:
        """The clean latents, img2img's own noise and the plan of a started batch."""
        if self._found is None:
            raise ValueError("a batch that was not started has found nothing")
        return self._found

    def start(self, batch: Batch) -> Tensor:
        """In place of the sampler's ``sample_img2img``: lets the model drive, then samples from there."""
        x = batch.x
        if x.ndim > 4 and x.shape[2] > 1:
            raise ValueError("videos are not supported, only pictures")
        if len(x) == 1:  # Neo's Qwen-Image encodes one latent for the whole batch
            x = x.expand(len(self.p.prompts), *x.shape[1:])
        same_shape(batch.noise, x, "img2img's noise")
        plan = self._plan()
        batch = replace(batch, x=x.detach().clone(), noise=batch.noise.detach().clone())
        if self.file is not None:
            batch = self._resumed(batch, self.file)
        self._found = (batch.x, batch.noise, plan)
        self._drive(batch, plan)
        if not self.settings.samples or stopped():
            return x
        if not plan.own_start:
            overrides = f"end at step {plan.start} overrides the denoising strength"
            comment(self.p, f"{overrides}: starts at step {plan.start} of {plan.total}")
        if "strength sweep" in self.wanted:
            self._sweep_below(batch, plan)
            if stopped():
                return x
        return self._sample_from(batch, plan)

    def _plan(self) -> Plan:
        """The levels of the host's schedule, or of the latents file, that this request asks for."""
        p, settings = self.p, self.settings
        total, end = refusals.asked_steps(p, settings, p.sampler)
        if self.file is not None:
            return saved.plan(self.file, total, end if settings.samples else None)
        walked = refusals.asked_levels(p, settings, p.sampler)
        if settings.end_at_sigma > 0 and not step_at(walked.schedule, settings.end_at_sigma)[1]:
            lowest = float(walked.schedule[walked.kept[-1]])
            comment(p, f"end_at_sigma: {settings.end_at_sigma:g} is below the lowest level; it ends at {lowest:.4g}")
        prediction = prediction_type(p.sd_model)
        return Plan(walked, prediction, total, own_start=(total, walked.kept[-1]) == img2img_steps(p))

    def _resumed(self, batch: Batch, file: Trajectory) -> Batch:
        """The batch with the latents file's source in place of its own."""
        source = file.source
        if source.shape[1:] != batch.x.shape[1:] or len(source) not in (1, len(batch.x)):
            shapes = f"{tuple(source.shape)}, not {tuple(batch.x.shape)}"
            raise ValueError(f"trajectory: {self.settings.trajectory!r} does not fit: its latents' shape is {shapes}")
        return replace(batch, x=source.to(batch.x).expand_as(batch.x).clone())

    def _drive(self, batch: Batch, plan: Plan) -> None:
        """What needs the model's calls before any frame or latent is there."""
        if self.settings.mode == "invert":
            self.inverted = driven.invert(batch, plan, self.settings)
            self._found = (self.inverted.source, batch.noise, plan)
            self._say_unconverged(self.inverted)
        elif self.settings.mode == "replay" and self.file is not None:
            self.recording = self.file.replay
        elif self.settings.mode == "replay" and self.wanted & {"init", "latents"}:
            self.recording = driven.record(batch, plan, HostDraws(self.p, batch.noise), self.settings)

    def _say_unconverged(self, inverted: Inverted) -> None:
        missed = unconverged(inverted.levels)
        if missed:
            more = f" and {len(missed) - 1} more levels" if len(missed) > 1 else ""
            comment(self.p, f"inversion: {missed[-1]}{more}; see tolerance and max_calls")

    def _say_missed(self, made: Tensor, source: Tensor, allowed: float, why: str) -> None:
        """Under the source's own prompts what is sampled is the source, unless the model is another one by then.

        Arguments:
            allowed: How far it may be off, as a share of the source's deviation.
            why: What may be the reason.
        """
        settings = self.settings
        if stopped() or settings.positive or settings.negative or settings.cfg != self.p.cfg_scale:
            return
        off = float((made.double() - source.double()).square().mean().sqrt() / source.double().std())
        if off > allowed:
            comment(self.p, f"{settings.mode}: misses the source by {off:.2g} of its deviation; {why}")

    def _why_missed(self, inverted: Inverted) -> str:
        if getattr(self.p, "nmask", None) is not None:
            return "inpainting samples the surroundings otherwise than they were inverted"
        if unconverged(inverted.levels):
            return "levels did not converge"
        return "something beside it changes the model from call to call"

    def _sweep_below(self, batch: Batch, plan: Plan) -> None:
        """Samples from every kept level below the noisiest first, each as img2img at that strength would."""
        self.sweep = Sweep(self.p, plan, self.settings)
        if self.p.iteration == 0:
            add_jobs(len(self.sweep.indices) * self.p.n_iter)
            mode = self.settings.mode if self.file is None else self.file.settings.get("mode")
            said = from_below(sampler_function(self.p.sampler)) if mode == "invert" else None
            if said is not None:
                comment(self.p, f"strength sweep: {said}")
        by_noise = self.settings.mode == "noise" and self.file is None
        own = by_noise and self.settings.noise == "shared" and not self.settings.normalize
        held = None if own else dict(self.walk())
        later = {index: self._later_draws(plan, index) for index in plan.levels.kept}
        self.sweep.sample(batch, None if held is None else held.__getitem__, later)

    def _sample_from(self, batch: Batch, plan: Plan) -> Tensor:
        """img2img's own sampling, from z at its start level, drawn towards the levels and filmed as wanted."""
        if self.map is not None and self.map.largest == 0:
            return batch.x  # no place ever begins
        if self.settings.film != "noising":
            place = temporary_file(".film")
            self._stack.callback(place.unlink, missing_ok=True)
            self.film = self._stack.enter_context(Film(place, plan.levels, plan.prediction, self.settings))
        listen = None if self.film is None else self.film.listen
        if self.recording is not None:
            made = driven.sample_replayed(batch, plan, self.recording, self.settings.skip, listen)
            if self.file is None:
                self._say_missed(made, batch.x, SAME, "something beside it changed the model after the recording")
            return made
        start, guide = self._start_state(plan), self._guide(plan)
        made, began = onward.sample(batch, plan, start, guide, listen)
        if start is not None and guide is None and self.inverted is not None and self.inverted.comes_back:
            self._say_missed(made, batch.x, VISIBLE, self._why_missed(self.inverted))
        if self.file is None:
            self.began = began  # z, and what img2img may add to it (img2img_extra_noise)
        return made if self.map is None else torch.where(self.map.strengths.to(made) > 0, made, batch.x.to(made))

    def _start_state(self, plan: Plan) -> Tensor | None:
        """Where sampling starts, if not where img2img's own does: guide alone leaves that as it is."""
        by_noise = self.settings.mode == "noise" and self.file is None
        if by_noise and self.settings.noise == "shared" and not self.settings.normalize and plan.own_start:
            return None
        if not self.wanted & {"init", "strength sweep"} and plan.own_start:
            return None
        pass_draws(self.p, self._later_draws(plan, plan.start))
        if self.file is not None:
            return self.file.latent.to(self.found[0]).expand_as(self.found[0])
        *_, (_, z) = self.walk()
        return z

    def _later_draws(self, plan: Plan, index: int) -> int:
        """How many draws made z of a level beside img2img's own, which the host has drawn already."""
        made_by = asdict(self.settings) if self.file is None else self.file.settings
        by_level = made_by.get("mode", "noise") != "invert" and made_by.get("noise") in ("independent", "path")
        return len(plan.levels.schedule) - 2 - index if by_level else 0

    def _guide(self, plan: Plan) -> Guide | None:
        """What draws the sampling towards the levels, if it is to be drawn."""
        if "guide" not in self.wanted:
            return None
        if self.map is None:
            schedule = plan.levels.schedule
            times = {i: guiding_timestep(self.p, schedule[i], plan.prediction) for i in plan.levels.visited}
            weights = onward.skip_residual(plan, times.__getitem__, self.settings)
        else:
            weights = onward.map_weights(onward.own_levels(self.map.strengths, plan.total, plan.start), plan)
        return Guide(weights, self._levels(plan)) if weights else None

    def _levels(self, plan: Plan) -> Callable[[int], Tensor]:
        """Z of any executed level, unthinned and unmasked, by schedule index."""
        x, noise, _ = self.found
        if self.inverted is not None:
            reached = {level.index: level.z for level in self.inverted.levels}
            return reached.__getitem__
        if self.file is not None:
            return every_level(self.file, plan.levels.kept, x)
        whole = normalize_noise(noise) if self.settings.normalize else noise
        return lambda index: add_noise(x.float(), whole, plan.levels.schedule[index].to(x.device), plan.prediction)

    def walk(self) -> Iterator[tuple[int, Tensor]]:
        """Every kept level, least noisy first, as (schedule index, z)."""
        x, noise, plan = self.found
        if self.file is not None:
            return saved.walk(self.file, plan, x)
        if self.inverted is not None:
            return self.inverted.kept(plan.levels)
        kind = "independent" if self.settings.mode == "replay" else self.settings.noise
        draws = Ahead(HostDraws(self.p, noise).made, len(plan.levels.visited) - 1, x.device)
        return walk(x, plan.levels, draws, kind, plan.prediction, self.settings.normalize)

    def close(self) -> None:
        """Forgets the film."""
        self._stack.close()
