"""What one batch shows for itself: its levels as frames, its sampling as a film, files and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..pictures import render
from ..pictures.progression import Frame, Scene, frames, stills
from ..pictures.roundtrip import measured
from ..settings import SAMPLING
from .batch import BatchRun
from .filing import Filing
from .host.codec import decodable, decode, encoded_picture, free_memory, overlaid
from .host.progress import Progress, quiet, stopped
from .host.request import RefusedError
from .reply import Reply

PICTURES = {"frames", "animation", "contact sheet"}
"""Outputs that need every level decoded."""


class Showing:
    """Decodes and files what a batch's run has made.

    A film ends with the host's own picture, which comes later: :meth:`complete` takes it.
    """

    def __init__(self, run: BatchRun, reply: Reply, saves: Callable[[], bool]) -> None:
        """Begins nothing yet.

        Arguments:
            run: The batch, started.
            reply: Where the results go.
            saves: Whether the host saves this batch's images, asked when it matters: an interrupt changes it.
        """
        self._run, self._reply, self._saves = run, reply, saves
        self._p, self._settings = run.p, run.settings
        self._x, _, self._plan = run.found
        self._shown = bool(run.wanted & PICTURES)
        self._film = run.film if self._shown else None
        self._stack = ExitStack()
        self._filing: Filing | None = None
        self._last: Tensor | None = None
        self._reached = -1
        self._sweep = run.sweep

    def make(self) -> None:
        """Files every level as it comes, then the film; all but a film is finished at once."""
        run = self._run
        try:
            if run.wanted - SAMPLING or self._settings.report:
                self._file_levels()
        except BaseException:
            self.close()
            raise
        if self._film is None:
            self._finish_levels([])

    def _file_levels(self) -> None:
        ended = self._film is not None and stopped()  # while it was sampled: what it has is shown, and no more
        noising = self._shown and not ended and (self._film is None or self._settings.film == "both")
        begins_clean = noising and self._settings.include_clean
        steps = self._film.indices if self._film is not None else []
        count = len(self._plan.levels.kept) if noising or self._film is None else 0
        progress = Progress(count + begins_clean + len(steps), own_job=self._settings.samples, writes=True)
        seen = 0

        def visit(index: int, z: Tensor, masked: Tensor) -> bool:
            nonlocal seen
            seen, self._last, self._reached = seen + 1, z, index
            filing.level(index, z)
            if noising or (index == self._plan.start and not self._settings.samples):
                return True
            progress.step(seen, None)
            return False

        schedule, chunk = self._plan.levels.schedule, decodable(self._p, self._x)
        sigmas = [0.0] * begins_clean + (self._plan.levels.sigmas.tolist() if noising or self._film is None else [])
        sigmas += [*schedule[steps].tolist(), 0.0] if self._film is not None else []
        filing = self._filing = self._stack.enter_context(self._begun(sigmas))
        walked = self._run.walk() if ended else self._until_stopped()
        made = frames(walked, self._scene(), begins_clean, self._decode, chunk, visit, free_memory)
        for frame in made:
            filing.frame(frame)
            progress.step(filing.count if noising else seen, frame.pictures[-1])
        if self._film is not None:
            states = self._film.levels()
            for frame in stills(states, len(self._x), schedule, self._decode, chunk, free_memory):
                filing.frame(frame, "sampling")
                progress.step(filing.count, frame.pictures[-1])
        self._progress = progress

    def complete(self, finals: Sequence[Image.Image]) -> None:
        """Finishes what ends with the host's own pictures: a film, and the strength sweep."""
        self._finish_levels(finals)
        sweep, self._sweep = self._sweep, None
        if sweep is not None:
            sweep.file(self._reply, self._saves(), finals, self._x.device)

    def _finish_levels(self, finals: Sequence[Image.Image]) -> None:
        filing, self._filing = self._filing, None
        if filing is None:
            return
        self._progress.writing()
        with self._stack:
            if self._film is not None and finals:
                filing.frame(Frame(None, 0.0, list(finals)), "result")
            if self._last is None or (self._film is not None and filing.count == 0):
                filing.abandon()  # interrupted before there was any noise
            else:
                mask = getattr(self._p, "nmask", None)
                filing.finish(self._saves(), self._x, mask, self._handoff(), self._run.recording)
                self._report(filing)
        self._progress.done()

    def _handoff(self) -> Tensor | None:
        """Where sampling began, if the noisiest level was reached and img2img made something else of it."""
        began = self._run.began
        if began is None or self._last is None or self._reached != self._plan.start:
            return None
        began = began.to(self._last).expand_as(self._last)
        return None if torch.equal(began, self._last) else began

    def close(self) -> None:
        """Forgets what is not finished."""
        self._filing = self._sweep = None
        self._stack.close()

    def _scene(self) -> Scene:
        run, plan = self._run, self._plan
        estimates = run.inverted.estimates if run.inverted is not None and self._settings.panel else {}
        mask = getattr(self._p, "nmask", None)
        blended = run.file is not None and run.file.blended
        mask = run.file.mask if run.file is not None and blended else mask
        return Scene(self._x, plan.levels.schedule, plan.prediction, self._settings.view, mask, estimates, blended)

    def _until_stopped(self) -> Iterator[tuple[int, Tensor]]:
        for index, z in self._run.walk():
            if stopped():
                return
            yield index, z

    def _report(self, filing: Filing) -> None:
        """Compares what was sampled back with the source, where that was asked for and reached."""
        inverted = self._run.inverted
        if inverted is None or inverted.back is None:
            return
        back = inverted.back.to(inverted.source)
        pictures = self._decode(torch.cat([inverted.source, back]))()
        for image, (one, other) in enumerate(zip(pictures[: len(back)], pictures[len(back) :])):
            latents = (inverted.back[image], inverted.source[image])
            encoded = encoded_picture(self._p, image)
            trip = measured(inverted.levels, image, latents, (other, one), encoded, self._settings.tolerance)
            filing.report(image, trip, self._saves())

    def _begun(self, sigmas: Sequence[float]) -> Filing:
        try:
            return Filing(self._p, self._settings, self._plan, self._reply, self._saves(), sigmas)
        except ValueError as error:
            raise RefusedError(f"Batch Unsampler: {error}") from None

    def _decode(self, latents: Tensor) -> Callable[[], list[Image.Image]]:
        """What makes the pictures of latents, a whole number of batches."""
        return partial(self._pictures, render.pixels(torch.stack(decode(self._p, latents))))

    def _pictures(self, decoded: Tensor | NDArray[np.uint8]) -> list[Image.Image]:
        """Decoded pictures, put back into their surroundings."""
        count = len(self._p.prompts)
        return [overlaid(self._p, made, number % count) for number, made in enumerate(render.to_pictures(decoded))]


class Waiting:
    """Batches that end with the host's own pictures, and those pictures as they come."""

    def __init__(self) -> None:
        self._showings: list[Showing] = []
        self.finals: list[Image.Image] = []

    def add(self, showing: Showing) -> None:
        """A batch that is being shown."""
        self._showings.append(showing)

    def complete(self) -> list[str]:
        """Finishes what waits, with the pictures that came; what went wrong is returned in words."""
        finals, self.finals = self.finals, []
        showings, self._showings = self._showings, []
        said = []
        for showing in showings:
            try:
                showing.complete(finals)
            except Exception as error:
                said.append(f"film or sweep: not whole: {type(error).__name__}: {error}")
            finally:
                quiet()
        return said

    def close(self) -> None:
        """Forgets what is not finished."""
        for showing in self._showings:
            showing.close()
