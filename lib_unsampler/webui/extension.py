"""One img2img request with Batch Unsampler ticked: what happens when, between host and core.

The host swallows exceptions in its hooks and goes on with a plain img2img. So errors are found
early and raised where nothing swallows them: bad requests from ``p.init``, before any work, and
what fails later from ``p.save_samples``.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..core.trajectory import Trajectory
from ..settings import (
    INFOTEXT_PREFIX,
    VERSION_KEY,
    Settings,
    SettingsError,
    parse_args,
    surface_fields,
    to_infotext,
)
from . import machines, refusals
from .batch import BatchRun, extra_jobs
from .driven import Batch
from .host.codec import Decoded
from .host.guiding import Samplings, reference
from .host.machines import jobs, missing, place
from .host.page import animation_folder, earlier_defaults, field_defaults, output_folder, preferences
from .host.progress import add_jobs, quiet
from .host.request import RefusedError, attribute, comment, is_inner, running, say_more, selected_script
from .host.saving import own_first, put_first, put_last, retell
from .host.schedule import has_sigmas, make_sampler
from .onward import mapped
from .reply import Reply
from .showing import Showing, Waiting

PATCHED = ("init", "sample", "save_samples", "close")
BATCH = ("prompts", "negative_prompts", "seeds", "subseeds", "batch_size", "iteration")
"""What of a request is a batch's own; what is finished later sees its own batch."""
HOST_FIELDS = {f.name for f in surface_fields("host")}


def attach(p: Any, args: Sequence[Any]) -> None:
    """Prepares a request from the script's arguments; never raises, since the host would swallow it.

    Another script's inner request is left alone: it wants img2img's own picture.
    """
    detach(p)
    if is_inner(p):
        return
    for key in [key for key in p.extra_generation_params if key.startswith(INFOTEXT_PREFIX)]:
        del p.extra_generation_params[key]  # X/Y/Z plot's cells share one dict: the cell before wrote into it
    try:
        enabled, settings = parse_args(machines.own(args), "host", field_defaults(), earlier_defaults())
        if enabled:
            Request(p, settings).attach()
    except SettingsError as error:
        _refuse(p, f"Batch Unsampler: {error}")
    except Exception as error:
        detach(p)
        _refuse(p, f"Batch Unsampler: {type(error).__name__}: {error}")


def take(p: Any, picture: Image.Image) -> None:
    """Is shown each picture that the host has finished."""
    request = vars(p).get("batch_unsampler")
    if request is not None:
        request.take(picture)


def finish(p: Any, processed: Any) -> None:
    """Hands the request's results over and takes everything off it again; off a copy, it does no more."""
    request = vars(p).get("batch_unsampler")
    try:
        if request is not None and request.p is p:
            request.hand_over(processed)
    except Exception as error:  # the host would swallow it, and show a plain img2img
        request.say_lost(processed, error)
    finally:
        detach(p)


def detach(p: Any) -> None:
    """Takes every attribute of an earlier request off ``p`` (the host reuses it in loops, and scripts copy it)."""
    request = vars(p).pop("batch_unsampler", None)
    for name in PATCHED:
        _unpatch(p, name)
    if request is not None:
        request.restore(p)


