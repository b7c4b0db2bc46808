"""One img2img request with Batch Unsampler ticked: what happens when, between host and core.

The host swallows exceptions in its hooks and goes on with a plain img2img. So errors are found
early and raised where nothing swallows them: bad requests from ``p.init``, before any work, and
what fails later from ``p.save_samples``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..core.trajectory import Trajectory
from ..settings import (
    INFOTEXT_PREFIX,
    VERSION_KEY,
    Settings,
    SettingsError,
    parse_args,
    remarks,
    surface_fields,
    to_infotext,
)
from ..settings.effects import clamped
from . import refusals, shelf
from .batch import BatchRun
from .driven import Batch
from .host.codec import Decoded
from .host.page import field_defaults, output_folder, preferences
from .host.progress import add_jobs
from .host.request import RefusedError, attribute, comment, selected_script
from .host.saving import put_first
from .host.schedule import has_sigmas, make_sampler
from .reply import Reply

PATCHED = ("init", "sample", "save_samples")
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
    """One request over all its batches: what is hung on ``p``, what the batches made, what is handed over."""

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
        """Gives ``p`` back what is no wrapper."""
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
        for line in self._without_effect():
            comment(self.p, line)
        if not has_sigmas(sampler):
            comment(self.p, f"{name} has no sigma schedule: its timesteps' noise levels are shown")
            self.p.extra_generation_params[INFOTEXT_PREFIX + "schedule"] = f"{name} timesteps"
        if self.script is not None and self.wanted - {"init", "latents"}:
            comment(self.p, f"{self.script} gets one picture for each image; the others are only saved to disk")
        return self._init(*args, **kwargs)

    def _without_effect(self) -> list[str]:
        """What was asked for and changes nothing, or less than it says."""
        defaults = field_defaults()
        values = {f.name: (getattr(self.settings, f.name), f.default) for f in surface_fields("host")}
        given = {name for name, (value, own) in values.items() if value not in (own, defaults.get(name, own))}
        steps = refusals.asked_steps(self.p, self.settings)[0]
        beyond = [] if self.settings.trajectory else clamped(self.settings, steps)
        return [*remarks(self.settings, given, self.settings.output), *beyond]

    def on_sample(self, *args: Any, **kwargs: Any) -> Any:
        """The host's sampling of one batch, with ours in it; then the frames are made."""
        p = self.p
        own = p.sampler.sample_img2img
        run = BatchRun(p, self.settings, self.saved, self.reply, self._save_samples)
        if p.iteration == 0:
            jobs = (self.settings.mode != "noise") + (self.settings.samples and bool(self.wanted - {"init"}))
            add_jobs(jobs * p.n_iter)

        def sample_img2img(*args: Any, **kwargs: Any) -> Tensor:
            return self._start(run, Batch(own, *args, **kwargs))

        try:
            with attribute(p.sampler, "sample_img2img", sample_img2img):
                samples = self._sample(*args, **kwargs)
        except BaseException:
            detach(p)
            raise
        self._make(run)
        if self.settings.samples and self.error is None:
            return samples
        shape = (3, p.height, p.width)
        return Decoded(torch.zeros(shape) for _ in p.prompts)

    def _start(self, run: BatchRun, batch: Batch) -> Tensor:
        """The host swallows nothing here, but must clean up after its sampling: what fails is raised later."""
        try:
            return run.start(batch)
        except ValueError as error:
            self.error = RefusedError(f"Batch Unsampler: {error}")
        except Exception as error:
            self.error = error
        return batch.x

    def _make(self, run: BatchRun) -> None:
        if self.error is not None:
            return
        try:
            if not run.started:
                raise RefusedError(
                    f"Batch Unsampler: {self.script or 'another extension'} samples in its own way, "
                    "past img2img's; untick one of the two"
                )
            if run.inverted is not None:
                self.inversions.append(run.inverted.told())
            run.make()
        except Exception as error:
            self.error = error

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
