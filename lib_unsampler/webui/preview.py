"""What an img2img request would do, asked by the page before it is made.

The answer is of the model that is loaded; none is loaded for it. The same rules answer as in the request
itself: :mod:`.refusals`, :func:`..core.schedule.levels`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.schedule import Levels
from ..core.trajectory import TrajectoryError
from ..page import questions, shelf
from ..pictures.estimate import Estimate, estimate
from ..settings import Settings
from . import refusals, saved
from .host import hypothetical
from .host.page import output_folder, preferences
from .host.schedule import host_levels, img2img_steps, prediction_type, timesteps

Answer = tuple[str, str | None, Path | None]
"""HTML for the page's script; the latents file to choose; the one to download."""


def answer(question: str, folder: Callable[[], Path] = output_folder) -> Answer:
    """What the page's hidden channel gets back: JSON in an attribute, never markup of the asker's."""
    made = questions.answer(question, folder, foreseen)
    return f'<span data-answer="{html.escape(json.dumps(made.told), quote=True)}"></span>', made.chosen, made.file


def foreseen(told: Mapping[str, Any], settings: Settings) -> Foreseen | None:
    """The request that the page's controls would make; None where no model is loaded."""
    model = hypothetical.loaded_model()
    return None if model is None else Foreseen(*hypothetical.request(told, model), settings)


class Foreseen:
    """An img2img request that is not made."""

    def __init__(self, p: Any, sampler: Any, settings: Settings) -> None:
        """Of the host's request, its sampler and our settings."""
        self._p, self._sampler, self._settings = p, sampler, settings
        self.model = hypothetical.model_name(p.sd_model)

    def curve(self) -> dict[str, Any]:
        """The host's own schedule."""
        p, sampler = self._p, self._sampler
        total, _ = refusals.asked_steps(p, self._settings, sampler)
        plan, kept = self._plan(total, max(0, self._settings.end_at_step))
        awaited = hypothetical.awaited_model(p.sd_model)
        return {
            "sigmas": plan.schedule.tolist(),
            "timesteps": timesteps(p, plan.schedule),
            "total": total,
            "own": list(img2img_steps(p)),
            "fixed": hypothetical.fixes_steps(),
            "kept": kept,
            "flow": prediction_type(p.sd_model) == "flow",
            "note": "" if awaited is None else f"{awaited} is chosen and loads with the next picture",
        }

    def _plan(self, total: int, end: int) -> tuple[Levels, list[int] | None]:
        """The levels, and the kept ones where it is not steps that say them: of a latents file, and of a sigma."""
        settings = self._settings
        if settings.trajectory:
            try:
                file = shelf.read(output_folder(), settings.trajectory)
            except TrajectoryError as error:
                raise ValueError(f"trajectory: {error}") from None
            plan = saved.plan(file, total, None).levels
            return plan, list(plan.kept)
        if settings.end_at_sigma > 0:
            plan = refusals.asked_levels(self._p, settings, self._sampler)
            return plan, list(plan.kept)
        return host_levels(self._p, self._sampler, total, end, settings.step_increment), None

    def refused(self) -> list[str]:
        """What the request itself would be refused for."""
        try:
            asked = (self._p, self._settings, self._sampler)
            refusals.check_schedule(*asked, preferences().megapixels, refusals.check(*asked))
        except ValueError as error:
            return [str(error)]
        return []

    def cost(self) -> tuple[Estimate, str] | None:
        """What it costs, if nothing stands in the way of knowing it."""
        p, settings = self._p, self._settings
        try:
            plan, _ = self._plan(*refusals.asked_steps(p, settings, self._sampler))
        except ValueError:
            return None
        sampled = len(plan.schedule) - 1 - plan.kept[-1] if settings.samples else 0
        made = estimate(
            *(settings, plan.sigmas.tolist(), len(plan.visited), sampled, p.width, p.height, p.batch_size * p.n_iter),
            hypothetical.calls_a_step(self._sampler),
            "2m" in str(getattr(self._sampler, "funcname", "")),
        )
        return made, settings.format
