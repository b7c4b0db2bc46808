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
on the way to a level between two of the schedule's (DPM++ SDE) is led through a fresh z at that level.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .noising import add_noise

Sampler = Callable[..., Tensor]
"""``f(model, x, sigmas, extra_args=, callback=, disable=, eta=, s_noise=, noise_sampler=)``, as in k-diffusion."""

MULTISTEP = ("dpmpp_2m_sde", "dpmpp_3m_sde")
"""Samplers whose step also looks at the steps before: their noises only fit the start they were made from."""


class ReplayError(ValueError):
    """A sampler, options or a schedule with which a picture cannot be replayed."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A batch of pictures as the noise of a sampler.

    Attributes:
        sampler: The name after ``sample_`` of the sampler's function.
        options: The function's numbers and words as they were (eta, s_noise, solver_type, ...).
        sigmas: The descending schedule it was recorded on, ending in 0, with shape (S + 1).
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

    def like(self, x: Tensor) -> Recording:
        """The recording for a run from an x: on its device, a single picture repeated for its batch.

        Raises:
            ReplayError: if x is of another shape.
        """
        if self.residual.shape[1:] != x.shape[1:] or len(self.residual) not in (1, len(x)):
            raise ReplayError(f"maps: of latents {tuple(self.residual.shape)}, which do not fit {tuple(x.shape)}")
        states, maps = (t.to(x.device).expand(len(t), *x.shape) for t in (self.states, self.maps))
        return replace(self, states=states, maps=maps, residual=self.residual.expand(x.shape))


def name_of(function: Sampler) -> str:
    """The sampler's name in k-diffusion."""
    return function.__name__.removeprefix("sample_")


def plain_options(function: Sampler, options: Mapping[str, Any]) -> dict[str, float | str]:
    """The numbers and words that a sampler runs with, its own defaults among them."""
    defaults = {k: p.default for k, p in inspect.signature(function).parameters.items() if k != "disable"}
    values = {name: options.get(name, default) for name, default in defaults.items()}
    return {k: v for k, v in values.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)}


def check_function(function: Sampler, sigmas: Tensor | None = None, **options: Any) -> None:
    """Raises ReplayError, by name, for a sampler without noises of its own, or with eta or s_noise 0.

    Where a schedule is given, also for one of a single step under a sampler that cannot sample that.
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
    if sigmas is not None and len(sigmas) == 2 and name_of(function) in MULTISTEP:
        raise ReplayError(f"skip: {name_of(function)!r} cannot sample a single step; start at a noisier level")


class OpenNoise:
    """A noise not chosen yet: it keeps the factors it is multiplied by, until it is added to mu."""

    def __init__(self, settle: Callable[[Tensor, tuple[Any, ...]], Tensor], factors: tuple[Any, ...] = ()) -> None:
        self._settle = settle
        self._factors = factors

    def __mul__(self, factor: Any) -> OpenNoise:
        return OpenNoise(self._settle, (*self._factors, factor))

    __rmul__ = __mul__

    def __radd__(self, mu: Tensor) -> Tensor:
        return self._settle(mu, self._factors)

    __add__ = __radd__


class Recorder:
    """The ``noise_sampler`` and ``callback`` of a recording run."""

    def __init__(
        self, sigmas: Tensor, states: Tensor, source: Tensor, fresh: Iterator[Tensor], prediction: str
    ) -> None:
        """See :func:`record`."""
        self._sigmas = sigmas
        self._wanted = states
        self._source = source
        self._fresh = fresh
        self._prediction = prediction
        self.states: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.steps: list[int] = []

    def callback(self, info: Mapping[str, Any]) -> None:
        """Called by the sampler once in each step, with the x before it."""
        self.states.append(info["x"].clone())

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> OpenNoise:
        """The noise of the step to ``sigma_next``, which is chosen when the sampler adds it."""
        z = self._target(torch.as_tensor(sigma_next))
        return OpenNoise(lambda mu, factors: self._settle(z, mu, factors))

    def _target(self, sigma: Tensor) -> Tensor:
        """Z at a level: the given one at the step's end, a fresh one at a level on the way there."""
        step = len(self.states)
        if torch.isclose(sigma.cpu().float(), self._sigmas[step].cpu().float(), rtol=1e-5):  # exp(log(s)) is not s
            return self._wanted[-1 - step]
        return add_noise(self._source, next(self._fresh), sigma, self._prediction)

    def _settle(self, z: Tensor, mu: Tensor, factors: tuple[Any, ...]) -> Tensor:
        scale = math.prod(float(f) for f in factors)
        noise = (z.to(mu) - mu) / scale if scale else torch.zeros_like(mu)  # a repeated level takes no noise
        self.maps.append(noise)
        self.steps.append(len(self.states) - 1)
        for factor in factors:  # in the order and rounding in which a chosen noise is scaled
            noise = noise * factor
        return mu + noise


