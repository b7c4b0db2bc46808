"""One batch of a request: its levels are made where the host would sample, then shown, and sampled on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.inversion import unconverged
from ..core.noising import walk
from ..core.replay import Recording
from ..core.trajectory import Trajectory
from ..pictures import render
from ..pictures.progression import Scene, frames
from ..pictures.roundtrip import measured
from ..settings import Settings
from . import driven, refusals, saved
from .driven import Batch, Inverted, Plan
from .filing import Filing
from .host.codec import decodable, decode, encoded_picture, free_memory, overlaid
from .host.draws import HostDraws
from .host.guiding import noting_start, starting_from
from .host.progress import Progress, stopped
from .host.request import RefusedError, comment
from .host.schedule import img2img_steps, prediction_type
from .reply import Reply

PICTURES = {"frames", "animation", "contact sheet"}
"""Outputs that need every level decoded."""


def extra_jobs(settings: Settings, resumed: bool) -> int:
    """Jobs of one batch for the host's progress bar, beyond its own one; ``resumed`` is from a latents file."""
    makes = bool(set(settings.output) - {"init"}) or settings.report
    return driven.jobs(settings, resumed) + (settings.samples and makes)


class BatchRun:
    """The run of one batch: :meth:`start` where the host samples, then :meth:`make`."""

    def __init__(
        self, p: Any, settings: Settings, file: Trajectory | None, reply: Reply, saves: Callable[[], bool]
    ) -> None:
        """Begins nothing yet.

        Arguments:
            p: The host's request, at one of its batches.
            settings: What is wanted.
            file: The latents file whose levels are taken, if one is.
            reply: Where the results go.
            saves: Whether the host saves this batch's images, asked when it matters: an interrupt changes it.
        """
        self.p, self.settings, self.file, self.reply, self.saves = p, settings, file, reply, saves
        self.wanted = set(settings.output)
        self.inverted: Inverted | None = None
        self._recording: Recording | None = None
        self._found: tuple[Tensor, Tensor, Plan] | None = None
        self._began: Tensor | None = None if file is None else file.latent

    @property
    def started(self) -> bool:
        """Whether the host came to sample this batch in img2img's own way."""
        return self._found is not None

    def start(self, batch: Batch) -> Tensor:
        """In place of the sampler's ``sample_img2img``: lets the model drive, then samples from there."""
        x = batch.x
        if x.ndim > 4 and x.shape[2] > 1:
            raise ValueError("videos are not supported, only pictures")
        plan = self._plan()
        batch = replace(batch, x=x.detach().clone(), noise=batch.noise.detach().clone())
        if self.file is not None:
            batch = self._resumed(batch)
        self._found = (batch.x, batch.noise, plan)
        self._drive(batch, plan)
        if not self.settings.samples or stopped():
            return x
        if not plan.own_start:
            overrides = f"end at step {plan.start} overrides the denoising strength"
            comment(self.p, f"{overrides}: starts at step {plan.start} of {plan.total}")
        return self._sample_from(batch, plan)

    def _plan(self) -> Plan:
        """The levels of the host's schedule, or of the latents file, that this request asks for."""
        p, settings = self.p, self.settings
        total, end = refusals.asked_steps(p, settings)
        if self.file is not None:
            return saved.plan(self.file, total, end if settings.samples else None)
        walked = refusals.asked_levels(p, settings, p.sampler)
        prediction = prediction_type(p.sd_model)
        return Plan(walked, prediction, total, own_start=(total, walked.kept[-1]) == img2img_steps(p))

    def _resumed(self, batch: Batch) -> Batch:
        """The batch with the latents file's source in place of its own."""
        source = self.file.source
        if source.shape[1:] != batch.x.shape[1:] or len(source) not in (1, len(batch.x)):
            shapes = f"{tuple(source.shape)}, not {tuple(batch.x.shape)}"
            raise ValueError(f"trajectory: {self.settings.trajectory!r} does not fit: its latents' shape is {shapes}")
        return replace(batch, x=source.to(batch.x).expand_as(batch.x).clone())

    def _drive(self, batch: Batch, plan: Plan) -> None:
        """What needs the model's calls before any frame or latent is there."""
        if self.settings.mode == "invert":
            self.inverted = driven.invert(batch, plan, self.settings)
            self._found = (self.inverted.source, batch.noise, plan)
            self._say_unconverged()
        elif self.settings.mode == "replay" and self.file is not None:
            self._recording = self.file.replay
        elif self.settings.mode == "replay" and self.wanted & {"init", "latents"}:
            self._recording = driven.record(batch, plan, HostDraws(self.p, batch.noise), self.settings)

    def _say_unconverged(self) -> None:
        missed = unconverged(self.inverted.levels)
        if missed:
            more = f" and {len(missed) - 1} more levels" if len(missed) > 1 else ""
            comment(self.p, f"inversion: {missed[-1]}{more}; see tolerance and max_calls")

    def _sample_from(self, batch: Batch, plan: Plan) -> Tensor:
        """img2img's own sampling, from z at its start level."""
        if self._recording is not None:
            return driven.sample_replayed(batch, plan, self._recording, self.settings.skip)
        by_noise = self.settings.mode == "noise" and self.file is None
        if by_noise and self.settings.noise == "shared" and not self.settings.normalize and plan.own_start:
            with noting_start(self.p.sampler) as began:
                made = batch.sample(plan)
            self._began = began[0] if began else None  # z, and what img2img may add to it (img2img_extra_noise)
            return made
        z = None if self.file is None else self.file.latent.to(batch.x).expand_as(batch.x)
        if z is None:
            *_, (_, z) = self._walk()
        with starting_from(self.p.sampler, z):
            return batch.sample(plan)

    def _walk(self) -> Iterator[tuple[int, Tensor]]:
        """Every kept level, least noisy first, as (schedule index, z)."""
        x, noise, plan = self._found
        if self.file is not None:
            return saved.walk(self.file, plan, x)
        if self.inverted is not None:
            return self.inverted.kept(plan.levels)
        kind = "independent" if self.settings.mode == "replay" else self.settings.noise
        draws = HostDraws(self.p, noise)
        return walk(x, plan.levels, draws, kind, plan.prediction, self.settings.normalize)

    def make(self) -> None:
        """Walks the batch; its levels are decoded in chunks and filed as they come."""
        x, _, plan = self._found
        shown = bool(self.wanted & PICTURES)
        if not self.wanted - {"init"} and not self.settings.report:
            return
        begins_clean = shown and self.settings.include_clean
        progress = Progress(len(plan.levels.kept) + begins_clean, own_job=self.settings.samples, writes=True)
        seen, last, reached = 0, None, -1

        def visit(index: int, z: Tensor, masked: Tensor) -> bool:
            nonlocal seen, last, reached
            seen, last, reached = seen + 1, z, index
            filing.level(index, masked)
            if shown or (index == plan.start and not self.settings.samples):
                return True
            progress.step(seen, None)
            return False

        scene = self._scene(x, plan)
        with self._filing(plan) as filing:
            chunk = decodable(x)
            made = frames(self._until_stopped(), scene, begins_clean, self._decode, chunk, visit, free_memory)
            for number, frame in enumerate(made, 1):
                filing.frame(frame)
                progress.step(number if shown else seen, frame.pictures[-1])
            progress.writing()
            if last is None:
                filing.abandon()  # interrupted before there was any noise
            else:
                mask, began = scene.mask, self._handoff(last) if reached == plan.start else last
                if mask is None and not torch.equal(began, last):
                    mask = last.new_ones([1] * last.ndim)  # a file has its hand-off beside a mask
                filing.finish(self.saves(), x, mask, began, self._recording)
                self._report(filing)
        progress.done()

    def _handoff(self, last: Tensor) -> Tensor:
        """Where sampling goes on: the noisiest level, unmasked, or what img2img made of it."""
        return last if self._began is None else self._began.to(last).expand_as(last)

    def _scene(self, x: Tensor, plan: Plan) -> Scene:
        estimates = self.inverted.estimates if self.inverted is not None and self.settings.panel else {}
        mask, view = getattr(self.p, "nmask", None), self.settings.view
        return Scene(x, plan.levels.schedule, plan.prediction, view, mask, estimates)

    def _until_stopped(self) -> Iterator[tuple[int, Tensor]]:
        for index, z in self._walk():
            if stopped():
                return
            yield index, z

    def _report(self, filing: Filing) -> None:
        """Compares what was sampled back with the source, where that was asked for and reached."""
        inverted = self.inverted
        if inverted is None or inverted.back is None:
            return
        back = inverted.back.to(inverted.source)
        pictures = self._decode(torch.cat([inverted.source, back]))
        for image, (one, other) in enumerate(zip(pictures[: len(back)], pictures[len(back) :])):
            latents = (inverted.back[image], inverted.source[image])
            encoded = encoded_picture(self.p, image)
            trip = measured(inverted.levels, image, latents, (other, one), encoded, self.settings.tolerance)
            filing.report(image, trip, self.saves())

    def _filing(self, plan: Plan) -> Filing:
        try:
            return Filing(self.p, self.settings, plan, self.reply, self.saves())
        except ValueError as error:
            raise RefusedError(f"Batch Unsampler: {error}") from None

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """The pictures of latents, a whole number of batches, put back into their surroundings."""
        pictures = render.to_pictures(torch.stack(decode(self.p, latents)))
        count = len(self.p.prompts)
        return [overlaid(self.p, picture, number % count) for number, picture in enumerate(pictures)]
