"""One img2img request with Batch Unsampler ticked: what happens when, between host and core.

The host swallows exceptions in its hooks and goes on with a plain img2img. So errors are found
early and raised where nothing swallows them: bad requests from ``p.init``, before any work, and
what fails later from ``p.save_samples``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..core.inversion import Level, unconverged
from ..core.noising import blend, walk
from ..core.replay import Recording
from ..core.schedule import levels
from ..core.trajectory import Trajectory
from ..pictures import render
from ..pictures.roundtrip import measured
from ..settings import (
    INFOTEXT_PREFIX,
    VERSION_KEY,
    Settings,
    SettingsError,
    parse_args,
    surface_fields,
    to_infotext,
)
from . import driven, refusals, saved, shelf
from .driven import Batch, Plan
from .filing import Filing, Reply
from .host.codec import Decoded, decodable, decode, encoded_picture, free_memory, overlaid
from .host.draws import HostDraws
from .host.guiding import starting_from
from .host.page import field_defaults, output_folder, preferences
from .host.progress import Progress, add_jobs, next_job, stopped
from .host.request import RefusedError, attribute, comment, selected_script
from .host.saving import put_first
from .host.schedule import get_sigmas, has_sigmas, img2img_steps, make_sampler, prediction_type

PATCHED = ("init", "sample", "save_samples")
PICTURES = {"frames", "animation", "contact sheet"}
"""Outputs that need every level decoded."""

HOST_FIELDS = {f.name for f in surface_fields("host")}


def attach(p: Any, args: Sequence[Any]) -> None:
    """Prepares a request from the script's arguments; never raises, since the host would swallow it."""
    detach(p)
    for key in [key for key in p.extra_generation_params if key.startswith(INFOTEXT_PREFIX)]:
        del p.extra_generation_params[key]  # X/Y/Z plot's cells share one dict: the cell before wrote into it
    try:
        enabled, settings = parse_args(args, "host", field_defaults())
        if enabled:
            Request(p, settings).attach()
    except SettingsError as error:
        _refuse(p, f"Batch Unsampler: {error}")
    except Exception as error:
        _refuse(p, f"Batch Unsampler: {type(error).__name__}: {error}")


def finish(p: Any, processed: Any) -> None:
    """Hands the request's results over and takes everything off it again."""
    request = vars(p).get("batch_unsampler")
    detach(p)
    if request is not None:
        request.hand_over(processed)


def detach(p: Any) -> None:
    """Takes every attribute of an earlier request off ``p`` (the host reuses it in loops)."""
    request = vars(p).pop("batch_unsampler", None)
    for name in PATCHED:
        _unpatch(p, name)
    if request is not None:
        request.restore()


