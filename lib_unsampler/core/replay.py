r"""Replay: a picture as the noise of a stochastic sampler, exactly, so that another prompt edits it.

The edit-friendly noise space of Huberman-Spiegelglas et al. (CVPR 2024). Draw z at every level with
*independent* noise. A sampler's step is :math:`x_{i+1} = \mu_i(x_i) + c_i n_i`; choose

.. math:: x_0 = z_0, \quad n_i = \frac{z_{i+1} - \mu_i(x_i)}{c_i}, \quad x_{i+1} = \mu_i(x_i) + c_i n_i

going on from the x that replaying gives, not from z (a closed loop: each step mends the rounding of the
step before), and keep the residual :math:`r = source - x_{last}` of the last step, which has no noise.
Sampling again from :math:`x_0` with these noises repeats every x, and gives the source, bit for bit, at
any guidance scale; with another prompt it gives an edit that keeps the picture's structure.

The sampler's own function is run, unchanged, for recording as for replaying: :math:`\mu_i` and
:math:`c_i` (eta and s_noise in them) are never computed here. The recorder answers the function's call for
noise with an :class:`OpenNoise`, which keeps the factors it is multiplied by and is settled when it is
added to :math:`\mu_i`. So every sampler with the signature ``f(model, x, sigmas, ..., noise_sampler)``
whose noise is scaled and added is served, with as many model calls as it makes. One that asks for noise
on the way to a level between two of the schedule's (DPM++ SDE) is led through a fresh z at that level; where
the schedule ends above 0 the last step may have noise too, which leads to the source.

Which samplers qualify is no list but a rule, tried in a :mod:`~.rehearsal` before any model call: every step but
the last (and those between two equal levels) adds at least one noise, its factor above 0; every tensor is
finite; run again with these noises it repeats itself. Whether it also repeats itself from a later step on is
found in the same way, where a skip asks for it. A model that answers one question in two ways (token merging)
cannot give the picture back either: for one that may, one call is made twice.

In a host, inside a wrapper of ``p.sampler.func`` (``functools.wraps``; restore it first), with the host's
own mask out of its denoiser::

    def sampled(model, x, sigmas, **options):
        recording = record(function, source_model, sigmas, states, source, fresh, prediction, **options)
        return replay(function, model, sigmas, recording.like(x), skip, **options)

``options`` are the host's keywords (extra_args, callback, disable, eta, s_noise, solver_type); another
``extra_args`` for :func:`record` is the source prompt's; the host's ``noise_sampler`` is replaced.
With a mask, both models are ``embedded.masked(model, source, mask)``: outside the mask every state is then
the recorded one, whatever the prompt, and the result is the source.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .kept import InMemory, Store, finite
from .noising import add_noise
from .rehearsal import Around, RehearsalError, Sampler, StandIn, name_of, rehearse, waves

SAME = 2e-3
"""How far a repeated model call may be off, RMS by the level's sigma or 1: half precision's rounding, and no more."""


class ReplayError(RehearsalError):
    """A sampler, options or a schedule with which a picture cannot be replayed."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A batch of pictures as the noise of a sampler.

    Attributes:
        sampler: The name after ``sample_`` of the sampler's function.
        options: The function's numbers and words as they were (eta, s_noise, solver_type, ...).
        sigmas: The descending schedule it was recorded on, to where sampling ends, with shape (S + 1).
        states: x before each step, noisiest first, with shape (S, B, C, [T,] H, W).
        maps: The noises in the order the sampler asks for them, with shape (M, B, C, [T,] H, W).
        steps: The step, from 0, that each noise belongs to.
        residual: What the last step leaves to the source, with shape (B, C, [T,] H, W), in float64 on the
            CPU: a float32 one could not bring back a source much smaller than itself to its last bit.
    """

    sampler: str
    options: Mapping[str, float | str]
    sigmas: Tensor
    states: Tensor
    maps: Tensor
    steps: tuple[int, ...]
    residual: Tensor

    def __post_init__(self) -> None:
        shape = self.residual.shape
        if len(self.states) != len(self.sigmas) - 1 or self.states.shape[1:] != shape:
            raise ReplayError(f"states {tuple(self.states.shape)} do not fit residual {tuple(shape)} and the schedule")
        if len(self.maps) != len(self.steps) or self.maps.shape[1:] != shape:
            raise ReplayError(f"maps {tuple(self.maps.shape)} do not fit residual {tuple(shape)} and their steps")
        if list(self.steps) != sorted(self.steps) or not set(self.steps) <= set(range(len(self.states))):
            raise ReplayError(f"steps {self.steps} do not rise through those of {len(self.states)} states")

    def noises(self, skip: int) -> Callable[..., Tensor]:
        """The ``noise_sampler`` that gives them again from a step on."""
        return _Noises(self.sampler, [noise for noise, step in zip(self.maps, self.steps) if step >= skip])

    def like(self, x: Tensor) -> Recording:
        """The recording for a run from an x: on its device, a single picture repeated for its batch.

        Raises:
            ReplayError: if x is of another shape.
        """
        if self.residual.shape[1:] != x.shape[1:] or len(self.residual) not in (1, len(x)):
            raise ReplayError(f"maps: of latents {tuple(self.residual.shape)}, which do not fit {tuple(x.shape)}")
        states, maps = (t.to(x.device).expand(len(t), *x.shape) for t in (self.states, self.maps))
        return replace(self, states=states, maps=maps, residual=self.residual.expand(x.shape))


class _Noises:
    """A ``noise_sampler`` that gives chosen noises, one after the other."""

    def __init__(self, sampler: str, maps: Iterable[Tensor]) -> None:
        self._sampler, self._maps = sampler, iter(maps)

    def __call__(self, *_: Any) -> Tensor:
        noise = next(self._maps, None)
        if noise is None:
            raise ReplayError(f"maps: {self._sampler!r} asks for more noises than were recorded")
        return noise


def plain_options(function: Sampler, options: Mapping[str, Any]) -> dict[str, float | str]:
    """The numbers and words that a sampler runs with, its own defaults among them."""
    defaults = {k: p.default for k, p in inspect.signature(function).parameters.items() if k != "disable"}
    values = {name: options.get(name, default) for name, default in defaults.items()}
    return {k: v for k, v in values.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)}


def check_function(function: Sampler, sigmas: Tensor | None = None, **options: Any) -> None:
    """Raises ReplayError, by name, for a sampler that takes no noises, or with eta or s_noise 0.

    Where a schedule is given, also for one that does not replay there.
    """
    accepted = inspect.signature(function).parameters
    if "sigmas" not in accepted or "noise_sampler" not in accepted:
        raise ReplayError(
            f"sampler: {name_of(function)!r} adds no noise at its steps, which replay needs; "
            "choose an ancestral or SDE sampler, such as 'euler_ancestral' (Euler a)"
        )
    values = plain_options(function, options)
    for name in ("eta", "s_noise"):
        if values.get(name) == 0:
            raise ReplayError(f"{name}: 0 leaves {name_of(function)!r} without noise, which replay needs (above 0)")
    if sigmas is not None:
        rehearsed(function, None, sigmas, sigmas.new_zeros(1, 1, 1, 1), "eps", 0, **options)


class OpenNoise:
    """A noise not chosen yet: it keeps the factors it is multiplied by, until it is added to mu.

    Of a tensor's attributes it has the shape, the type and the place.
    """

    def __init__(self, asked: Asked, factors: tuple[Any, ...] = ()) -> None:
        self._asked = asked
        self._factors = factors
        self.shape, self.ndim, self.dtype, self.device = asked.z.shape, asked.z.ndim, asked.z.dtype, asked.z.device

    def __mul__(self, factor: Any) -> OpenNoise:
        return OpenNoise(self._asked, (*self._factors, factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> OpenNoise:
        return OpenNoise(self._asked, (*self._factors, 1 / factor))

    def __radd__(self, mu: Tensor) -> Tensor:
        return self._asked.settle(mu, self._factors)

    __add__ = __radd__


class Asked:
    """A sampler's call for one noise, that is to lead to z; added twice, it is the same noise.

    Attributes:
        z: Where it leads.
        noise: What it was settled to, when it was first added; None before.
        scaled: Whether its factor was above 0 everywhere.
    """

    def __init__(self, z: Tensor) -> None:
        self.z = z
        self.noise: Tensor | None = None
        self.scaled = False

    def settle(self, mu: Tensor, factors: tuple[Any, ...]) -> Tensor:
        """What is left of mu when the noise, times its factors, is added."""
        if self.noise is None:
            scale = math.prod(f if torch.as_tensor(f).numel() > 1 else float(f) for f in factors)
            self.scaled = bool((torch.as_tensor(scale).abs() > 0).all())
            # a repeated level takes no noise
            self.noise = (self.z.to(mu) - mu) / scale if self.scaled else torch.zeros_like(mu)
        noise = self.noise
        for factor in factors:  # in the order and rounding in which a chosen noise is scaled
            noise = noise * factor
        return mu + noise


class Recorder:
    """The ``noise_sampler`` and ``callback`` of a recording run."""

    def __init__(
        self,
        sigmas: Tensor,
        z: Tensor,
        source: Tensor,
        fresh: Iterator[Tensor],
        prediction: str,
        states: Store,
        maps: Store,
    ) -> None:
        """See :func:`record`; the stores take what is recorded."""
        self._sigmas = sigmas
        self._z = z
        self._source = source
        self._fresh = fresh
        self._prediction = prediction
        self._states, self._maps = states, maps
        self._begun = 0
        self._open: list[Asked] = []
        self._settled: list[tuple[int, bool]] = []

    def callback(self, info: Mapping[str, Any]) -> None:
        """Called by the sampler once in each step, with the x before it."""
        self.close()
        self._states.add(info["x"])
        self._begun += 1

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> OpenNoise:
        """The noise of the step to ``sigma_next``, which is chosen when the sampler adds it."""
        asked = Asked(self._target(torch.as_tensor(sigma_next)))
        self._open.append(asked)
        return OpenNoise(asked)

    def close(self) -> None:
        """Keeps the noises of the step that is over, in the order in which they were asked for; 0 where one dropped."""
        for asked in self._open:
            self._maps.add(torch.zeros_like(self._source) if asked.noise is None else asked.noise)
            self._settled.append((self._begun - 1, asked.scaled))
        self._open.clear()

    def _target(self, sigma: Tensor) -> Tensor:
        """Z at a level: the given one (or the source) at the step's end, a fresh one at a level on the way there."""
        steps = len(self._z)
        step = min(self._begun, steps)
        if torch.isclose(sigma.cpu().float(), self._sigmas[step].cpu().float(), rtol=1e-5):  # exp(log(s)) is not s
            return self._source if step == steps else self._z[steps - 1 - step]
        return add_noise(self._source, next(self._fresh), sigma, self._prediction)

    def recording(self, function: Sampler, options: Mapping[str, Any], out: Tensor) -> Recording:
        """What was recorded, when the sampler has returned ``out``.

        Raises:
            ReplayError: by name, if it cannot be replayed.
        """
        self.close()
        name, steps = name_of(function), len(self._z)
        if self._begun != steps:
            raise ReplayError(f"sampler: {name!r} tells of {self._begun} steps on a schedule of {steps}")
        taken = {step for step, scaled in self._settled if scaled}
        for step, (here, to) in enumerate(zip(self._sigmas[:-2].tolist(), self._sigmas[1:-1].tolist())):
            if step not in taken and here > to:
                raise ReplayError(
                    f"sampler: {name!r} adds no noise at step {step} (sigma {here:.4g} to {to:.4g}), which replay "
                    "needs at every step but the last; choose another, such as 'euler_ancestral' (Euler a)"
                )
        if any(step < 0 for step, _ in self._settled):
            raise ReplayError(f"sampler: {name!r} asks for noise before its first step")
        made = Recording(
            sampler=name,
            options=plain_options(function, options),
            sigmas=self._sigmas,
            states=self._states.stack(),
            maps=self._maps.stack() if self._settled else out.new_empty((0, *out.shape)),
            steps=tuple(step for step, _ in self._settled),
            residual=self._source.cpu().double() - out.cpu().double(),
        )
        for part in ("states", "maps", "residual"):
            if not finite(getattr(made, part)):
                raise ReplayError(f"sampler: {name!r} gives {part} that are not finite numbers")
        return made