def record(
    function: Sampler,
    model: Callable[..., Tensor],
    sigmas: Tensor,
    states: Tensor,
    source: Tensor,
    fresh: Iterator[Tensor],
    prediction: str,
    **options: Any,
) -> Recording:
    """The noises with which a sampler gives the source.

    Arguments:
        function: The sampler.
        model: The denoiser as the sampler calls it, under the source's prompt.
        sigmas: The descending schedule of the sampling, ending in 0, with shape (S + 1).
        states: z at each of its noisy levels, least noisy first, from independent noise, with shape
            (S, B, C, [T,] H, W): :func:`~.noising.walk` over the unthinned levels.
        source: The clean latents with shape (B, C, [T,] H, W).
        fresh: More draws of the same shape, for samplers with noises between the levels.
        prediction: ``eps``, ``v`` or ``flow``.
        options: The sampler's keywords; ``callback`` is called too, ``noise_sampler`` is replaced.

    Raises:
        ReplayError: for a sampler or options that cannot be replayed, or states that are not one per level.
    """
    check_function(function, sigmas, **options)
    if states.shape != (len(sigmas) - 1, *source.shape):
        raise ReplayError(f"states: {tuple(states.shape)} are not one z for each of {len(sigmas) - 1} levels")
    recorder, shown = Recorder(sigmas, states, source, fresh, prediction), options.get("callback")

    def callback(info: Mapping[str, Any]) -> None:
        recorder.callback(info)
        if shown is not None:
            shown(info)

    run = {**options, "callback": callback, "noise_sampler": recorder}
    out = function(model, states[-1], sigmas, **run)
    return Recording(
        sampler=name_of(function),
        options=plain_options(function, options),
        sigmas=sigmas,
        states=torch.stack(recorder.states),
        maps=torch.stack(recorder.maps) if recorder.maps else source.new_empty((0, *source.shape)),
        steps=tuple(recorder.steps),
        residual=source.cpu().double() - out.cpu().double(),
    )


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
    check_replay(function, sigmas, recording, skip, **options)
    skip = min(skip, len(recording.states) - 1)
    maps = iter([noise for noise, step in zip(recording.maps, recording.steps) if step >= skip])
    run = {**options, "noise_sampler": lambda *_: next(maps)}
    out = function(model, recording.states[skip], sigmas[skip:], **run)
    return (out.cpu().double() + recording.residual).to(out)


def check_replay(function: Sampler, sigmas: Tensor, recording: Recording, skip: int = 0, **options: Any) -> None:
    """Raises ReplayError, by name, for another sampler, schedule or options than the recorded ones.

    And for a skip under a sampler that looks back over its steps.
    """
    if name_of(function) != recording.sampler:
        raise ReplayError(f"sampler: {name_of(function)!r} is not {recording.sampler!r}, which was recorded")
    if not torch.equal(sigmas.cpu().float(), recording.sigmas.cpu().float()):
        raise ReplayError("schedule: not the one that was recorded (steps, scheduler or start level)")
    now = plain_options(function, options)
    for name, value in recording.options.items():
        if now.get(name) != value:
            raise ReplayError(f"{name}: {now.get(name)!r} is not {value!r}, which was recorded")
    if skip and recording.sampler in MULTISTEP:
        raise ReplayError(f"skip: {recording.sampler!r} looks back over its steps; its maps begin where they were made")
