r"""Inversion: the model walks its own schedule backwards, from a picture to the noise it is made from.

Two solvers, over the same k-diffusion samplers:

* ``reverse`` runs the sampler over the ascending schedule :math:`s_{n-1} < \dots < s_e` (ComfyUI_Noise's
  Unsampler, FlipSigmas): the probability-flow ODE integrated upwards. The first step, from 0 to
  :math:`s_{n-1}`, is one Euler step with D evaluated at :math:`s_{n-1}`: :math:`z = x + (x - D(x; s_{n-1}))`.
* ``exact`` finds at each level the state x that the sampler's *own step* maps onto the present one, y:

  .. math:: F(x) = \mathrm{step}_i(x) - y = 0, \quad
      \text{Euler: } \mathrm{step}_i(x) = x - (s_i - s_{i+1}) \frac{x - D(x; s_i)}{s_i}

  by Anderson-accelerated fixed-point iteration (Walker & Ni 2011), started from what the solved levels
  predict. Sampling again then gives the source. The step is taken by the sampler's function itself, so
  every deterministic one-step sampler can be inverted.

The sampler's last step maps x at :math:`s_{n-1}` to :math:`D(x; s_{n-1})`, whose range need not hold the
source; ``exact`` gives the best it found, and its residual says how good that is.

Sigma is in the model's space; flow models obey the same equations (k-diffusion's :math:`d = (x - D) / s` is
their velocity). The solver's own arithmetic is float64 on the CPU: latents are small beside a model call,
and not every device has float64. The model sees float32, or the latent's dtype if that is wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .noising import append_dims, signal_scale
from .schedule import Levels

SOLVERS = ("reverse", "exact")
CALLS = {"euler": 1, "heun": 2, "dpm_2": 2, "dpmpp_2m": 1, "lms": 1}
"""Every deterministic k-diffusion sampler with a schedule, and the model calls of one of its steps."""

EXACT = ("euler", "heun", "dpm_2")
"""Those whose step depends on nothing but its start, which ``exact`` inverts."""

KIN = {
    "euler_ancestral": "euler",
    "dpm_2_ancestral": "dpm_2",
    "dpmpp_2s_ancestral": "dpmpp_2m",
    "dpmpp_sde": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m",
    "dpmpp_3m_sde": "dpmpp_2m",
}
"""Samplers that add noise, and the deterministic one that solves the same equation in the same way."""

MEMORY = 3
SAFETY = 3.0
PATIENCE = 4


class Model(Protocol):
    """A guided denoiser: ``model(x, sigma, call, images) -> D(x; sigma)``.

    x has shape (b, C, [T,] H, W), sigma (b). ``call`` numbers the model calls of the sampler's forward run
    from the noisiest visited level down, from 0 (step i of a two-call sampler makes calls 2 i and 2 i + 1):
    it is the forward call that this one mirrors, by which hosts look up prompt editing, the refiner and the
    negative guidance minimum sigma. ``images`` with shape (b) are the batch's images that x holds; None is all.
    """

    def __call__(self, x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor: ...


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
        residual: RMS of step(z) minus the state below, over the standard deviation of noisy latents at this
            level (:math:`\sqrt{1 + s^2}`; flow: 1), with shape (B); None under ``reverse``, which measures none.
            A z that was accepted without another call has the residual its convergence rate predicts.
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
    if name not in served:
        name = "euler"
    if name == sampler:
        return name, None
    why = "adds noise at each step" if sampler in KIN else "looks back over several steps"
    return name, f"{sampler} {why}: inverted ({solver}) as {name}"


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
    return run.reverse() if solver == "reverse" else run.exact(tolerance, max_calls)


def unconverged(walked: list[Level]) -> list[str]:
    """A sentence for each level at which images did not reach the tolerance."""
    return [
        f"step {level.index} (sigma {level.sigma:.4g}): {int((~level.converged).sum())} of {len(level.converged)} "
        f"images not converged, residual {float(level.residual.max()):.2g}"
        for level in walked
        if level.residual is not None and not level.converged.all()
    ]


class _Run:
    """One inversion: the sampler's function on float64 states on the CPU, the model where it lives."""

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
        self._source = x.detach().cpu().double()
        self._levels = levels
        self._schedule = levels.schedule.double()
        self._function = function
        self._per_step = calls_per_step
        self._prediction = prediction
        self._visit = visit

    def _denoise(self, x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        denoised = self._model(x.to(self._like), sigma.to(self._like), call, images)
        return denoised.detach().cpu().double()

    def _hand_over(self, index: int, z: Tensor, denoised: Tensor | None, **about: Any) -> None:
        shown = None if denoised is None else denoised.to(self._like)
        self._visit(Level(index, float(self._schedule[index]), z.to(self._like), shown, **about))

    def _scale(self, sigma: Tensor) -> Tensor:
        """Standard deviation of noisy latents at a level."""
        return torch.hypot(signal_scale(sigma, self._prediction), sigma) if self._prediction != "flow" else sigma * 0 + 1

    def reverse(self) -> Tensor:
        """The sampler's function over the ascending schedule."""
        visited = self._rising()
        sigmas = self._schedule[visited]
        self._count = 0
        ones = sigmas.new_ones(len(self._source))
        first = self._mirrored(sigmas[0])
        z = self._source + (self._source - self._denoise(self._source, sigmas[0] * ones, first))
        self._count = 1

        def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            self._count += 1
            return self._denoise(x, sigma, self._mirrored(sigma[0]))

        def callback(info: Mapping[str, Any]) -> None:
            self._reversed(visited[info["i"]], info["x"], info["denoised"])

        if len(visited) > 1:
            z = self._function(denoise, z, sigmas, extra_args={}, callback=callback, disable=True)
        self._reversed(visited[-1], z, None)
        return z.to(self._like)

    def _rising(self) -> list[int]:
        """The visited levels without those that repeat a sigma, least noisy first."""
        visited = self._levels.visited
        return [i for i in visited if i + 1 > visited[0] or self._schedule[i] > self._schedule[i + 1]]

    def _reversed(self, index: int, z: Tensor, denoised: Tensor | None) -> None:
        about = {"residual": None, "converged": torch.ones(len(z), dtype=torch.bool)}
        self._hand_over(index, z, denoised, calls=torch.full((len(z),), self._count), **about)
        self._count = 0

    def _mirrored(self, sigma: Tensor) -> int:
        """The forward call at a sigma; between two levels, the second call of the step between them."""
        above = int((self._schedule > sigma * (1 + 1e-9)).sum())  # levels noisier than this one
        at_level = bool(torch.isclose(self._schedule[above], sigma, rtol=1e-9))
        steps = above - self._levels.visited[-1]
        return self._per_step * steps if at_level else self._per_step * steps - 1

    def exact(self, tolerance: float, max_calls: int) -> Tensor:
        """The states that the sampler's own steps map onto one another and onto the source."""
        y, past = self._source, []
        for index in self._levels.visited:
            sigma = self._schedule[index]
            guess = self._predicted(y, index, past)
            solver = _Solver(self._step_onto(index, y), float(self._scale(sigma)), tolerance, max_calls)
            solved = solver.solve(y, guess)
            past = [(sigma, solved.denoised), *past][:2]
            self._hand_over(
                index,
                solved.x,
                solved.denoised,
                residual=solved.residual,
                calls=solved.calls,
                converged=solved.residual <= tolerance,
            )
            y = solved.x
        return y.to(self._like)

    def _step_onto(self, index: int, y: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]:
        """``(x, images) -> (step(x) - y, D(x), model calls)`` for some images of the batch."""
        sigmas = self._schedule[index : index + 2]
        first = self._per_step * (index - self._levels.visited[-1])

        def evaluate(x: Tensor, images: Tensor) -> tuple[Tensor, Tensor, int]:
            some = None if len(images) == len(y) else images
            estimates: list[Tensor] = []

            def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
                estimates.append(self._denoise(x, sigma, first + len(estimates), some))
                return estimates[-1]

            reached = self._function(denoise, x, sigmas, extra_args={}, disable=True)
            return reached - y[images], estimates[0], len(estimates)

        return evaluate

    def _predicted(self, y: Tensor, index: int, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Where to begin: D extrapolated linearly in log sigma, in the Euler step's closed form."""
        if not past:
            return y
        s, below = self._schedule[index], self._schedule[index + 1]
        denoised = past[0][1]
        if len(past) > 1:
            (s0, d0), (s1, d1) = past
            denoised = d0 + (s / s0).log() / (s0 / s1).log() * (d0 - d1)
        ratio = s / below
        return ratio * y + (1 - ratio) * denoised


@dataclass
class _Solved:
    x: Tensor
    denoised: Tensor
    residual: Tensor
    calls: Tensor


class _Solver:
    """Anderson-accelerated fixed-point iteration on F(x) = 0, for each image of a batch by itself."""

    def __init__(
        self,
        evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]],
        scale: float,
        tolerance: float,
        max_calls: int,
    ) -> None:
        self._evaluate = evaluate
        self._scale = scale
        self._tolerance = tolerance
        self._max_calls = max_calls

    def _rms(self, x: Tensor) -> Tensor:
        return x.flatten(1).square().mean(1).sqrt() / self._scale

    def solve(self, y: Tensor, guess: Tensor) -> _Solved:
        """Each image's x, the residual it has, and the calls it took."""
        best = _Solved(guess.clone(), guess.clone(), torch.full((len(y),), torch.inf).double(), torch.zeros(len(y)).int())
        images, x = torch.arange(len(y)), guess
        steps: list[Tensor] = []
        changes: list[Tensor] = []
        before: tuple[Tensor, Tensor] | None = None
        rates = torch.ones(len(y)).double()
        stale = torch.zeros(len(y)).int()
        while len(images):
            force, denoised, calls = self._evaluate(x, images)
            residual = self._rms(force)
            best.calls[images] += calls
            better = residual < best.residual[images]
            stale[images] = torch.where(residual < 0.5 * best.residual[images], 0, stale[images] + 1).int()
            for kept, new in ((best.x, x), (best.denoised, denoised), (best.residual, residual)):
                kept[images[better]] = new[better]
            if before is not None:
                steps = [*steps, x - before[0]][-MEMORY:]
                changes = [*changes, force - before[1]][-MEMORY:]
                rates[images] = (residual / self._rms(before[1])).nan_to_num(1.0)
            following = x - _mixed(force, steps, changes)
            predicted = SAFETY * rates[images] * residual
            taken = (predicted <= self._tolerance) & (residual > self._tolerance)
            best.x[images[taken]], best.residual[images[taken]] = following[taken], predicted[taken]
            best.denoised[images[taken]] = denoised[taken]
            done = taken | (residual <= self._tolerance) | (stale[images] >= PATIENCE)
            done |= best.calls[images] + calls > self._max_calls
            going = ~done
            before = (x[going], force[going])
            steps, changes = [s[going] for s in steps], [c[going] for c in changes]
            images, x = images[going], following[going]
        return best


def _mixed(force: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """Anderson's step: the secants' least squares for what they span, the plain iteration for the rest."""
    if not steps:
        return force
    flat = force.flatten(1)
    dx, df = (torch.stack([t.flatten(1) for t in history], 2) for history in (steps, changes))
    norms = df.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    dx, df = dx / norms, df / norms
    gram = df.mT @ df
    ridge = 1e-12 * torch.eye(gram.shape[-1]).double()
    weights = torch.linalg.solve(gram + ridge, df.mT @ flat.unsqueeze(2))
    move = flat + ((dx - df) @ weights).squeeze(2)
    return move.reshape(force.shape)
