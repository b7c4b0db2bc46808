r"""Inversion: the model walks its own schedule backwards, from a picture to the noise it is made from.

Two solvers, over the same k-diffusion samplers:

* ``reverse`` runs the sampler over the ascending schedule :math:`s_{n-1} < \dots < s_e` (ComfyUI_Noise's
  Unsampler, FlipSigmas): the probability-flow ODE integrated upwards. The first step, from 0 to
  :math:`s_{n-1}`, is one Euler step with D evaluated at :math:`s_{n-1}`: :math:`z = x + (x - D(x; s_{n-1}))`.
* ``exact`` finds at each level the state x that the sampler's *own step* maps onto the present one, y:

  .. math:: F(x) = \mathrm{step}_i(x) - y = 0, \quad
      \text{Euler: } \mathrm{step}_i(x) = x - (s_i - s_{i+1}) \frac{x - D(x; s_i)}{s_i}

  by Anderson-accelerated fixed-point iteration (Walker & Ni 2011), started from what the solved levels
  predict, with what they taught about the model's Jacobian. Sampling again then gives the source. The step is
  taken by the sampler's own function, so every deterministic one-step sampler is served by one solver. DPM++ 2M,
  whose step also looks at D one level above, is solved for all levels jointly, in sweeps: several times the
  calls, the levels handed over at the end, and under strong guidance not always converging (the images say so).
  Each image of a batch converges by itself, and costs no call once it has.

The sampler's last step maps x at :math:`s_{n-1}` to :math:`D(x; s_{n-1})`, whose range need not hold the
source. The convention: it is solved like every other step, from x = source, and where it converges no
further, or only to more noise than that level has (three times its sigma), the best x stays. Its residual says
what is lost, and the round trip loses about that much.
Half-precision models converge as far as their rounding lets them: the solver stops where it gets no nearer.

Sigma is in the model's space; flow models obey the same equations (k-diffusion's :math:`d = (x - D) / s` is
their velocity). The solvers' own arithmetic is float64; that of ``exact`` is on the CPU, where each iteration's
residual has to be looked at anyway, while ``reverse`` never waits for the device. The model sees float32, or the latent's dtype if that is wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .noising import append_dims, signal_scale
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

MEMORY, CARRIED = 6, 3
"""Secant pairs kept for each image at a level, and taken along to the next."""

CAUTION, LEAST_RATE = 3.0, 0.01
"""An x is accepted without a call to check it if the residual would do at CAUTION times the worst rate of
convergence seen at its level, or LEAST_RATE."""

IMPLAUSIBLE = 3.0
"""The most noise, in units of the first level's sigma, that the last step's x may hold: beyond, no sampler goes."""

PROGRESS, PATIENCE = 0.8, 6
"""Evaluations without a residual below PROGRESS of the best after which a level is left as it is; halfway
there the solver begins again from the best."""


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
        name = "euler"  # a sampler with noise gains nothing from the joint solver's many calls
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
    if solver == "reverse":
        return run.reverse()
    return run.joint(tolerance, max_calls) if name in JOINT else run.exact(tolerance, max_calls)


def unconverged(walked: Sequence[Level]) -> list[str]:
    """A sentence for each level at which images did not reach the tolerance."""
    return [
        f"step {level.index} (sigma {level.sigma:.4g}): {int((~level.converged).sum())} of {len(level.converged)} "
        f"images not converged, residual {float(level.residual.max()):.2g}"
        for level in walked
        if level.residual is not None and not level.converged.all()
    ]


class _Run:
    """One inversion: the sampler's function on float64 states, the model where it lives."""

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
        """Standard deviation of noisy latents at a level, for latents of deviation 1; flow: of their larger part."""
        return torch.maximum(signal_scale(sigma, self._prediction), sigma)

    def reverse(self) -> Tensor:
        """The sampler's function over the ascending schedule, where the latents are: nothing here waits for the device."""
        visited = self._rising()
        sigmas = self._schedule[visited]
        source = self._source.to("cpu" if self._like.device.type == "mps" else self._like.device)  # which lacks float64
        mirrored = iter(self._mirrored(visited))

        def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            self._count += 1
            return self._model(x.to(self._like), sigma.to(self._like), next(mirrored), None).detach().to(source)

        def callback(info: Mapping[str, Any]) -> None:
            self._reversed(visited[info["i"]], info["x"], info["denoised"])

        self._count = 0
        z = source + (source - denoise(source, source.new_full((len(source),), float(sigmas[0]))))
        if len(visited) > 1:
            z = self._function(denoise, z, sigmas.to(source), extra_args={}, callback=callback, disable=True)
        self._reversed(visited[-1], z, None)
        return z.to(self._like)

    def _rising(self) -> list[int]:
        """The visited levels without those that repeat a sigma, least noisy first."""
        visited = self._levels.visited
        return [i for i in visited if i + 1 > visited[0] or self._schedule[i] > self._schedule[i + 1]]

    def _reversed(self, index: int, z: Tensor, denoised: Tensor | None) -> None:
        about = {"residual": None, "converged": torch.ones(len(z), dtype=torch.bool)}
        for same in self._levels.visited:
            if self._schedule[same] == self._schedule[index]:  # repeats of a level have its state, at no call
                self._hand_over(same, z, denoised, calls=torch.full((len(z),), self._count), **about)
                self._count = 0

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
        y, past = self._source, []
        solver = _Solver(self._source, tolerance, max_calls)
        for index in self._levels.visited:
            sigmas = self._schedule[index : index + 2]
            if sigmas[0] > sigmas[1]:
                scale = float(self._scale(sigmas[0]))
                solved = solver.solve(self._step_onto(index, y), self._predicted(y, sigmas, past), sigmas, scale)
                past = [(sigmas[0], solved.denoised), *past][:2]
            else:  # a level that repeats the one below: the same state, no call
                solved = _Solved(y, past[0][1], torch.zeros(len(y)).double(), torch.zeros(len(y)).int())
            about = {"residual": solved.residual, "calls": solved.calls, "converged": solved.residual <= tolerance}
            self._hand_over(index, solved.x, solved.denoised, **about)
            y = solved.x
        return y.to(self._like)

    def _step_onto(self, index: int, y: Tensor) -> Evaluate:
        """F for some images of the batch, with the D and the model calls of its evaluation."""
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

    def _predicted(self, y: Tensor, sigmas: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Where to begin: the step solved for its start with D extrapolated, linearly in log sigma.

        With D given the sampler's step is affine in x, :math:`\\mathrm{step}(x) = \\alpha x + \\gamma`.
        """
        if not past:
            return y

        def extrapolated(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            return _extrapolated(past, sigma[0], x)

        one = torch.ones(1, 1).double()
        slope = self._function(lambda x, sigma, **_: 0 * x, one, sigmas, extra_args={}, disable=True)
        return y + (y - self._function(extrapolated, y, sigmas, extra_args={}, disable=True)) / slope.item()


    def joint(self, tolerance: float, max_calls: int) -> Tensor:
        r"""All levels at once, for a step that also depends on the model's answer one level above.

        .. math:: y = \alpha_i x_i + \beta_i D(x_i; s_i) + \gamma_i D(x_{i-1}; s_{i-1})

        Sweeps over the levels, least noisy first: each is solved with the D above that the sweep before left,
        moved by what this sweep has changed at the level below. A level's residual counts both what its own
        equation misses and what the D above has changed since.
        """
        rising = self._rising()
        steps = [_Affine.of(self._function, self._around(rising, place)) for place in range(len(rising))]
        size = len(self._source)
        solvers = [_Solver(self._source, tolerance, max_calls, CARRIED) for _ in rising]
        x: list[Tensor] = []
        d: list[Tensor] = []
        calls = torch.zeros(len(rising), size).int()
        residual = torch.full((len(rising), size), torch.inf).double()
        worst, stale = torch.full((size,), torch.inf).double(), torch.zeros(size).int()
        images, sweep = torch.arange(size), 0
        while len(images):
            y, used, before = self._source, [], [t.clone() for t in d]
            for place, (index, step) in enumerate(zip(rising, steps)):
                sigmas, scale = self._schedule[index : index + 2], float(self._scale(self._schedule[index]))
                past = [(self._schedule[rising[k]], d[k]) for k in range(place - 1, max(-1, place - 3), -1)]
                if sweep == 0:
                    above = _extrapolated(past, self._schedule[rising[min(place + 1, len(rising) - 1)]], y)
                    here = _extrapolated(past, sigmas[0], y)
                    guess = (y - step.here * here - step.above * above) / step.start if past else y
                    x, d = [*x, guess], [*d, here]
                else:
                    above = d[place + 1] if place + 1 < len(d) else y
                    above = above + d[place - 1] - before[place - 1] if place > 1 else above
                used.append(above)
                if place > 0 or sweep == 0:  # nothing above moves the last step
                    solver = solvers[place]
                    solver.tolerance = max(tolerance / 3, 1e-2 * 0.2**sweep) if place else tolerance
                    solver.max_calls = max_calls - int(calls[place, images].max())
                    call = index - self._levels.visited[-1]
                    solved = solver.solve(self._with(step, sigmas, above, y, call), x[place], sigmas, scale, images)
                    x[place] = _column_of(images, solved.x, x[place])
                    answer = (y - step.start * x[place] - step.above * above) / step.here
                    d[place] = _column_of(images, answer, d[place])
                    calls[place] += solved.calls
                    residual[place, images] = solved.residual[images]
                y = x[place]
            moved = [step.above * (d[k + 1] - used[k]) for k, step in enumerate(steps[:-1])]
            total = residual.clone()
            for k, change in enumerate(moved):
                total[k] += change.flatten(1).square().mean(1).sqrt() / float(self._scale(self._schedule[rising[k]]))
            # what the last step misses stays, however often the others are swept
            now = total[1:].amax(0) if len(rising) > 1 else torch.zeros(size).double()
            stale[images] = torch.where(now < PROGRESS * worst, 0, stale + 1)[images].int()
            worst = torch.minimum(worst, now)
            final = total if sweep == 0 else torch.where(_among(images, size), total, final)
            going = (now > tolerance) & (stale < PATIENCE // 2) & (calls.amax(0) < max_calls)
            images, sweep = images[going[images]], sweep + 1
        for place, index in enumerate(rising):
            about = {"residual": final[place], "calls": calls[place], "converged": final[place] <= tolerance}
            for same in self._levels.visited:
                if self._schedule[same] == self._schedule[index]:
                    self._hand_over(same, x[place], d[place], **about)
                    about["calls"] = torch.zeros_like(calls[place])
        return x[-1].to(self._like)

    def _around(self, rising: list[int], place: int) -> Tensor:
        """The sigmas of the level above, this one and the one below; without one above for the noisiest."""
        above = [self._schedule[rising[place + 1]]] if place + 1 < len(rising) else []
        return torch.stack([*above, self._schedule[rising[place]], self._schedule[rising[place] + 1]])

    def _with(self, step: _Affine, sigmas: Tensor, above: Tensor, y: Tensor, call: int) -> Evaluate:
        """F for some images, with the D above given."""

        def evaluate(x: Tensor, images: Tensor) -> tuple[Tensor, Tensor, int]:
            some = None if len(images) == len(y) else images
            d = self._denoise(x, sigmas[0].expand(len(x)), call, some)
            return step.start * x + step.here * d + step.above * above[images] - y[images], d, 1

        return evaluate


@dataclass(frozen=True)
class _Affine:
    """A step's factors of its start, of D there and of D one level above, asked of the sampler's function."""

    start: float
    here: float
    above: float

    @staticmethod
    def of(function: Callable[..., Tensor], sigmas: Tensor) -> _Affine:
        """``sigmas``: of the level above if there is one, the start's and the end's."""

        def ends(x: float, *answers: float) -> float:
            said = iter(answers)

            def denoise(z: Tensor, sigma: Tensor, **_: Any) -> Tensor:
                return torch.full_like(z, next(said))

            return float(function(denoise, torch.full((1, 1), x).double(), sigmas, extra_args={}, disable=True))

        if len(sigmas) == 2:
            return _Affine(ends(1, 0), ends(0, 1), 0.0)
        into = float(function(lambda z, sigma, **_: 0 * z, torch.ones(1, 1).double(), sigmas[:2], disable=True))
        shift = float(function(lambda z, sigma, **_: 0 * z + 1, torch.zeros(1, 1).double(), sigmas[:2], disable=True))
        start = ends(1 / into, 0, 0)
        return _Affine(start, ends(0, 0, 1), ends(-shift / into, 1, 0))


def _extrapolated(past: Sequence[tuple[Tensor, Tensor]], sigma: Tensor, otherwise: Tensor) -> Tensor:
    """D at a level from those of the two levels below it, newest first, linearly in log sigma."""
    if not past:
        return otherwise
    (s0, d0), (s1, d1) = past[0], past[-1]
    return d0 if s0 == s1 else d0 + (sigma / s0).log() / (s0 / s1).log() * (d0 - d1)


def _among(images: Tensor, size: int) -> Tensor:
    return torch.isin(torch.arange(size), images)


def _column_of(images: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for these images, ``old`` for the others."""
    return torch.where(_column(_among(images, len(old)), old), new, old)


Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]
"""``(x, images) -> (F(x), D(x), model calls)``, x holding the batch's images of these numbers."""