def _patch(p: Any, name: str, function: Callable[..., Any]) -> None:
    def patched(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    patched.batch_unsampler = True
    patched.before = vars(p).get(name)  # another script's own patch, if there is one
    setattr(p, name, patched)


def _unpatch(p: Any, name: str) -> None:
    patched = vars(p).get(name)
    if not getattr(patched, "batch_unsampler", False):
        return
    if patched.before is None:
        delattr(p, name)
    else:
        setattr(p, name, patched.before)


def _refuse(p: Any, message: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        detach(p)
        raise RefusedError(message)

    _patch(p, "init", refuse)


class Request:
    """The run of one request over all its batches."""

    def __init__(self, p: Any, settings: Settings) -> None:
        self.p = p
        self.settings = settings
        self.wanted = set(settings.output)
        self.error: Exception | None = None
        self.messages: list[str] = []
        self.inversions: list[list[dict[str, Any]]] = []
        self.script = selected_script(p)
        self.preferences = preferences()
        self.reply = Reply(self.preferences.gallery_limit if self.script is None else 0)
        self.saved: Trajectory | None = None

    def attach(self) -> None:
        """Puts this request's three wrappers on ``p``."""
        p = self.p
        p.batch_unsampler = self
        self._init, self._sample, self._save_samples = p.init, p.sample, p.save_samples
        self._own_grid = p.do_not_save_grid
        p.do_not_save_grid = p.do_not_save_grid or not self.settings.samples
        for name in PATCHED:
            _patch(p, name, getattr(self, f"on_{name}"))
        p.extra_generation_params[VERSION_KEY] = __version__
        p.extra_generation_params.update(to_infotext(self.settings, "host"))

    def restore(self) -> None:
        """Gives the request its own grid setting back."""
        self.p.do_not_save_grid = self._own_grid

    def on_init(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses what the sampler cannot do, then lets the host go on."""
        _unpatch(self.p, "init")
        name = self.p.sampler_name
        sampler = make_sampler(self.p)
        try:
            self.saved = refusals.check(self.p, self.settings, sampler, self.preferences.megapixels)
        except ValueError as error:
            detach(self.p)
            raise RefusedError(f"Batch Unsampler: {error}") from None
        if not has_sigmas(sampler):
            comment(self.p, f"{name} has no sigma schedule: its timesteps' noise levels are shown")
            self.p.extra_generation_params[INFOTEXT_PREFIX + "schedule"] = f"{name} timesteps"
        if self.script is not None and self.wanted - {"init", "latents"}:
            comment(self.p, f"{self.script} gets one picture for each image; the others are only saved to disk")
        return self._init(*args, **kwargs)

    def on_sample(self, *args: Any, **kwargs: Any) -> Any:
        """The host's sampling of one batch, with ours in it; then the frames are made."""
        p = self.p
        self._batch: tuple[Tensor, Tensor, Plan] | None = None
        self._inverted: driven.Inverted | None = None
        self._recording: Recording | None = None
        own = p.sampler.sample_img2img
        if p.iteration == 0:
            jobs = (self.settings.mode != "noise") + (self.settings.samples and bool(self.wanted - {"init"}))
            add_jobs(jobs * p.n_iter)

        def sample_img2img(*args: Any, **kwargs: Any) -> Tensor:
            return self._start(Batch(own, *args, **kwargs))

        try:
            with attribute(p.sampler, "sample_img2img", sample_img2img):
                samples = self._sample(*args, **kwargs)
        except BaseException:
            detach(p)
            raise
        try:
            if self._batch is None and self.error is None:
                raise RefusedError(
                    f"Batch Unsampler: {self.script or 'another extension'} samples in its own way, "
                    "past img2img's; untick one of the two"
                )
            if self.error is None:
                self._make(*self._batch)
        except Exception as error:
            self.error = error
        if self.settings.samples and self.error is None:
            return samples
        shape = (3, p.height, p.width)
        return Decoded(torch.zeros(shape) for _ in p.prompts)

    def plan(self) -> Plan:
        """The levels of the host's schedule, or of the latents file, that this request asks for."""
        p, settings = self.p, self.settings
        total, end = refusals.asked_steps(p, settings)
        if self.saved is not None:
            return saved.plan(self.saved, total, end if settings.samples else None)
        walked = levels(get_sigmas(p, p.sampler, total), end, settings.step_increment)
        prediction = prediction_type(p.sd_model)
        return Plan(walked, prediction, total, own_start=(total, walked.kept[-1]) == img2img_steps(p))

    def _start(self, batch: Batch) -> Tensor:
        """In place of the sampler's ``sample_img2img``: lets the model drive, then samples from there."""
        x = batch.x
        try:
            if x.ndim > 4 and x.shape[2] > 1:
                raise ValueError("videos are not supported, only pictures")
            plan = self.plan()
            batch = replace(batch, x=x.detach().clone(), noise=batch.noise.detach().clone())
            if self.saved is not None:
                batch = self._resumed(batch)
            self._batch = (batch.x, batch.noise, plan)
            self._drive(batch, plan)
            if self._inverted is not None or self._recording is not None:
                next_job()
            if not self.settings.samples or stopped():
                return x
            if not plan.own_start:
                overrides = f"end at step {plan.start} overrides the denoising strength"
                comment(self.p, f"{overrides}: starts at step {plan.start} of {plan.total}")
            return self._sample_from(batch, plan)
        except ValueError as error:
            self.error = RefusedError(f"Batch Unsampler: {error}")
        except Exception as error:
            self.error = error
        return x

    def _resumed(self, batch: Batch) -> Batch:
        """The batch with the latents file's source in place of its own."""
        if self.saved.source.shape[1:] != batch.x.shape[1:] or len(self.saved.source) not in (1, len(batch.x)):
            shapes = f"{tuple(self.saved.source.shape)}, not {tuple(batch.x.shape)}"
            raise ValueError(f"trajectory: {self.settings.trajectory!r} does not fit: its latents' shape is {shapes}")
        return replace(batch, x=self.saved.source.to(batch.x).expand_as(batch.x).clone())

    def _drive(self, batch: Batch, plan: Plan) -> None:
        """What needs the model's calls before any frame or latent is there."""
        if self.settings.mode == "invert":
            self._inverted = driven.invert(batch, plan, self.settings)
            self._batch = (self._inverted.source, batch.noise, plan)
            self.inversions.append(self._inverted.told())
            self._say_unconverged(self._inverted.levels)
        elif self.settings.mode == "replay" and self.saved is not None:
            self._recording = self.saved.replay
        elif self.settings.mode == "replay" and self.wanted & {"init", "latents"}:
            self._recording = driven.record(batch, plan, HostDraws(self.p, batch.noise), self.settings)

    def _say_unconverged(self, walked: Sequence[Level]) -> None:
        missed = unconverged(list(walked))
        if missed:
            more = f" and {len(missed) - 1} more levels" if len(missed) > 1 else ""
            comment(self.p, f"inversion: {missed[-1]}{more}; see tolerance and max_calls")

    def _sample_from(self, batch: Batch, plan: Plan) -> Tensor:
        """img2img's own sampling, from z at its start level."""
        if self._recording is not None:
            return driven.sample_replayed(batch, plan, self._recording, self.settings.skip)
        by_noise = self.settings.mode == "noise" and self.saved is None
        if by_noise and self.settings.noise == "shared" and not self.settings.normalize and plan.own_start:
            return batch.sample(plan)
        *_, (_, z) = self._walk()
        with starting_from(self.p.sampler, z):
            return batch.sample(plan)

    def _walk(self) -> Iterator[tuple[int, Tensor]]:
        """Every kept level, least noisy first, as (schedule index, z)."""
        x, noise, plan = self._batch
        if self.saved is not None:
            return saved.walk(self.saved, plan, x)
        if self._inverted is not None:
            return self._inverted.kept(plan)
        kind = "independent" if self.settings.mode == "replay" else self.settings.noise
        draws = HostDraws(self.p, noise)
        return walk(x, plan.levels, draws, kind, plan.prediction, self.settings.normalize)

    def _make(self, x: Tensor, noise: Tensor, plan: Plan) -> None:
        """Walks one batch; its levels are decoded in chunks and filed as they come."""
        shown = bool(self.wanted & PICTURES)
        if not self.wanted - {"init"} and not self.settings.report:
            return
        begins_clean = shown and self.settings.include_clean
        progress = Progress(len(plan.levels.kept) + begins_clean, own_job=self.settings.samples, writes=True)
        mask, last = getattr(self.p, "nmask", None), None
        seen = self._inverted.estimates if self._inverted is not None and self.settings.panel else None

        def levels() -> Iterator[tuple[int | None, Tensor]]:
            """Schedule index (None: the source) and what to decode."""
            nonlocal last
            if begins_clean:
                yield None, x if seen is None else torch.cat([x, x, x])
            for number, (index, z) in enumerate(self._walk(), 1):
                if stopped():
                    return
                last, sigma, masked = z, plan.levels.schedule[index], blend(z, x, mask)
                filing.level(index, masked)
                if shown or (index == plan.start and not self.settings.samples):
                    view = render.viewed(masked, x, mask, sigma, plan.prediction, self.settings.view)
                    yield index, view if seen is None else torch.cat([x, view, seen[index].to(x)])
                else:
                    progress.step(number, None)

        with self._filing(plan) as filing:
            decoded = render.in_chunks(levels(), self._decode, decodable(x), free_memory)
            for number, ((index, _), pictures) in enumerate(decoded, 1):
                filing.pictures(index, pictures)
                progress.step(number, pictures[-1])
            progress.writing()
            if last is None:
                filing.abandon()  # interrupted before there was any noise
            else:
                filing.finish(self._save_samples(), x, mask, last, self._recording)
                self._report(filing, plan)
        progress.done()

    def _report(self, filing: Filing, plan: Plan) -> None:
        """Compares what was sampled back with the source, where that was asked for and reached."""
        inverted = self._inverted
        if inverted is None or inverted.back is None:
            return
        pictures = self._decode([(None, inverted.source), (None, inverted.back.to(inverted.source))])
        for image, (source, back) in enumerate(zip(*pictures)):
            latents = (inverted.back[image], inverted.source[image])
            encoded = encoded_picture(self.p, image)
            trip = measured(inverted.levels, image, latents, (back, source), encoded, self.settings.tolerance)
            filing.report(image, trip, self._save_samples())

    def _filing(self, plan: Plan) -> Filing:
        try:
            return Filing(self.p, self.settings, plan, self.reply, self._save_samples())
        except ValueError as error:
            raise RefusedError(f"Batch Unsampler: {error}") from None

    def _decode(self, levels: list[tuple[int | None, Tensor]]) -> list[list[Image.Image]]:
        """The pictures of each level, one for each image, put back into their surroundings."""
        latents = torch.cat([view for _, view in levels])
        pictures = render.to_pictures(torch.stack(decode(self.p, latents)))
        count = len(self.p.prompts)
        every = [overlaid(self.p, picture, number % count) for number, picture in enumerate(pictures)]
        size = len(every) // len(levels)  # more than count where each image has a panel
        panels = [every[start : start + size] for start in range(0, len(every), size)]
        return [[render.beside(panel[image::count]) for image in range(count)] for panel in panels]

    def on_save_samples(self, *args: Any, **kwargs: Any) -> bool:
        """Once per batch, after its sampling: raises what failed."""
        if self.error is not None:
            error = self.error
            detach(self.p)
            raise error
        return self._save_samples(*args, **kwargs) and self.settings.samples

    def hand_over(self, processed: Any) -> None:
        """Animations, then sheets, the sigma curve, frames, then (with init) the host's own images.

        Where there would be nothing (latents alone), it is the noisiest frame. A selectable script (X/Y/Z
        plot, loopback, SD upscale, ...) counts on one picture for each image, so under it there are only those.
        """
        items = self.reply.every()
        if self.script is not None or not items:
            items = [] if self.settings.samples else self.reply.stand_ins
        put_first(processed, [i.shown for i in items], [i.text for i in items], keep_own=self.settings.samples)
        settings = {k: v for k, v in asdict(self.settings).items() if k in HOST_FIELDS}
        folder = output_folder()
        processed.extra_generation_params = {
            **processed.extra_generation_params,
            INFOTEXT_PREFIX + "settings": settings,
            INFOTEXT_PREFIX + "sigmas": self.reply.sigmas,
            INFOTEXT_PREFIX + "images": [item.note for item in items],
            INFOTEXT_PREFIX + "latents": self.reply.latents,
            INFOTEXT_PREFIX + "latents names": [shelf.name_of(folder, Path(file)) for file in self.reply.latents],
            **({INFOTEXT_PREFIX + "messages": self.messages} if self.messages else {}),
            **({INFOTEXT_PREFIX + "inversion": self.inversions} if self.inversions else {}),
        }
