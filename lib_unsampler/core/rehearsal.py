r"""Rehearsal: a sampler tried out on a stand-in for the model, so that what it does is found out, not listed.

The stand-in answers :math:`D(x; s) = x / (1 + s^2) + \cos(3 \ln s)` on latents of one pixel: no model call is
spent. What a sampler is seen to do there, it does with any model: how often it asks the model in each step,
when it tells of a step, whether it draws noise, and whether it looks back over its steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sampler = Callable[..., Tensor]
"""``f(model, x, sigmas, extra_args=, callback=, disable=, ...)``, as in k-diffusion."""


class RehearsalError(ValueError):
    """A sampler that could not be tried out."""


def name_of(function: Sampler) -> str:
    """The sampler's name in k-diffusion."""
    return getattr(function, "__name__", repr(function)).removeprefix("sample_")


class StandIn:
    """A denoiser that costs nothing; what else a sampler asks of its model (its prediction type), the model says."""

    def __init__(self, model: Any = None) -> None:
        self._model = model

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        """D(x; sigma) of no picture in particular."""
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        return x / (1 + sigma**2) + (3 * sigma.clamp(min=1e-6).log()).cos()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def waves(number: int, like: Tensor) -> Tensor:
    """A latent of one pixel for one image, of numbers that no two ``number`` share; no generator is asked."""
    shape = (1, like.shape[1], *[1] * (like.ndim - 2)) if like.ndim > 1 else (1,)
    places = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    made = (1.4 * torch.sin(places * (2.3 + 1.7 * number) + number)).reshape(shape)
    return made.float().to(like.device)


def rehearse(
    function: Sampler, model: Any, x: Tensor, sigmas: Tensor, options: Mapping[str, Any], seed: int = 0, **changed: Any
) -> Tensor:
    """What the sampler makes of x; torch's generators are left as they were.

    Arguments:
        function: The sampler.
        model: A stand-in for its denoiser.
        x: Where it starts.
        sigmas: The schedule.
        options: The sampler's keywords.
        seed: For what it draws from torch's own generators.
        changed: Options in other ones' place.

    Raises:
        RehearsalError: by name, whatever it ran into.
    """
    run = {**options, "extra_args": {}, "callback": None, "disable": True, **changed}
    try:
        with _seeded(seed, x.device):
            return function(model, x, sigmas, **run)
    except RehearsalError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise RehearsalError(f"sampler: {name_of(function)!r} cannot be tried out: {said}") from error


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Forward:
    """The model calls of a sampler's run, as a host counts them.

    Attributes:
        first: The number of each step's first call, from 0.
        shown: The step that the host shows at each call: the last one that the sampler told of, or 0.
        sigmas: The noise level of each call.
    """

    first: Sequence[int]
    shown: Sequence[int]
    sigmas: Sequence[float]

    def call(self, step: int, stage: int) -> int:
        """The number of a step's call; of one that the step does not make, that of its last."""
        end = self.first[step + 1] if step + 1 < len(self.first) else len(self.shown)
        return min(self.first[step] + stage, end - 1)


def forward(function: Sampler, model: Any, like: Tensor, *, sigmas: Tensor, **options: Any) -> Forward:
    """How a sampler's run over a descending schedule is counted.

    k-diffusion's samplers tell of a step (``callback``) after its first model call, and hosts show that number
    until the next: Euler's call k is shown k - 1, Heun's second call of a step is shown that step.

    Arguments:
        model: The denoiser that the sampler would get; it is not called.
        like: Latents of its kind, with shape (B, C, [T,] H, W).
        options: The sampler's keywords.
    """
    first: list[int] = []
    shown: list[int] = []
    levels: list[float] = []
    told = 0

    class Counted(StandIn):
        def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
            shown.append(told)
            levels.append(float(sigma.flatten()[0]))
            return super().__call__(x, sigma, **args)

    def callback(info: Mapping[str, Any]) -> None:
        nonlocal told
        told = int(info["i"])
        first.append(len(shown) - 1)

    takes = "noise_sampler" in inspect.signature(function).parameters
    silent: dict[str, Any] = {"noise_sampler": lambda *_: torch.zeros_like(waves(0, like))} if takes else {}
    rehearse(function, Counted(model), waves(0, like), sigmas, options, callback=callback, **silent)
    return Forward(tuple(first), tuple(shown), tuple(levels))


def draws_noise(function: Sampler, model: Any, like: Tensor, *, sigmas: Tensor, **options: Any) -> bool:
    """Whether a sampler that takes no ``noise_sampler`` draws noise of its own (``s_churn``)."""
    one, other = (rehearse(function, StandIn(model), waves(0, like), sigmas, options, seed) for seed in (1, 2))
    return not torch.equal(one, other)