class _Answer(Exception):
    """The model's answer to a run's first question, which ends the run."""

    def __init__(self, denoised: Tensor) -> None:
        self.denoised = denoised


class _AskedOnce(Around):
    """A model whose first answer ends the run."""

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        raise _Answer(super().__call__(x, sigma, **args))


class _AskedAgain(Around):
    """A model that was asked its first question before, and is to answer the same."""

    def __init__(self, model: Any, before: Tensor) -> None:
        super().__init__(model)
        self._before: Tensor | None = before

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        denoised = super().__call__(x, sigma, **args)
        before, self._before = self._before, None
        if before is not None:
            off = float((denoised - before).double().square().mean().sqrt() / sigma.max().clamp(min=1))
            if off > SAME:
                raise ReplayError(
                    f"model: asked the same twice it gives two answers, {off:.2g} apart, from which no picture comes "
                    "back; turn off what draws at random (token merging, hypertile) or counts calls (FreeU)"
                )
        return denoised


def first_answer(
    function: Sampler, model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, **options: Any
) -> Tensor | None:
    """The model's answer to the first question of a sampler's run from x, which goes no further.

    Returns:
        The answer; None from a sampler that asks nothing.
    """
    try:
        function(_AskedOnce(model), x, sigmas, **options)
    except _Answer as answer:
        return answer.denoised
    return None


