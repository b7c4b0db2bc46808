r"""Inversion: the model walks its own schedule backwards, from a picture to the noise it is made from.

Two solvers, over the same k-diffusion samplers:

* ``reverse`` runs the sampler over the ascending schedule :math:`s_{n-1} < \dots < s_e` (ComfyUI_Noise's
  Unsampler, FlipSigmas): the probability-flow ODE integrated upwards. The first step, from the schedule's end
  :math:`s_n` (mostly 0) to :math:`s_{n-1}`, is one Euler step with D evaluated at :math:`s_{n-1}`:
  :math:`z = x + (1 - s_n / s_{n-1}) (x - D(x; s_{n-1}))`.
* ``exact`` finds at each level the state x that the sampler's *own step* maps onto the present one, y:

  .. math:: F(x) = \mathrm{step}_i(x) - y = 0, \quad
      \text{Euler: } \mathrm{step}_i(x) = x - (s_i - s_{i+1}) \frac{x - D(x; s_i)}{s_i}

  by Anderson-accelerated fixed-point iteration (Walker & Ni 2011), started from what the solved levels
  predict, with what they taught about the model's Jacobian. Sampling again then gives the source. The step is
  taken by the sampler's own function, so every deterministic one-step sampler is served by one solver. DPM++ 2M,
  whose step also looks at D one level above, is solved for all levels jointly (:mod:`.joint`), at about half as
  many calls again, and the levels are handed over at the end.
  Each image of a batch converges by itself, and costs no call once it has.

A schedule that ends above 0 has the source as its state there. On one that ends at 0 the
sampler's last step maps x at :math:`s_{n-1}` to :math:`D(x; s_{n-1})`, whose range need not hold the
source. The convention: it is solved like every other step, from x = source, and where it converges no
further, or only to more noise than that level has (three times its sigma), the best x stays. Its residual says
what is lost, and the round trip loses about that much.
Half-precision models converge as far as their rounding lets them: the solver stops where it gets no nearer.

Sigma is in the model's space; flow models obey the same equations (k-diffusion's :math:`d = (x - D) / s` is
their velocity). The latents stay on their device: ``exact`` works in float32, or their dtype if that is wider, and
looks at the device once an iteration; ``reverse`` works in float64 and waits only where k-diffusion does.

Samplers that add noise have no inverse: their step maps a state and fresh noise onto the next state, so a picture has
one start for every choice of noises. What can be done is one of two things. The deterministic kin (KIN), which solves
the probability-flow ODE of the same marginals, gives the one z from which *it* comes back; the SDE sampler itself,
started from that z, gives another picture of the same distribution, nearer the source the less noise it adds. Or z at
every level is drawn first and the noises solved for that lead the sampler through them: :mod:`.replay`, exact at any
guidance scale, whose noises are no longer white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .fixedpoint import Evaluate, Solved, Solver, some, uploaded
from .joint import Joint, factors
from .noising import signal_scale
from .schedule import Levels

SOLVERS = ("reverse", "exact")
CALLS = {"euler": 1, "heun": 2, "dpm_2": 2, "dpmpp_2m": 1, "lms": 1}
"""Every deterministic k-diffusion sampler with a schedule, and the model calls of one of its steps."""

EXACT = ("euler", "heun", "dpm_2", "dpmpp_2m")
"""Those that ``exact`` inverts: their step depends on its start alone, or (JOINT) on D one level above too."""

JOINT = ("dpmpp_2m",)
"""Those of EXACT whose levels are solved jointly."""

KIN = {
    "euler_ancestral": "euler",
    "dpm_2_ancestral": "dpm_2",
    "dpmpp_2s_ancestral": "dpmpp_2m",
    "dpmpp_sde": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m",
    "dpmpp_3m_sde": "dpmpp_2m",
}
"""Samplers that add noise, and the deterministic one that solves the same equation in the same way."""


class Model(Protocol):
    """A guided denoiser: ``model(x, sigma, call, images) -> D(x; sigma)``.

    x has shape (b, C, [T,] H, W), sigma (b). ``call`` numbers the model calls of the sampler's forward run
    from the noisiest visited level down, from 0 (step i of a two-call sampler makes calls 2 i and 2 i + 1):
    it is the forward call that this one mirrors, by which hosts look up prompt editing, the refiner and the
    negative guidance minimum sigma. ``images`` with shape (b) are the batch's images that x holds; None is all.

    A model whose conditions do not depend on the call may also offer ``stacked(x, sigma, calls, images)``, with
    calls and images of shape (b): states of several levels in one batch. It is given as many as its memory has held
    so far: all of a round at first, and half of what it raised ``torch.cuda.OutOfMemoryError`` for.
    """

    def __call__(self, x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        """D(x; sigma) of these images."""


class Unnumbered:
    """A denoiser ``model(x, sigma)`` as :class:`Model`, whose answers depend on nothing else; it counts its calls."""

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor]) -> None:
        """``denoiser`` takes any batch."""
        self._denoiser = denoiser
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        """D of one level."""
        self.calls += 1
        return self._denoiser(x, sigma)

    def stacked(self, x: Tensor, sigma: Tensor, calls: Tensor, images: Tensor) -> Tensor:
        """D of several levels in one batch."""
        self.calls += 1
        return self._denoiser(x, sigma)


class InversionError(ValueError):
    """A sampler that can not be inverted."""


@dataclass(frozen=True, eq=False)
class Level:
    r"""One visited level of a batch of B images.

    Attributes:
        index: Its schedule index.
        sigma: Its sigma.
        z: The state, float32 or the latent's wider dtype, on its device, with shape (B, C, [T,] H, W).
        denoised: The model's last estimate D(z; sigma) from the way to z, of the same shape, or None where
            the model was not asked at this level (``reverse``: the noisiest).
        residual: RMS of step(z) minus the state below, over max(1, sigma) (flow: max(1 - sigma, sigma)), with
            shape (B); None under ``reverse``, which measures none. Where z was accepted without another call,
            it is the residual that the rate of convergence promises.
        calls: Model calls spent on each image, with shape (B).
        converged: Whether the residual reached the tolerance, with shape (B).
    """

    index: int
    sigma: float
    z: Tensor
    denoised: Tensor | None
    residual: Tensor | None
    calls: Tensor
    converged: Tensor


@dataclass(frozen=True, eq=False)
class Walked:
    """The levels of a batch that a model walked backwards.

    Attributes:
        levels: Every visited level that was reached, least noisy first.
        estimates: The model's estimate D(z) at each kept level's schedule index, for panels; else empty.
    """

    levels: tuple[Level, ...]
    estimates: Mapping[int, Tensor]

    def kept(self, plan: Levels) -> Iterator[tuple[int, Tensor]]:
        """The kept levels that were reached, as (schedule index, z in float32)."""
        wanted = set(plan.kept)
        return ((level.index, level.z.float()) for level in self.levels if level.index in wanted)


Visit = Callable[[Level], None]


def kin(sampler: str, solver: str) -> tuple[str, str | None]:
    """The sampler that inverts in a sampler's place, and the message to show if it is another one.

    Raises:
        InversionError: for samplers that can not be inverted, by name.
    """
    if solver not in SOLVERS:
        raise InversionError(f"solver: {solver!r} is not one of {', '.join(SOLVERS)}")
    served = EXACT if solver == "exact" else tuple(CALLS)
    name = KIN.get(sampler, sampler)
    if name not in CALLS:
        raise InversionError(f"sampler: {sampler!r} can not be inverted; choose one of {', '.join(CALLS)}")
    if name not in served or (solver == "exact" and name in JOINT and name != sampler):
        name = "euler"  # a sampler with noise gains nothing from the joint solver's calls
    if name == sampler:
        return name, None
    why = "adds noise at each step" if sampler in KIN else "looks back over several steps"
    return name, f"{sampler} {why}: inverted ({solver}) as {name}"


def held(sampler: str, solver: str) -> int:
    """How many values an inversion holds at its worst for each value of its states, by a measurement of the process."""
    return 16 if solver == "exact" and kin(sampler, solver)[0] in JOINT else 4


def from_below(sampler: str) -> str | None:
    """The message to show where sampling on from levels below the noisiest need not come back to the source.

    A single step of Euler, Heun or DPM2 depends on its start alone, so that every level of an inversion leads back.
    """
    if sampler in EXACT and sampler not in JOINT:
        return None
    if sampler in KIN or sampler not in CALLS:
        return f"{sampler} adds noise at each step: what is sampled from an inverted level need not be the source"
    return (
        f"{sampler} looks back over its steps and starts without its history: what is sampled from an inverted level "
        "below the noisiest need not be the source"
    )


def without_noise(sampler: str, solver: str, options: Mapping[str, Any]) -> str:
    """The message to show where a sampler's options (``s_churn``) add noise, which its inversion leaves out."""
    churn = f" with s_churn {options['s_churn']:g}" if options.get("s_churn") else ""
    return f"{sampler}{churn} adds noise at each step: inverted ({solver}) without it, and sampling does not come back"