def _patch(p: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Hangs a function on ``p`` in the place of its method, which is returned.

    A copy of ``p`` that is processed goes without, and so does ``p`` once the request is over: a script that was
    loaded after us may hold the function for good. Nothing here keeps ``p`` alive: whatever becomes of the request,
    it ends with its last user.
    """
    held, before = weakref.ref(p), vars(p).get(name)  # another script's own patch, if there is one
    request = vars(p).get("batch_unsampler")

    def processed() -> Any:
        return next(iter(running()), held())

    def own(*args: Any, **kwargs: Any) -> Any:
        method = before or getattr(type(processed()), name).__get__(processed())
        return method(*args, **kwargs)

    def hung(*args: Any, **kwargs: Any) -> Any:
        mine = held() is not None and processed() is held() and vars(held()).get("batch_unsampler") is request
        return (function if mine else own)(*args, **kwargs)

    patched: Any = hung
    patched.batch_unsampler = True
    patched.before = before
    setattr(p, name, patched)
    return own


def _unpatch(p: Any, name: str) -> None:
    patched = vars(p).get(name)
    if not getattr(patched, "batch_unsampler", False):
        return
    if patched.before is None:
        delattr(p, name)
    else:
        setattr(p, name, patched.before)


def _refuse(p: Any, message: str) -> None:
    held = weakref.ref(p)

    def refuse(*_: Any, **__: Any) -> None:
        detach(held())
        raise RefusedError(message)

    _patch(p, "init", refuse)


def _always() -> bool:
    """What the reply leaves out is saved."""
    return True


class Request:
    """One request over all its batches: what is hung on ``p``, what the batches made, what is handed over."""

    def __init__(self, p: Any, settings: Settings) -> None:
        self._p = weakref.ref(p)
        self.settings = settings
        self.wanted = set(settings.output)
        self.error: Exception | None = None
        self.messages: list[str] = []
        self.inversions: list[list[dict[str, Any]]] = []
        self.script = selected_script(p)
        self.preferences = preferences()
        self.shared = bool(jobs(p))
        self.order = "own first" if self.shared and settings.reply == "all" else settings.reply
        self.alone = self.script is not None or self.order == "own only"
        self.reply = Reply(0 if self.alone else self.preferences.gallery_limit)
        self.batch: dict[str, Any] = {}
        self.own = 0
        self.saved: Trajectory | None = None
        self.reference: Any = None
        self.runs: list[BatchRun] = []
        self.waiting = Waiting()

    @property
    def p(self) -> Any:
        """The host's request, which holds this one."""
        return self._p()

    def attach(self) -> None:
        """Puts this request's wrappers on ``p``."""
        p = self.p
        p.batch_unsampler = self
        self._own_grid = p.do_not_save_grid
        p.do_not_save_grid = p.do_not_save_grid or not self.settings.samples
        self._own_rounding = getattr(p, "mask_round", None)
        if self.settings.maps:
            p.mask_round = False
        self._own = {name: _patch(p, name, getattr(self, f"on_{name}")) for name in PATCHED}
        p.extra_generation_params[VERSION_KEY] = __version__
        p.extra_generation_params.update(to_infotext(self.settings, "host"))

    def restore(self, p: Any) -> None:
        """Gives ``p``, or a copy of it, back what is no wrapper; what is not finished is forgotten with ``p``."""
        p.do_not_save_grid = self._own_grid
        if self._own_rounding is not None:
            p.mask_round = self._own_rounding
        if p is self.p:
            self.waiting.close()
            for run in self.runs:
                run.close()

    def on_init(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses what the sampler cannot do, then lets the host go on."""
        _unpatch(self.p, "init")
        try:
            self._check()
            made = self._own["init"](*args, **kwargs)
            self.reference = reference(self.p)
            return made
        except BaseException:
            detach(self.p)
            raise

    def _check(self) -> None:
        p, sampler = self.p, make_sampler(self.p)
        try:
            self.saved = refusals.check(p, self.settings, sampler)
        except ValueError as error:
            raise RefusedError(f"Batch Unsampler: {error}") from None
        for line in refusals.remarked(p, self.settings, sampler, self.script):
            comment(p, line)
        if not has_sigmas(sampler):
            p.extra_generation_params[INFOTEXT_PREFIX + "schedule"] = f"{p.sampler_name} timesteps"

    def on_sample(self, *args: Any, **kwargs: Any) -> Any:
        """The host's sampling of one batch, with ours in it; then the frames are made."""
        p = self.p
        sampling = p.sampler.sample_img2img
        self._complete()  # of a batch whose own pictures did not come
        self.batch = {name: copy(getattr(p, name)) for name in BATCH}
        self.own += len(p.prompts)
        try:
            with ExitStack() as guided:
                strengths = mapped(p, guided) if self.settings.maps else None
                run = BatchRun(p, self.settings, self.saved, strengths)
                self.runs.append(run)
                if p.iteration == 0:
                    add_jobs(extra_jobs(self.settings, self.saved is not None) * p.n_iter)

                def sample_img2img(*args: Any, **kwargs: Any) -> Tensor:
                    return self._start(run, Batch(sampling, *args, samplings=Samplings(p), **kwargs))

                with attribute(p.sampler, "sample_img2img", sample_img2img):
                    samples = self._own["sample"](*args, **kwargs)
                self._make(run)
        except BaseException as error:
            self._tell_files(error)
            detach(p)
            raise
        finally:
            quiet()
        if self.settings.samples and self.error is None:
            return samples
        shape = (3, p.height, p.width)
        return Decoded(torch.zeros(shape) for _ in p.prompts)

    def _start(self, run: BatchRun, batch: Batch) -> Tensor:
        """The host swallows nothing here, but must clean up after its sampling: what fails is raised later."""
        p, most = self.p, self.preferences.megapixels
        try:
            refusals.check_schedule(p, self.settings, p.sampler, most, self.saved)
            return run.start(batch)
        except ValueError as error:
            self._keep(RefusedError(f"Batch Unsampler: {error}"))
        except Exception as error:
            self._keep(error)
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
            saves = _always if self.order == "own only" else self._own["save_samples"]
            showing = Showing(run, self.reply, saves)
            self.waiting.add(showing)
            showing.make()
        except Exception as error:
            self._keep(error)

    def _keep(self, error: Exception) -> None:
        """Keeps what failed until it can be raised, with the files that are there: as words, the rest goes to the log.

        A traceback holds all that its calls held, this request among it.
        """
        if not isinstance(error, RefusedError):
            traceback.print_exception(type(error), error, error.__traceback__)
        self._tell_files(error)
        error.__traceback__ = error.__context__ = error.__cause__ = None
        self.error = error

    def _tell_files(self, error: BaseException | None) -> None:
        """Has an error that ends the request, ours or the host's, name the files that are there."""
        files = self.reply.told_files()
        if files and isinstance(error, Exception):
            say_more(error, f"saved before that: {files}")

    def take(self, picture: Image.Image) -> None:
        """One of the host's own finished pictures: a film ends with it. Other machines' come last."""
        if self.shared:
            place(self.p, self.own)
        if self.settings.film != "noising" or "strength sweep" in self.wanted:
            self.waiting.finals.append(picture.copy())
            if len(self.waiting.finals) == len(self.batch["prompts"]):
                self._complete()

    def _complete(self) -> None:
        """Finishes what waited for the host's own pictures. The host swallows errors here, so they are said."""
        with ExitStack() as shadowed:
            for name, value in self.batch.items():
                shadowed.enter_context(attribute(self.p, name, value))
            said = self.waiting.complete()
        files = self.reply.told_files()
        for line in said:
            comment(self.p, f"{line}; saved before that: {files}" if files else line)

    def on_save_samples(self, *args: Any, **kwargs: Any) -> bool:
        """Once per batch, after its sampling: raises what failed."""
        error, self.error = self.error, None
        if error is not None:
            detach(self.p)
            raise error
        return self._own["save_samples"](*args, **kwargs) and self.settings.samples

    def on_close(self) -> None:
        """The host is done with the request, finished or not: what waits for a picture that will not come is undone.

        A copy shares this wrapper; closed while a request is at work, it is none of that one's.
        """
        p = self.p
        if p is not None and not running():
            self._tell_files(sys.exc_info()[1])
            detach(p)
            p.close()

    def hand_over(self, processed: Any) -> None:
        """Animations, then sheets, the sigma curve, frames, then (with init) the host's own images.

        Where there would be nothing (latents alone), it is the noisiest frame. A selectable script (X/Y/Z
        plot, loopback, SD upscale, ...) counts on one picture for each image, so under it there are only those.
        Other machines' pictures are among the host's own, which then come first.
        """
        self._complete()
        for line in missing(self.p):
            comment(self.p, line)
        retell(self.p, processed)
        items = [] if self.alone else self.reply.every()
        stand_ins = [] if self.settings.samples else self.reply.stand_ins
        if self.order == "all":
            items = items or stand_ins
            notes = [item.note for item in items]
            put_first(processed, [i.shown for i in items], [i.text for i in items], keep_own=self.settings.samples)
        else:
            standing = {item.note["image"]: (item.shown.copy(), item.text) for item in stand_ins}
            notes = own_first(processed, standing, self.reply.naming) + [item.note for item in items]
            put_last(processed, [i.shown for i in items], [i.text for i in items])
        told = self.reply.told(notes, output_folder(), animation_folder())
        told["settings"] = {k: v for k, v in asdict(self.settings).items() if k in HOST_FIELDS}
        told |= {"messages": self.messages} if self.messages else {}
        told |= {"inversion": self.inversions} if self.inversions else {}
        _tell(processed, told)

    def say_lost(self, processed: Any, error: Exception) -> None:
        """Says what kept the results from being handed over, and which files there are, in their place."""
        self._keep(error)
        text = f"Batch Unsampler: the results are not whole: {type(error).__name__}: {self.error}"
        if not self.settings.samples:
            processed.images, processed.infotexts = [], []
        processed.comments = f"{getattr(processed, 'comments', '')}{text}\n"
        _tell(processed, {"messages": [*self.messages, text]})


def _tell(processed: Any, told: Mapping[str, Any]) -> None:
    """Puts plain values into the result's info."""
    ours = {INFOTEXT_PREFIX + key: value for key, value in told.items()}
    processed.extra_generation_params = {**processed.extra_generation_params, **ours}