@dataclass
class _Solved:
    x: Tensor
    denoised: Tensor
    residual: Tensor
    calls: Tensor


class _Solver:
    r"""Anderson acceleration on F(x) = 0 for each image of a batch by itself, level after level.

    What was learnt of the model's Jacobian J at a level is carried to the next: a secant pair (dx, dF) there
    is a pair (dx, J dx) with :math:`dF = (1 - c) dx + c\, J dx`, :math:`c = 1 - s_{i+1} / s_i`, and along dx
    the model is taken for a Gaussian prior's, :math:`J = v / (v + s^2)`.
    """

    def __init__(self, source: Tensor, tolerance: float, max_calls: int, memory: int = MEMORY) -> None:
        self.tolerance = tolerance
        self.max_calls = max_calls
        self._memory = memory
        shape = (len(source), memory, source[0].numel())
        self._moves = torch.zeros(shape).double()
        self._answers = torch.zeros(shape).double()  # J dx
        self._count = torch.zeros(len(source)).long()  # pairs ever kept, of each image
        self._floor = torch.zeros(len(source)).double()  # the residual below which the model only gives noise
        self._sigma: Tensor | None = None

    def solve(
        self, evaluate: Evaluate, guess: Tensor, sigmas: Tensor, scale: float, images: Tensor | None = None
    ) -> _Solved:
        """Each image's x, D(x), residual, and the model calls it took; those of other images stay as guessed."""
        self._turn_to(sigmas[0])
        part = float(1 - sigmas[1] / sigmas[0])
        enough = torch.maximum(2 * self._floor, torch.tensor(self.tolerance).double())
        reach = IMPLAUSIBLE * float(sigmas[0]) if sigmas[1] == 0 else torch.inf
        size = len(guess)
        best = _Solved(guess.clone(), guess.clone(), torch.full((size,), torch.inf).double(), torch.zeros(size).int())
        forces = torch.zeros_like(guess)  # F at the best x
        stale, rates = torch.zeros(size).int(), torch.full((size,), LEAST_RATE).double()
        images = torch.arange(size) if images is None else images
        x = guess[images]
        before: tuple[Tensor, Tensor, Tensor] | None = None
        while len(images):
            force, denoised, calls = evaluate(x, images)
            residual = force.flatten(1).square().mean(1).sqrt() / scale
            best.calls[images] += calls
            stale[images] = torch.where(residual < PROGRESS * best.residual[images], 0, stale[images] + 1).int()
            better = residual < best.residual[images]
            _keep(best, images[better], x[better], denoised[better], residual[better])
            forces[images[better]] = force[better]
            predicted = torch.full_like(residual, torch.inf)
            if before is not None:
                self._learn(images, x - before[0], force - before[1], part)
                rates[images] = torch.maximum(rates[images], residual / before[2])
                predicted = residual * CAUTION * rates[images]
            lost = stale[images] == PATIENCE // 2  # begin again from the best, with nothing learnt
            self._moves[images[lost]] = self._answers[images[lost]] = 0
            x, force = (torch.where(_column(lost, x), kept[images], now) for kept, now in ((best.x, x), (forces, force)))
            following = _within(reach, guess[images], x - self._step(images, force, part))
            done = residual <= enough[images]
            ahead = ~done & (predicted <= enough[images])
            _keep(best, images[ahead], following[ahead], denoised[ahead], predicted[ahead])
            stuck = ~done & ~ahead & (stale[images] >= PATIENCE)
            if sigmas[1] > 0:
                self._floor[images[stuck]] = best.residual[images[stuck]]
            going = ~(done | ahead | stuck | (best.calls[images] + calls > self.max_calls))
            before = (x[going], force[going], residual[going])
            images, x = images[going], following[going]
        return best

    def _turn_to(self, sigma: Tensor) -> None:
        """Forgets all but each image's newest pairs and moves those to a new level."""
        if self._sigma is not None:
            age = (self._count[:, None] - 1 - torch.arange(self._memory)) % self._memory
            self._moves[age >= CARRIED] = self._answers[age >= CARRIED] = 0
            slope = (self._moves * self._answers).sum(2) / self._moves.square().sum(2)
            variance = self._sigma**2 * slope / (1 - slope)
            turned = torch.where(slope > 0, variance / (variance + sigma**2) / slope, (self._sigma / sigma) ** 2)
            self._answers *= torch.where(slope < 1, turned, 1.0)[:, :, None]
        self._sigma = sigma

    def _learn(self, images: Tensor, move: Tensor, change: Tensor, part: float) -> None:
        slots = self._count[images] % self._memory
        self._moves[images, slots] = move.flatten(1)
        self._answers[images, slots] = (change - (1 - part) * move).flatten(1) / part
        self._count[images] += 1

    def _step(self, images: Tensor, force: Tensor, part: float) -> Tensor:
        """Anderson's step: by the pairs in what they span, a scaled plain iteration in the rest."""
        moves = self._moves[images].mT
        changes = (1 - part) * moves + part * self._answers[images].mT
        sizes = changes.norm(dim=1, keepdim=True)
        inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
        moves, changes = moves * inverse, changes * inverse
        flat = force.flatten(1)[:, :, None]
        weights = torch.linalg.pinv(changes.mT @ changes, rtol=1e-12, hermitian=True) @ (changes.mT @ flat)
        newest = (self._count[images] - 1) % self._memory
        speed = (moves * changes).sum(1)[torch.arange(len(images)), newest]
        speed = torch.where(speed > 0, speed.clamp(0.1, 2.0), 1.0)[:, None, None]
        return (speed * (flat - changes @ weights) + moves @ weights).reshape(force.shape)


def _within(reach: float, centre: Tensor, x: Tensor) -> Tensor:
    """x, pulled towards the centre where it is further than ``reach`` (RMS) from it."""
    away = (x - centre).flatten(1).square().mean(1).sqrt()
    return centre + _column((reach / away).clamp_max(1.0), x) * (x - centre) if reach < torch.inf else x


def _column(of: Tensor, like: Tensor) -> Tensor:
    return append_dims(of, like.ndim)


def _keep(best: _Solved, images: Tensor, x: Tensor, denoised: Tensor, residual: Tensor) -> None:
    best.x[images], best.denoised[images], best.residual[images] = x, denoised, residual