def record(
    function: Sampler,
    model: Callable[..., Tensor],
    sigmas: Tensor,
    states: Tensor,
    source: Tensor,
    fresh: Iterator[Tensor],
    prediction: str,
    before: Tensor | None = None,
    store: Callable[[], Store] = InMemory,
    **options: Any,
) -> Recording:
    """The noises with which a sampler gives the source.

    Arguments:
        function: The sampler.
        model: The denoiser as the sampler calls it, under the source's prompt.
        sigmas: The descending schedule of the sampling, to its end, with shape (S + 1).
        states: z at each of its noisy levels, least noisy first, from independent noise, with shape
            (S, B, C, [T,] H, W): :func:`~.noising.walk` over the unthinned levels.
        source: The clean latents with shape (B, C, [T,] H, W).
        fresh: More draws of the same shape, for samplers with noises between the levels.
        prediction: ``eps``, ``v`` or ``flow``.
        before: For a model that is no plain function of x and sigma: its :func:`first_answer`, in a run of
            before this one. It is to answer the same now.
        store: Where what is recorded is kept, in memory or on disk.
        options: The sampler's keywords; ``callback`` is called too, ``noise_sampler`` is replaced.

    Raises:
        ReplayError: for a sampler, options or a model that cannot be replayed, or states that are not one per level.
    """
    check_function(function, **options)
    if states.shape != (len(sigmas) - 1, *source.shape):
        raise ReplayError(f"states: {tuple(states.shape)} are not one z for each of {len(sigmas) - 1} levels")
    rehearsed(function, model, sigmas, source, prediction, 0, **options)
    with store() as begun, store() as maps:
        recorder, shown = Recorder(sigmas, states, source, fresh, prediction, begun, maps), options.get("callback")

        def callback(info: Mapping[str, Any]) -> None:
            recorder.callback(info)
            if shown is not None:
                shown(info)

        run = {**options, "callback": callback, "noise_sampler": recorder}
        out = function(model if before is None else _AskedAgain(model, before), states[-1], sigmas, **run)
        return recorder.recording(function, options, out)


