"""What the model drives inside the host's own sampler: ``invert`` and ``replay`` for one batch.

The host's ``sample_img2img`` is run with another function in its sampler's place, so the model is
loaded, guided, previewed and interrupted as in the host's own sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from torch import Tensor

from ..core import replay
from ..core.fingerprint import fingerprint
from ..core.inversion import CALLS, Level, Walked, kin, without_noise
from ..core.inversion import invert as invert_
from ..core.noising import Draw, unsample
from ..core.rehearsal import Still
from ..core.replay import Recording
from ..core.schedule import Levels
from ..settings import TITLE, Settings
from .host.draws import repeatable_draws, untouched_draws
from .host.guiding import (
    GuidedModel,
    Samplings,
    Skipped,
    counted_calls,
    draws_noise,
    in_sampler,
    k_diffusion_function,
    prompted,
    sampler_function,
    starting_from,
)
from .host.progress import Mirrored, next_job, stopped
from .host.request import comment, identity, same_shape
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
    samplings: Samplings = field(kw_only=True)

    @property
    def conds(self) -> tuple[Any, Any]:
        """The request's own (positive, negative) conditions."""
        return self.conditioning, self.unconditional_conditioning

    def sample_at(self, total: int, index: int) -> Tensor:
        """The host's own sampling from another level of its schedule of ``total`` steps, before :meth:`sample`."""
        self.samplings.begin(self.x, self.noise, self.conds, goes_on=True)
        with start_at(self.p, total, index) as steps:
            return self.own(self.p, self.x, self.noise, *self.conds, steps, self.image_conditioning)

    def sample(
        self, plan: Plan, body: Callable[..., Tensor] | None = None, conds: tuple[Any, Any] | None = None
    ) -> Tensor:
        """The host's own sampling from the plan's noisiest level down, or a body in its function's place."""
        conds = conds or self.conds
        self.samplings.begin(self.x, self.noise, conds)
        started = nullcontext(self.steps) if plan.own_start else start_at(self.p, plan.total, plan.start)
        with started as steps:
            args = (self.p, self.x, self.noise, *conds, steps, self.image_conditioning)
            return self.own(*args) if body is None else in_sampler(body, self.own, *args)


@dataclass(frozen=True, eq=False)
class Inverted(Walked):
    """A batch that the model walked backwards.

    Attributes:
        source: The clean latents it started from.
        back: The noisiest level sampled back under the same prompts, for reports; else None.
        comes_back: Whether sampling from it is to give the source: it was solved for the sampler itself.
        remarks: What is to be said of it.
    """

    source: Tensor
    back: Tensor | None
    comes_back: bool
    remarks: tuple[str, ...] = ()

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


def jobs(settings: Settings, resumed: bool) -> int:
    """Jobs of the host's progress bar that driving one batch is; ``resumed`` is from a latents file."""
    if settings.mode == "invert":
        return 1 + settings.report
    return int(settings.mode == "replay" and not resumed and bool({"init", "latents"} & set(settings.output)))


def invert(batch: Batch, plan: Plan, settings: Settings) -> Inverted:
    """The levels of a batch as the model itself walks them, under the source's prompts.

    What the last call made is given again if nothing that it depends on has changed. An interrupt
    leaves the levels reached by then.

    Raises:
        InversionError: for a sampler that cannot be inverted.
    """
    global _last
    name, message = kin(sampler_function(batch.p.sampler), settings.solver)
    with _as_source(batch, settings) as source_conds:
        asked = [getattr(settings, name) for name in ("solver", "cfg", "tolerance", "max_calls", "panel", "report")]
        drawn = _sampling(batch.p) if settings.report else None
        key = fingerprint(identity(batch.p, TITLE), source_conds, plan, asked, drawn)
        if _last is not None and _last[0] == key:
            made = _last[1]
            next_job(jobs(settings, resumed=False))
        else:
            _last = None  # so that two inversions are never held
            made = _walk_back(batch, plan, settings, source_conds, name)
            if len(made.levels) == len(plan.levels.visited):
                made = _sampled_back(batch, plan, made, source_conds) if settings.report else made
                _last = None if stopped() else (key, made)
    for text in (message, *made.remarks):
        if text is not None:
            comment(batch.p, text)
    return made


def _as_source(batch: Batch, settings: Settings) -> AbstractContextManager[tuple[Any, Any]]:
    """The conditions under which the model sees the source."""
    asked = settings.positive, settings.negative, settings.cfg
    return prompted(batch.p, *asked, batch.conds, batch.samplings)


def _sampling(p: Any) -> list[Any]:
    """What a sampler that adds noise depends on beside the rest of a request."""
    names = ("seeds", "subseeds", "subseed_strength", "seed_resize_from_h", "seed_resize_from_w")
    return [getattr(p, name, None) for name in (*names, "eta", "s_churn", "s_tmin", "s_tmax", "s_noise")]


