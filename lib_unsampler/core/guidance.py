r"""Guidance by a batch of noise levels: before each step the sampler's state is drawn towards that level's z.

.. math:: x_i \leftarrow c_i z_i + (1 - c_i) x_i

The *skip residual* of DemoFusion (Du et al., CVPR 2024, section 3.3), with the paper's weight at the model's
timestep t of the level, out of T = 1000, times a strength w of ours:

.. math:: c(t) = w \left(\frac{1 + \cos(\pi (T - t) / T)}{2}\right)^\alpha

Nearly w at the noisiest level, 0 at the clean one. Or by a map (*Differential Diffusion*, Levin and Fried 2023): every
place has the level at which it begins, and is z above it (c = 1), its own below it (c = 0).

The sampler's own function is run unchanged. Its state is the very tensor that it hands to the model at a step's first
call, so it is mixed there, in place, and the sampler's update uses what was mixed. Which calls are the first of a
step, and that the sampler goes on from that tensor, is found out beforehand (:mod:`.rehearsal`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .rehearsal import Sampler, Watched, forward, goes_on_from_shown, name_of

TIMESTEPS = 1000
"""T: the timesteps of the schedules that the models were trained on."""

Weight = float | Tensor
"""c of a level: one number, or one for each place, broadcastable against the state."""


class GuidanceError(ValueError):
    """A sampler or a schedule whose steps cannot be guided."""


def skip_weight(timestep: float, alpha: float, strength: float = 1.0) -> float:
    r"""DemoFusion's :math:`c(t) = w ((1 + \cos(\pi (T - t) / T)) / 2)^\alpha`; alpha 0 is w everywhere.

    Arguments:
        timestep: The model's timestep t of the level, from 0 (clean) to T; on flow models s T.
        alpha: How soon the guidance lets go: 3 in the paper.
        strength: The factor w, from 0 to 1.
    """
    share = (1 + math.cos(math.pi * (TIMESTEPS - min(timestep, TIMESTEPS)) / TIMESTEPS)) / 2
    return float(strength * share**alpha)


def active(step: int, steps: int, begin: float, end: float) -> bool:
    """Whether the share of the executed steps that is done before a step lies within [begin, end]."""
    return begin <= step / steps <= end


def skip_residual(
    timesteps: Sequence[float], alpha: float, strength: float, begin: float, end: float
) -> dict[int, Weight]:
    """DemoFusion's c of each executed step that is guided, by its number from 0.

    Arguments:
        timesteps: The model's timestep of each step, out of 1000.
        alpha: See :func:`skip_weight`.
        strength: At 0 no step is guided.
        begin: The share of the steps at which it begins.
        end: The share at which it ends.
    """
    return {
        step: skip_weight(timestep, alpha, strength)
        for step, timestep in enumerate(timesteps)
        if active(step, len(timesteps), begin, end) and strength > 0
    }


def first_calls(function: Sampler, model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> list[int | None]:
    """For each model call of a run, the step (from 0) whose first call it is; None for a call within a step.

    Arguments:
        function: The sampler's, with the options that it will be run with.
        model: The denoiser, looked at but never called.
        x: Any latent of the run, with shape (B, C, [T,] H, W).
        sigmas: The descending schedule it will be run on, with shape (n + 1).

    Raises:
        GuidanceError: for a sampler that does not take the schedule's steps one after the other.
    """
    if "sigmas" not in inspect.signature(function).parameters:
        raise GuidanceError(f"sampler: {name_of(function)!r} chooses its own steps and cannot be guided")
    counted = forward(function, model, x, sigmas=sigmas, **options)
    firsts, levels = counted.first, [float(sigma) for sigma in sigmas[:-1]]
    at = [counted.sigmas[call] for call in firsts]
    if len(firsts) != len(levels) or not all(math.isclose(a, s, rel_tol=1e-5) for a, s in zip(at, levels)):
        raise GuidanceError(
            f"sampler: {name_of(function)!r} does not take the schedule's steps one after the other "
            "(with s_churn above 0 none does) and cannot be guided"
        )
    if not goes_on_from_shown(function, model, x, firsts, sigmas=sigmas, **options):
        raise GuidanceError(f"sampler: {name_of(function)!r} shows its model a copy of its state; it cannot be guided")
    steps = {call: step for step, call in enumerate(firsts)}
    return [steps.get(call) for call in range(len(counted.shown))]


class Guided(Watched):
    """A denoiser that mixes the sampler's state in place before the first call of each step."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        calls: Sequence[int | None],
        weights: Mapping[int, Weight],
        level: Callable[[int], Tensor],
        sampler: str = "",
    ) -> None:
        """Begins before the first call.

        Arguments:
            model: The denoiser, ``model(x, sigma, **extra)``.
            calls: What :func:`first_calls` found.
            weights: c of each step that is guided, from 0; other steps are left alone, bit for bit.
            level: z of a step, with the state's shape.
            sampler: Its name, for errors.
        """
        super().__init__(model)
        self._calls, self._weights, self._level, self._sampler = calls, weights, level, sampler
        self._made = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """D of the mixed state."""
        if self._made >= len(self._calls):
            raise GuidanceError(f"sampler: {self._sampler!r} calls the model more often than it did when tried")
        step = self._calls[self._made]
        self._made += 1
        if step is not None and step in self._weights:
            mix(x, self._level(step).to(x), self._weights[step])
        return super().__call__(x, sigma, **extra)


def mix(x: Tensor, z: Tensor, weight: Weight) -> None:
    """``x <- c z + (1 - c) x`` in place; exactly z where c is 1 and exactly x where it is 0."""
    x.lerp_(z, weight.to(x) if isinstance(weight, Tensor) else weight)


def sample_guided(
    function: Sampler,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    weights: Mapping[int, Weight],
    level: Callable[[int], Tensor],
    calls: Sequence[int | None],
    **options: Any,
) -> Tensor:
    """Runs a sampler with its state drawn towards a level's z before each guided step.

    Arguments:
        function: The sampler's own function.
        model: The denoiser.
        x: The start state, with shape (B, C, [T,] H, W); it is left as it is.
        sigmas: The descending schedule, with shape (n + 1).
        weights: c of each guided step, from 0 to n - 1.
        level: z of a step.
        calls: What :func:`first_calls` found for this run.
        options: The function's other keywords.

    Raises:
        GuidanceError: if the sampler does not run as it did when tried.
    """
    guided = Guided(model, calls, weights, level, name_of(function))
    made: Tensor = function(guided, x.clone(), sigmas=sigmas, **options)
    return made