def rehearsed(
    function: Sampler, model: Any, sigmas: Tensor, like: Tensor, prediction: str, skip: int, **options: Any
) -> None:
    """Raises ReplayError, by name, for a sampler that does not replay on a schedule, or not from step ``skip`` on.

    Arguments:
        model: The denoiser that the sampler would get; it is not called.
        like: Latents of its kind, with shape (B, C, [T,] H, W).
    """
    name, steps = name_of(function), len(sigmas) - 1
    source, noise = waves(0, like), [waves(1 + number, like) for number in range(steps)]
    zs = [add_noise(source, n, sigma, prediction) for n, sigma in zip(noise, sigmas[:-1].flip(0))]
    fresh = (waves(1 + number, like) for number in count(steps))
    recorder = Recorder(sigmas, torch.stack(zs), source, fresh, prediction, InMemory(), InMemory())
    stand_in = StandIn(model)
    try:
        run: dict[str, Any] = {"callback": recorder.callback, "noise_sampler": recorder}
        made = recorder.recording(function, options, rehearse(function, stand_in, zs[-1], sigmas, options, **run))
        if not _repeats(function, stand_in, made, 0, options):
            raise ReplayError(f"sampler: {name!r} does not repeat itself with the same noises: it draws others too")
        if skip and not _repeats(function, stand_in, made, min(skip, steps - 1), options):
            raise ReplayError(f"skip: {name!r} looks back over its steps; its maps begin where they were made")
    except ReplayError:
        raise
    except RehearsalError as error:
        alone = f"skip: {name!r} cannot sample a single step; start at a noisier level"
        raise ReplayError(alone if steps == 1 else str(error)) from error