def invert(
    model: Model,
    x: Tensor,
    levels: Levels,
    solver: str,
    function: Callable[..., Tensor],
    prediction: str,
    visit: Visit,
    *,
    tolerance: float = 1e-6,
    max_calls: int = 40,
) -> Tensor:
    """Walks the levels upwards and hands each visited one, least noisy first, to ``visit``.

    Whatever ``model`` or ``visit`` raise (an interrupt) passes through; the levels handed over stay good.

    Arguments:
        model: The denoiser.
        x: Clean latents with shape (B, C, [T,] H, W).
        levels: The walk; every visited level is computed, kept or not.
        solver: ``reverse`` or ``exact``.
        function: The sampler's function, ``f(model, x, sigmas, extra_args=, callback=, disable=)`` as in
            k-diffusion, of a sampler that :func:`kin` serves.
        prediction: ``eps``, ``v`` or ``flow``.
        visit: Called with each level.
        tolerance: ``exact``: the residual (see :class:`Level`) at which an image is done.
        max_calls: ``exact``: the most model calls for one image at one level.

    Returns:
        z at the noisiest level.

    Raises:
        InversionError: for a sampler or solver that is not served.
    """
    name = function.__name__.removeprefix("sample_")
    served = kin(name, solver)[0]
    if served != name:
        raise InversionError(f"sampler: {name!r} is inverted ({solver}) as {served!r}")
    run = _Run(model, x, levels, function, CALLS[name], prediction, visit)
    if solver == "reverse":
        return run.reverse()
    return run.joint(tolerance, max_calls) if name in JOINT else run.exact(tolerance, max_calls)


