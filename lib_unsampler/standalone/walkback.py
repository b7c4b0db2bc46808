"""Mode ``invert`` without a WebUI: the embedded model walks one picture backwards, and samples it back for a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import inversion
from ..core.inversion import Level, Unnumbered
from ..core.schedule import Levels
from ..pictures.render import to_pictures
from ..pictures.roundtrip import RoundTrip, measured
from ..settings import Settings
from . import sampling
from .embedded import Denoiser
from .progress import Bars


@dataclass(frozen=True, eq=False)
class WalkBack(inversion.Walked):
    """A picture's inversion.

    Attributes:
        sampler: The sampler that was inverted.
    """

    sampler: str


def walk_back(
    model: Denoiser, source: Tensor, plan: Levels, settings: Settings, prediction: str, bars: Bars
) -> WalkBack:
    """Inverts one picture of shape (1, 3, H, W).

    Raises:
        InversionError: for a sampler that can not be inverted.
    """
    sampler, _ = inversion.kin(settings.sampler, settings.solver)
    levels: list[Level] = []
    estimates: dict[int, Tensor] = {}
    numbered = Unnumbered(model)

    with bars("inverting", len(plan.visited), "level") as bar:

        def visit(level: Level) -> None:
            levels.append(level)
            if settings.panel and level.index in plan.kept:
                seen = level.denoised
                estimates[level.index] = model(level.z, level.z.new_tensor([level.sigma])) if seen is None else seen
            bar.set_postfix_str(f"{numbered.calls} model calls", refresh=False)
            bar.update()

        limits: dict[str, Any] = {"tolerance": settings.tolerance, "max_calls": settings.max_calls}
        function = sampling.function(sampler)
        inversion.invert(numbered, source, plan, settings.solver, function, prediction, visit, **limits)
    return WalkBack(tuple(levels), estimates, sampler)


def round_trip(model: Denoiser, walked: WalkBack, source: Tensor, plan: Levels, tolerance: float) -> RoundTrip:
    """The picture sampled back by the sampler that was inverted, under the prompts it was inverted with."""
    start = plan.visited[-1]
    back = sampling.sample(model, walked.levels[-1].z, plan.schedule[start:], walked.sampler, (0,))
    pictures = (to_pictures(back)[0], to_pictures(source)[0])
    return measured(walked.levels, 0, (back[0], source[0]), pictures, None, tolerance)