def _repeats(function: Sampler, stand_in: StandIn, made: Recording, skip: int, options: Mapping[str, Any]) -> bool:
    """Whether a sampler's states from a step on are the recorded ones again."""
    seen: list[Tensor] = []
    run: dict[str, Any] = {"callback": lambda info: seen.append(info["x"].clone()), "noise_sampler": made.noises(skip)}
    seen.append(rehearse(function, stand_in, made.states[skip], made.sigmas[skip:], options, seed=1, **run))
    out = waves(0, seen[0]).cpu().double() - made.residual
    wanted = [*made.states[skip:], out.to(seen[0])]
    return len(seen) == len(wanted) and torch.allclose(torch.stack(seen), torch.stack(wanted), rtol=1e-4, atol=1e-4)


def replay(
    function: Sampler,
    model: Callable[..., Tensor],
    sigmas: Tensor,
    recording: Recording,
    skip: int = 0,
    **options: Any,
) -> Tensor:
    """Samples with a recording's noises: the source under its own prompt and scale, an edit under others.

    Arguments:
        function: The sampler that was recorded.
        model: The denoiser as the sampler calls it.
        sigmas: The schedule that was recorded.
        skip: Leave out this many of the noisiest steps (the paper's T_skip): more of the picture stays.
            At least one step remains.
        options: The sampler's keywords; ``noise_sampler`` is replaced.

    Raises:
        ReplayError: as :func:`check_replay` says.
    """
    check_replay(function, sigmas, recording, skip, model, **options)
    skip = min(skip, len(recording.states) - 1)
    run = {**options, "noise_sampler": recording.noises(skip)}
    out = function(model, recording.states[skip], sigmas[skip:], **run)
    return (out.cpu().double() + recording.residual).to(out)


def check_replay(
    function: Sampler, sigmas: Tensor, recording: Recording, skip: int = 0, model: Any = None, **options: Any
) -> None:
    """Raises ReplayError, by name, for another sampler, schedule or options than the recorded ones.

    And for a skip under a sampler that looks back over its steps.
    ``model`` is the denoiser that the sampler would get; it is not called.
    """
    if name_of(function) != recording.sampler:
        raise ReplayError(f"sampler: {name_of(function)!r} is not {recording.sampler!r}, which was recorded")
    if not torch.equal(sigmas.cpu().float(), recording.sigmas.cpu().float()):
        raise ReplayError("schedule: not the one that was recorded (steps, scheduler or start level)")
    now = plain_options(function, options)
    for name, value in recording.options.items():
        if now.get(name) != value:
            raise ReplayError(f"{name}: {now.get(name)!r} is not {value!r}, which was recorded")
    if skip:
        rehearsed(function, model, sigmas, recording.states[0].to(sigmas.device), "eps", skip, **options)
