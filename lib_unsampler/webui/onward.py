"""How a batch goes on from its levels: from z, drawn towards the levels, and filmed on the way.

All of it is img2img's own sampling, with its own model calls, guidance, masks and callbacks: only the sampler's
function is run with another start, with its state mixed before each step, or with a listener to its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import guidance
from ..core.guidance import Weight, first_calls, sample_guided
from ..core.rehearsal import Still, Watched
from ..settings import Settings
from .driven import Batch, Listen, Plan, listening
from .host.draws import untouched_draws
from .host.guiding import running
from .host.request import attribute
from .host.schedule import img2img_steps


@dataclass(frozen=True, eq=False)
class Guide:
    """What draws the state: c by schedule index, and z of a schedule index."""

    weights: Mapping[int, Weight]
    level: Callable[[int], Tensor]


def sample(
    batch: Batch, plan: Plan, start: Tensor | None, guide: Guide | None, listen: Listen | None
) -> tuple[Tensor, Tensor | None]:
    """The host's own sampling from the plan's noisiest level down, and the state that it began from.

    Arguments:
        start: The state to start from; None is the host's own.
        guide: What draws it, if anything does.
        listen: Told every step, if anybody wants to know.

    Raises:
        GuidanceError: for a sampler that cannot be guided.
    """

    def run(function: Callable[..., Tensor], model: Any, x: Tensor, **options: Any) -> Tensor:
        if start is not None:  # what z was solved for, is answered so again
            x, model = start.to(x), Still(model)
        began.append(x.detach().clone())
        if listen is not None:  # of the states, what the model is shown: some samplers tell their callback another
            model = watched = Watched(model)
            options["callback"] = listening(
                plan.start, lambda index, _, estimate: listen(index, watched.last(), estimate), options.get("callback")
            )
        if guide is None:
            return function(model, x, **options)
        sigmas = options.pop("sigmas")
        with untouched_draws():
            calls = first_calls(function, model, x, sigmas, **options)
        weights = {index - plan.start: c for index, c in guide.weights.items()}
        level = guide.level
        return sample_guided(function, model, x, sigmas, weights, lambda i: level(i + plan.start), calls, **options)

    began: list[Tensor] = []
    with running(batch.p.sampler, run):
        made = batch.sample(plan)
    return made, began[0] if began else None


def skip_residual(plan: Plan, timesteps: Callable[[int], float], settings: Settings) -> dict[int, Weight]:
    """DemoFusion's c for each executed step that is guided, by schedule index.

    Arguments:
        timesteps: The model's timestep of a schedule index, out of 1000.
    """
    times = [timesteps(index) for index in range(plan.start, len(plan.levels.schedule) - 1)]
    asked = settings.guide_alpha, settings.guide_strength, settings.guide_from, settings.guide_until
    return {plan.start + step: c for step, c in guidance.skip_residual(times, *asked).items()}


def own_levels(strengths: Tensor, total: int, start: int) -> Tensor:
    """The schedule index at which img2img of each place's strength begins; ``total`` (never) where it is 0.

    The host's own arithmetic, ``t_enc = int(min(strength, 0.999) * steps)``, start level ``steps - t_enc - 1``.

    Arguments:
        strengths: q of each place, from 0 to 1.
        total: The steps of the host's schedule.
        start: The index at which sampling begins: no place's is before it.
    """
    begins = total - (strengths.double().clamp(max=0.999) * total).floor().long() - 1
    return torch.where(strengths > 0, begins.clamp(min=start), torch.full_like(begins, total))


def map_weights(own: Tensor, plan: Plan) -> dict[int, Weight]:
    """C of each step for a map (Differential Diffusion): 1 where a place has not begun yet, else 0."""
    indices = range(plan.start, len(plan.levels.schedule) - 1)
    return {index: (own > index).float() for index in indices if bool((own > index).any())}


@dataclass(frozen=True, eq=False)
class StrengthMap:
    """A mask read as a map of strengths: q of each latent place, with the mask's shape."""

    strengths: Tensor

    @property
    def largest(self) -> float:
        """The strength at which sampling begins."""
        return float(self.strengths.max())

    def plan_start(self, p: Any) -> tuple[int, int]:
        """(schedule steps, start level) of img2img at the largest strength."""
        with attribute(p, "denoising_strength", self.largest):
            return img2img_steps(p)


def mapped(p: Any, guided: ExitStack) -> StrengthMap:
    """The mask as a map of strengths; within ``guided`` the host inpaints nothing and begins at its largest."""
    found = StrengthMap(p.nmask * p.denoising_strength)
    for name, value in (("mask", None), ("nmask", None), ("denoising_strength", found.largest)):
        guided.enter_context(attribute(p, name, value))
    p.overlay_images = None
    return found
