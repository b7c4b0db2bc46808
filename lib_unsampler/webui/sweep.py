"""The strength sweep: a picture from every kept level, as img2img makes it at the strength that starts there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..pictures.background import Background
from ..pictures.reel import Reel
from ..settings import Settings
from .driven import Batch, Plan
from .filing import ENDINGS
from .host.codec import finished
from .host.draws import pass_draws, repeatable_draws
from .host.guiding import starting_from
from .host.progress import Progress, next_job, stopped
from .host.request import comment
from .host.saving import temporary_file
from .host.schedule import strength_of
from .naming import Naming
from .reply import Reply


class Sweep:
    """One batch's pictures from the kept levels below the noisiest, least noisy first; the noisiest is the host's."""

    def __init__(self, p: Any, plan: Plan, settings: Settings) -> None:
        self._p, self._plan, self._settings = p, plan, settings
        self._made: list[tuple[int, Tensor]] = []

    @property
    def indices(self) -> tuple[int, ...]:
        """The schedule indices that are sampled here, least noisy first."""
        return self._plan.levels.kept[:-1]

    def sample(self, batch: Batch, level: Callable[[int], Tensor] | None, later: Mapping[int, int]) -> None:
        """Samples from each level with the request's own noise stream; an interrupt keeps what is done.

        Arguments:
            level: z of a schedule index; None where the host's own start state is z.
            later: How many draws made z beside the first, by schedule index: the sampling draws behind them.
        """
        for index in self.indices:
            samples = self._sampled(batch, level, index, later[index])
            if stopped():
                return
            if samples is not None:
                self._made.append((index, samples.cpu()))
            next_job()

    def _sampled(self, batch: Batch, level: Callable[[int], Tensor] | None, index: int, later: int) -> Tensor | None:
        """The samples from one level; None where only one step is left and k-diffusion's function fails at that."""
        try:
            with repeatable_draws(self._p, batch.noise), self._started(level, index):
                pass_draws(self._p, later)
                return batch.sample_at(self._plan.total, index)
        except UnboundLocalError:
            if index != self._plan.levels.visited[0]:
                raise
            comment(
                self._p, f"strength sweep: {self._p.sampler_name} cannot sample the last step alone; it is left out"
            )
            return None

    def _started(self, level: Callable[[int], Tensor] | None, index: int) -> Any:
        if level is None:
            return nullcontext()
        return starting_from(self._p.sampler, level(index))

    def file(self, reply: Reply, save: bool, finals: Sequence[Image.Image], device: Any) -> None:
        """Decodes and files the pictures, and an animation that ends with the request's own pictures.

        Arguments:
            reply: Where the results go.
            save: Whether the host saves this batch's images.
            finals: The request's own pictures, finished; none where they did not come.
            device: Where latents are decoded.
        """
        schedule, start = self._plan.levels.schedule, self._plan.start
        sigmas = [float(schedule[index]) for index, _ in self._made] + [float(schedule[start])] * bool(finals)
        if not sigmas:
            return
        progress = Progress(len(sigmas), own_job=False, writes=True)
        with ExitStack() as stack:
            encoders = stack.enter_context(Background())
            naming = Naming(self._p, reply, stack.enter_context(Background(1)).submit)
            files = [self._temporary(stack) for _ in naming.texts]
            begun = (Reel(self._settings, sigmas, t, encoders, f, sheet=False) for t, f in zip(naming.texts, files))
            reels = [stack.enter_context(reel) for reel in begun]
            for number, (index, samples) in enumerate(self._made, 1):
                pictures = finished(self._p, samples.to(device))
                for image, (reel, picture) in enumerate(zip(reels, pictures)):
                    self._take(reel, picture, index)
                    naming.swept(picture, image, self._entry(index), f"-from-z{number:03d}", save)
                progress.step(number, pictures[-1])
            for reel, picture in zip(reels, finals):
                self._take(reel, picture, start)
            last = list(finals) or pictures
            for image, (reel, file) in enumerate(zip(reels, files)):
                reel.finish()
                about = (last[image], image, self._settings.format, save)
                naming.animation(file, *about, "sweep animation", reel.fit)
        progress.done()

    def _take(self, reel: Reel, picture: Image.Image, index: int) -> None:
        strength = self._entry(index)["strength"]
        reel.add(picture.convert("RGB"), index, None, f"strength {strength:g}")

    def _entry(self, index: int) -> dict[str, Any]:
        sigma, strength = float(self._plan.levels.schedule[index]), strength_of(self._plan.total, index)
        return {"kind": "sweep", "step": index, "sigma": sigma, "strength": strength}

    def _temporary(self, stack: ExitStack) -> Path:
        file = temporary_file(ENDINGS[self._settings.format])
        stack.callback(file.unlink, missing_ok=True)
        return file
