"""What the model drives inside the host's own sampler: ``invert`` and ``replay`` for one batch.

The host's ``sample_img2img`` is run with another function in its sampler's place, so the model is
loaded, guided, previewed and interrupted as in the host's own sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from ..core import replay
from ..core.fingerprint import fingerprint
from ..core.inversion import CALLS, Level, Walked, kin
from ..core.inversion import invert as invert_
from ..core.noising import Draw, unsample
from ..core.replay import Recording
from ..core.schedule import Levels
from ..settings import TITLE, Settings
from .host.draws import untouched_draws
from .host.guiding import GuidedModel, in_sampler, k_diffusion_function, prompted, sampler_function
from .host.progress import Progress
from .host.request import comment, identity
from .host.schedule import start_at


@dataclass(frozen=True)
class Plan:
    """What one batch walks: the levels, and whether its last is where img2img would start anyway.

    The prediction type is the model's that begins the sampling: a refiner may end it.
    """

    levels: Levels
    prediction: str
    total: int
    own_start: bool

    @property
    def start(self) -> int:
        """The schedule index of the noisiest level."""
        return self.levels.kept[-1]


@dataclass(frozen=True)
class Batch:
    """One batch as the host calls its sampler's ``sample_img2img``; x and noise have shape (B, C, [T,] H, W)."""

    own: Callable[..., Tensor]
    p: Any
    x: Tensor
    noise: Tensor
    conditioning: Any
    unconditional_conditioning: Any
    steps: int | None = None
    image_conditioning: Any = None

    @property
    def conds(self) -> tuple[Any, Any]:
        """The request's own (positive, negative) conditions."""
        return self.conditioning, self.unconditional_conditioning

    def sample(
        self, plan: Plan, body: Callable[..., Tensor] | None = None, conds: tuple[Any, Any] | None = None
    ) -> Tensor:
        """The host's own sampling from the plan's noisiest level down, or a body in its function's place."""
        begin = nullcontext(self.steps) if plan.own_start else start_at(self.p, plan.total, plan.start)
        with begin as steps:
            args = (self.p, self.x, self.noise, *(conds or self.conds), steps, self.image_conditioning)
            return self.own(*args) if body is None else in_sampler(body, self.own, *args)


@dataclass(frozen=True, eq=False)
class Inverted(Walked):
    """A batch that the model walked backwards.

    Attributes:
        source: The clean latents it started from.
        back: The noisiest level sampled back under the same prompts, for reports; else None.
    """

    source: Tensor
    back: Tensor | None

    def told(self) -> list[dict[str, Any]]:
        """What each level cost and how near it came, as plain values."""
        return [
            {
                "step": level.index,
                "sigma": level.sigma,
                "residual": None if level.residual is None else level.residual.tolist(),
                "calls": level.calls.tolist(),
                "converged": level.converged.tolist(),
            }
            for level in self.levels
        ]


_last: tuple[str, Inverted] | None = None
"""The last whole inversion, and the fingerprint of what it depends on."""


def invert(batch: Batch, plan: Plan, settings: Settings) -> Inverted:
    """The levels of a batch as the model itself walks them, under the source's prompts.

    What the last call made is given again if nothing that it depends on has changed. An interrupt
    leaves the levels reached by then.

    Raises:
        InversionError: for a sampler that cannot be inverted.
    """
    global _last
    name, message = kin(sampler_function(batch.p.sampler), settings.solver)
    if message is not None:
        comment(batch.p, message)
    with prompted(batch.p, settings.positive, settings.negative, settings.cfg, batch.conds) as source_conds:
        asked = [getattr(settings, name) for name in ("solver", "cfg", "tolerance", "max_calls", "panel", "report")]
        key = fingerprint(identity(batch.p, TITLE), source_conds, plan, asked)
        if _last is None or _last[0] != key:
            _last = None  # so that two inversions are never held
            made = _walk_back(batch, plan, settings, source_conds, name)
            if len(made.levels) < len(plan.levels.visited):
                return made
            _last = (key, made)
    return _last[1]