def _walk_back(batch: Batch, plan: Plan, settings: Settings, conds: tuple[Any, Any], name: str) -> Inverted:
    total = len(plan.levels.visited)
    progress = Mirrored(total)
    reached: list[Level] = []
    estimates: dict[int, Tensor] = {}
    remarks: list[str] = []

    def called(calls: int) -> None:
        level = min(len(reached) + 1, total)
        progress.at(len(reached), f"Inverting: level {level} of {total}, {calls} model calls")

    def body(function: Callable[..., Tensor], denoiser: Any, start: Tensor, **options: Any) -> Tensor:
        counted = counted_calls(function, denoiser, start, **options)
        if name == sampler_function(batch.p.sampler) and draws_noise(function, denoiser, start, **options):
            remarks.append(without_noise(name, settings.solver, options))
        model = GuidedModel(Still(denoiser), options["extra_args"], counted, CALLS[name], progress, called)

        def visit(level: Level) -> None:
            reached.append(level)
            if settings.panel and level.index in plan.levels.kept:
                sigma = level.z.new_full((len(level.z),), level.sigma)
                estimates[level.index] = model(level.z, sigma, CALLS[name] * (level.index - plan.start))

        limits: dict[str, Any] = {"tolerance": settings.tolerance, "max_calls": settings.max_calls}
        with untouched_draws():
            walker = k_diffusion_function(name)
            invert_(model, batch.x, plan.levels, settings.solver, walker, plan.prediction, visit, **limits)
        return start

    try:
        batch.sample(plan, body, conds)
    finally:
        progress.done()
    exact = settings.solver == "exact" and name == sampler_function(batch.p.sampler) and not remarks
    return Inverted(tuple(reached), estimates, batch.x, None, exact, tuple(remarks))


def _sampled_back(batch: Batch, plan: Plan, inverted: Inverted, conds: tuple[Any, Any]) -> Inverted:
    """With the noisiest level sampled as img2img would, by its sampler and options, and with its draws."""
    with repeatable_draws(batch.p, batch.noise), starting_from(batch.p.sampler, inverted.levels[-1].z):
        back = batch.sample(plan, conds=conds)
    next_job()
    return inverted if stopped() else replace(inverted, back=back)


Listen = Callable[[int, Tensor, Tensor], None]
"""Told each step of a sampling: its schedule index, the state before it, and the model's estimate of the picture."""


def listening(start: int, listen: Listen, inner: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """A sampler's callback that tells every step to a listener first; ``start`` is the first step's schedule index."""

    def called(info: Mapping[str, Any]) -> None:
        listen(start + int(info["i"]), info["x"], info["denoised"])
        if inner is not None:
            inner(info)

    return called


class _Inpainting:
    """The host's denoiser with the source outside the mask, as its samplers inpaint; otherwise the denoiser itself."""

    def __init__(self, model: Any, source: Tensor, mask: Tensor | None) -> None:
        self._model = model
        self._source = source
        self._mask = mask

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        denoised = same_shape(self._model(x, sigma, **args), x, "the model's answer")
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
    answers: list[Tensor | None] = []
    made: list[Recording] = []

    def body(function: Callable[..., Tensor], model: Any, start: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        source_model = _Inpainting(Still(model), x, getattr(p, "nmask", None))
        below = sigmas[-steps - 1 :]
        with untouched_draws():
            replay.rehearsed(function, model, below, x, plan.prediction, 0, **options)
            counted = counted_calls(function, model, x, sigmas=sigmas, **options)
            run = Skipped(model, counted, len(sigmas) - len(below)).options(options)
            if answers:
                told = states, x, fresh, plan.prediction, answers[0]
                made.append(replay.record(function, source_model, below, *told, **run))
            else:
                answers.append(replay.first_answer(function, source_model, states[-1], below, **run))
        return start

    with _as_source(batch, settings) as source_conds:
        for _ in ("its first question", "the recording"):
            batch.sample(plan, body, source_conds)
    next_job()
    return made[0] if made else None


def sample_replayed(batch: Batch, plan: Plan, recording: Recording, skip: int, listen: Listen | None) -> Tensor:
    """The host's own sampling with a recording's noises, from the level where the skip or the recording begins.

    Arguments:
        listen: Told every step: its schedule index, the state before it, and the model's estimate.

    Raises:
        ReplayError: for another sampler, schedule or options than the recorded ones.
    """
    p, recorded = batch.p, len(recording.states)
    steps = max(1, min(len(plan.levels.visited) - skip, recorded))

    def body(function: Callable[..., Tensor], model: Any, start: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        counters = Skipped(
            model, counted_calls(function, model, start, sigmas=sigmas, **options), len(sigmas) - 1 - steps
        )
        edited = _Inpainting(Still(model), batch.x, getattr(p, "nmask", None))
        whole = plan.levels.schedule[-recorded - 1 :].to(sigmas)
        run = counters.options(options)
        if listen is not None:
            first = len(plan.levels.schedule) - 1 - steps
            run["callback"] = listening(first, listen, run.get("callback"))
        return replay.replay(function, edited, whole, recording.like(start), recorded - steps, **run)

    return batch.sample(plan, body)