def _check_finite(values: Tensor, index: int) -> None:
    """Refuses a walk that has come to no numbers: half precision overflows, or somebody's change of the model."""
    if not math.isfinite(values.abs().max()):
        raise InversionError(f"the model's answers on the way to step {index} are not finite numbers (NaN or infinite)")


def unconverged(walked: Sequence[Level]) -> list[str]:
    """A sentence for each level at which images did not reach the tolerance."""
    return [
        f"step {level.index} (sigma {level.sigma:.4g}): {int((~level.converged).sum())} of {len(level.converged)} "
        f"images not converged, residual {float(level.residual.max()):.2g}"
        for level in walked
        if level.residual is not None and not level.converged.all()
    ]


def extrapolated(past: Sequence[tuple[float, Tensor]], sigma: float) -> Tensor:
    """D at a level from those of the two levels below it, newest first, linearly in log sigma."""
    (s0, d0), (s1, d1) = past[0], past[-1]
    return d0 if s0 == s1 else torch.lerp(d1, d0, math.log(sigma / s1) / math.log(s0 / s1))


class Step:
    """A sampler's step from one level, as what it misses (:mod:`.fixedpoint`'s F) and where to begin looking."""

    def __init__(
        self, denoise: Callable[..., Tensor], function: Callable[..., Tensor], sigmas: Tensor, weight: float | None
    ) -> None:
        """The step from ``sigmas[0]`` to ``sigmas[1]``.

        Arguments:
            denoise: ``(x, sigma, stage, images) -> D``; stage counts the step's calls.
            function: The sampler's.
            sigmas: Of its start and its end, like the states.
            weight: D's in a step of one call, :math:`(1 - w) x + w D`; None for others.
        """
        self._denoise, self._function, self._sigmas, self._weight = denoise, function, sigmas, weight

    def onto(self, y: Tensor) -> Evaluate:
        """F for some images of the batch, with the D and the model calls of its evaluation."""
        level = self._sigmas[0].expand(len(y))

        def evaluate(x: Tensor, force: Tensor, images: list[int]) -> tuple[Tensor, int]:
            chosen = None if len(images) == len(y) else torch.tensor(images)
            missed = force.view_as(x)
            if self._weight is not None:
                d = self._denoise(x, level[: len(x)], 0, chosen)
                torch.lerp(x, d, self._weight, out=missed).sub_(some(y, images))
                return d, 1
            estimates: list[Tensor] = []

            def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
                estimates.append(self._denoise(x, sigma, len(estimates), chosen))
                return estimates[-1]

            reached = self._function(denoise, x, self._sigmas, extra_args={}, disable=True)
            torch.sub(reached, some(y, images), out=missed)
            return estimates[0], len(estimates)

        return evaluate

    def predict(self, y: Tensor, sigma: float, past: list[tuple[float, Tensor]], x: Tensor) -> None:
        r"""Takes x to where to begin: the step solved for its start with D extrapolated, linearly in log sigma.

        With D given the sampler's step is affine in x, :math:`\mathrm{step}(x) = \alpha x + \gamma`.
        """
        if not past:
            x.copy_(y)
            return
        if self._weight is not None:
            torch.lerp(extrapolated(past, sigma), y, 1 / (1 - self._weight), out=x)
            return

        def said(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            return extrapolated(past, float(sigma[0]))

        def nothing(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            return 0 * x

        slope = self._function(nothing, y.new_ones(1, 1), self._sigmas, extra_args={}, disable=True).item()
        torch.add(y, y - self._function(said, y, self._sigmas, extra_args={}, disable=True), alpha=1 / slope, out=x)


class _Run:
    """One inversion: the sampler's function, and the model."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        levels: Levels,
        function: Callable[..., Tensor],
        calls_per_step: int,
        prediction: str,
        visit: Visit,
    ) -> None:
        self._model = model
        self._like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        self._source = x.detach()
        self._levels = levels
        self._schedule = levels.schedule.double()
        self._sigmas: list[float] = self._schedule.tolist()
        self._uploaded = uploaded(self._schedule.numpy(), self._like)
        self._function = function
        self._per_step = calls_per_step
        self._prediction = prediction
        self._visit = visit
        self._chunk = 2**31

    def _denoise(self, x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        denoised = self._model(x, sigma, call, images)
        return denoised.detach().to(self._like).contiguous()

    def _hand_over(self, index: int, z: Tensor, denoised: Tensor | None, **about: Any) -> None:
        shown = None if denoised is None else denoised.to(self._like)
        self._visit(Level(index, self._sigmas[index], z.to(self._like), shown, **about))

    def _hand_over_all(self, index: int, z: Tensor, denoised: Tensor | None, calls: Tensor, **about: Any) -> None:
        """The level and those that repeat its sigma, which have its state at no call."""
        for same in self._levels.visited:
            if self._sigmas[same] == self._sigmas[index]:
                self._hand_over(same, z, denoised, calls=calls, **about)
                calls = torch.zeros_like(calls)

    def _scale(self, sigma: Tensor) -> Tensor:
        """Standard deviation of noisy latents at a level, for latents of deviation 1; flow: of their larger part."""
        return torch.maximum(signal_scale(sigma, self._prediction), sigma)

    def reverse(self) -> Tensor:
        """The sampler's function over the ascending schedule, where the latents are: none is looked at on the way."""
        visited = self._rising()
        sigmas = self._schedule[visited]
        source = (self._source.cpu() if self._source.device.type == "mps" else self._source).double()  # mps has none
        mirrored = iter(self._mirrored(visited))

        def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            self._count += 1
            return self._model(x.to(self._like), sigma.to(self._like), next(mirrored), None).detach().to(source)

        def callback(info: Mapping[str, Any]) -> None:
            self._reversed(visited[info["i"]], info["x"], info["denoised"])

        self._count = 0
        part = 1 - float(self._schedule[-1] / sigmas[0])
        z = source + part * (source - denoise(source, source.new_full((len(source),), float(sigmas[0]))))
        if len(visited) > 1:
            z = self._function(denoise, z, sigmas.to(source), extra_args={}, callback=callback, disable=True)
        _check_finite(z, visited[-1])
        self._reversed(visited[-1], z, None)
        return z.to(self._like)

    def _rising(self) -> list[int]:
        """The visited levels without those that repeat a sigma, least noisy first."""
        visited = self._levels.visited
        return [i for i in visited if i + 1 > visited[0] or self._sigmas[i] > self._sigmas[i + 1]]

    def _reversed(self, index: int, z: Tensor, denoised: Tensor | None) -> None:
        calls, self._count = torch.full((len(z),), self._count), 0
        self._hand_over_all(index, z, denoised, calls, residual=None, converged=torch.ones(len(z), dtype=torch.bool))

    def _mirrored(self, visited: list[int]) -> Iterator[int]:
        """The forward call of each model call of :meth:`reverse`: that at its sigma, or at its step's second stage."""
        start, per_step = self._levels.visited[-1], self._per_step
        yield per_step * (visited[0] - start)
        for index, above in zip(visited, visited[1:]):
            yield per_step * (index - start)
            if per_step == 2:
                midpoint = self._function.__name__ == "sample_dpm_2"
                yield per_step * (above - start) + (1 if midpoint else 0)

    def exact(self, tolerance: float, max_calls: int) -> Tensor:
        """The states that the sampler's own steps map onto one another and onto the source."""
        y = self._source.to(self._like).contiguous()
        past: list[tuple[float, Tensor]] = []
        scales = self._scale(self._schedule).tolist()
        solver = Solver(y, tolerance, max_calls)
        for index in self._levels.visited:
            above, below = self._sigmas[index : index + 2]
            if above > below:
                step = self._step(index, 1 - below / above if self._per_step == 1 else None)  # of one call: Euler
                begin = partial(step.predict, y, above, past)
                solved = solver.solve(step.onto(y), begin, above, below, scales[index])
                _check_finite(solved.residual, index)
                past = [(above, solved.denoised), *past][:2]
            else:  # a level that repeats the one below: the same state, no call
                solved = Solved(y, past[0][1], torch.zeros(len(y)).double(), torch.zeros(len(y)).int())
            about = {"residual": solved.residual, "calls": solved.calls, "converged": solved.residual <= tolerance}
            self._hand_over(index, solved.x, solved.denoised, **about)
            y = solved.x
        return y

    def _step(self, index: int, weight: float | None) -> Step:
        first = self._per_step * (index - self._levels.visited[-1])

        def denoise(x: Tensor, sigma: Tensor, stage: int, images: Tensor | None) -> Tensor:
            return self._denoise(x, sigma, first + stage, images)

        return Step(denoise, self._function, self._uploaded[index : index + 2], weight)

    def joint(self, tolerance: float, max_calls: int) -> Tensor:
        """All levels at once, for a step that also looks at the answer one level above."""
        rising, start = self._rising(), self._levels.visited[-1]
        sigmas = self._schedule[[rising[0] + 1, *rising]]
        source, scales = self._source.to(self._like).contiguous(), self._scale(sigmas[1:])

        def answer(x: Tensor, places: list[int], images: list[int]) -> Tensor:
            return self._answers(x, sigmas[1:][places], [rising[place] - start for place in places], images)

        first = None
        if sigmas[0] == 0:
            solver = Solver(source, tolerance, max_calls)
            step = self._step(rising[0], 1.0)
            begin = partial(step.predict, source, float(sigmas[1]), [])
            first = solver.solve(step.onto(source), begin, float(sigmas[1]), 0.0, float(scales[0]))
        made = Joint(factors(self._function, sigmas.flip(0)), answer, source, sigmas[1:], scales)
        made.solve(first, tolerance, max_calls)
        _check_finite(made.x[-1], rising[-1])
        residuals, calls = torch.from_numpy(made.residual), torch.from_numpy(made.calls).int()
        for index, x, d, residual, spent in zip(rising, made.x, made.d, residuals, calls):
            about = {"residual": residual, "converged": residual <= tolerance}
            self._hand_over_all(index, x.view_as(source), d.view_as(source), spent, **about)
        return made.x[-1].view_as(source)

    def _answers(self, x: Tensor, sigmas: Tensor, calls: list[int], images: list[int]) -> Tensor:
        """D of states of several levels, sorted by call: together where the model takes that, else by level."""
        stacked = getattr(self._model, "stacked", None)
        if stacked is not None:
            return self._in_chunks(stacked, x, uploaded(sigmas.numpy(), x), torch.tensor(calls), torch.tensor(images))
        answers: list[Tensor] = []
        for call in sorted(set(calls), reverse=True):
            at = slice(calls.index(call), calls.index(call) + calls.count(call))
            chosen = None if calls.count(call) == len(self._source) else torch.tensor(images[at])
            answers.append(self._denoise(x[at], uploaded(sigmas[at].numpy(), x), call, chosen))
        return torch.cat(answers) if len(answers) > 1 else answers[0]

    def _in_chunks(self, stacked: Callable[..., Tensor], x: Tensor, *about: Tensor) -> Tensor:
        """The model's answers in batches as large as have fitted its memory so far."""
        answers: list[Tensor] = []
        begun = 0
        while begun < len(x):
            part = slice(begun, begun + self._chunk)
            try:
                answers.append(stacked(x[part], *(each[part] for each in about)).detach().to(self._like))
            except torch.cuda.OutOfMemoryError:
                tried = len(x[part])
                if tried == 1:
                    raise
                self._chunk = tried // 2
            else:
                begun += self._chunk
        return torch.cat(answers)