def _walk_back(batch: Batch, plan: Plan, settings: Settings, conds: tuple[Any, Any], name: str) -> Inverted:
    p, count = batch.p, len(plan.levels.visited)
    progress = Progress(count, own_job=False)
    reached: list[Level] = []
    estimates: dict[int, Tensor] = {}
    back: list[Tensor] = []

    def body(function: Callable[..., Tensor], denoiser: Any, start: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        def called(calls: int) -> None:
            level = min(len(reached) + 1, count)
            progress.at(len(reached), f"Inverting: level {level} of {count}, {calls} model calls")

        stride = p.sampler.config.total_steps(1) // CALLS[name]
        model = GuidedModel(denoiser, options["extra_args"], stride, called)

        def visit(level: Level) -> None:
            reached.append(level)
            if settings.panel and level.index in plan.levels.kept:
                sigma = level.z.new_full((len(level.z),), level.sigma)
                estimates[level.index] = model(level.z, sigma, CALLS[name] * (level.index - plan.start))

        limits = {"tolerance": settings.tolerance, "max_calls": settings.max_calls}
        with untouched_draws():
            walker = k_diffusion_function(name)
            invert_(model, batch.x, plan.levels, settings.solver, walker, plan.prediction, visit, **limits)
            if settings.report:
                denoiser.step = 0
                back.append(walker(denoiser, reached[-1].z, sigmas, extra_args=options["extra_args"], disable=True))
        return start

    batch.sample(plan, body, conds)
    progress.done()
    return Inverted(tuple(reached), estimates, batch.x, back[0] if back else None)


class _Inpainting:
    """The host's denoiser with the source outside the mask, as its samplers inpaint; otherwise the denoiser itself."""

    def __init__(self, model: Any, source: Tensor, mask: Tensor | None) -> None:
        self._model = model
        self._source = source
        self._mask = mask

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        denoised = self._model(x, sigma, **args)
        return denoised if self._mask is None else self._mask * denoised + (1 - self._mask) * self._source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)  # Forge's samplers ask their model for its prediction type


def record(batch: Batch, plan: Plan, draws: Draw, settings: Settings) -> Recording | None:
    """A batch's pictures as the noises of the request's own sampler, under the source's prompts.

    Returns:
        The recording, from the level where the skip begins, or None if the user stopped it.

    Raises:
        ReplayError: for a sampler or options that cannot be replayed.
    """
    p, x, levels = batch.p, batch.x, plan.levels
    steps = max(1, len(levels.visited) - settings.skip)
    unthinned = Levels(levels.schedule, levels.visited[:steps], levels.visited[:steps])
    states = unsample(x.float(), unthinned, draws, "independent", plan.prediction)
    fresh = (draws(j) for j in count(len(levels.schedule) - 1))
    made: list[Recording] = []

    def body(function: Callable[..., Tensor], model: Any, start: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        model.step = p.sampler.config.total_steps(len(sigmas) - 1 - steps)  # where prompt editing is in the schedule
        source_model = _Inpainting(model, x, getattr(p, "nmask", None))
        sigmas = sigmas[-steps - 1 :]
        made.append(replay.record(function, source_model, sigmas, states, x, fresh, plan.prediction, **options))
        return start

    with prompted(p, settings.positive, settings.negative, settings.cfg, batch.conds) as source_conds:
        batch.sample(plan, body, source_conds)
    return made[0] if made else None


def sample_replayed(batch: Batch, plan: Plan, recording: Recording, skip: int) -> Tensor:
    """The host's own sampling with a recording's noises, from the level where the skip or the recording begins.

    Raises:
        ReplayError: for another sampler, schedule or options than the recorded ones.
    """
    p, recorded = batch.p, len(recording.states)
    steps = max(1, min(len(plan.levels.visited) - skip, recorded))

    def body(function: Callable[..., Tensor], model: Any, start: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        model.step = p.sampler.config.total_steps(len(sigmas) - 1 - steps)
        edited = _Inpainting(model, batch.x, getattr(p, "nmask", None))
        whole = plan.levels.schedule[-recorded - 1 :].to(sigmas)
        return replay.replay(function, edited, whole, recording.like(start), recorded - steps, **options)

    return batch.sample(plan, body)
