r"""Rehearsal: a sampler tried out on a stand-in for the model, so that what it does is found out, not listed.

The stand-in answers :math:`D(x; s) = x / (1 + s^2) + \cos(3 \ln s)` on latents of one pixel: no model call is
spent. What a sampler is seen to do there, it does with any model: how often it asks the model in each step,
when it tells of a step, whether it draws noise, and whether it looks back over its steps.
"""

from __future__ import annotations

import inspect
import struct
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
    """A denoiser that costs nothing; what else a sampler asks of its model (its prediction type), the model says.

    A sampler that has the guided model's parts told to it (CFG++) is told some: it hangs functions into the model's
    options, as ComfyUI and Forge Neo have them (``sampler_post_cfg_function``).
    """

    def __init__(self, model: Any = None) -> None:
        self._model = model

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        """D(x; sigma) of no picture in particular; without a prompt it is half of that."""
        denoised = self.answer(x, sigma)
        for told in args.get("model_options", {}).get("sampler_post_cfg_function", ()):
            parts = {"cond_denoised": denoised, "uncond_denoised": denoised / 2, "sigma": sigma, "input": x}
            denoised = told({"denoised": denoised, **parts})
        return denoised

    def answer(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma)."""
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        return x / (1 + sigma**2) + (3 * sigma.clamp(min=1e-6).log()).cos()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Around:
    """Something around a denoiser; to the sampler it is the denoiser itself."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """D(x; sigma) of the denoiser."""
        made: Tensor = self._model(x, sigma, **extra)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What a sampler sets on its model (CFG++ does) is set on the model, not on this stand-in."""
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._model, name, value)


class Watched(Around):
    """A denoiser that notes the state it was shown last."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._shown = torch.empty(0)

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """D(x; sigma) of the denoiser."""
        self._shown = x
        return super().__call__(x, sigma, **extra)

    def last(self) -> Tensor:
        """The state of the last call: in a sampler's ``callback``, that of the step's first."""
        return self._shown


class Still(Around):
    """A denoiser held still: what it draws from torch's generators (token merging) is the same at one sigma, always.

    What is solved or recorded against such a model comes back only if it answers then as it does later. The
    generators are left as they were.
    """

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """D(x; sigma) of the denoiser, its draws a function of sigma."""
        (seed,) = struct.unpack("<I", struct.pack("<f", float(sigma.flatten()[0])))
        with _seeded(seed, x.device):
            return super().__call__(x, sigma, **extra)


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


def _silent(function: Sampler, like: Tensor) -> dict[str, Any]:
    """The option by which a sampler that takes its noise from outside gets none."""
    takes = "noise_sampler" in inspect.signature(function).parameters
    return {"noise_sampler": lambda *_: torch.zeros_like(waves(0, like))} if takes else {}


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

    changed = {"callback": callback, **_silent(function, like)}
    rehearse(function, Counted(model), waves(0, like), sigmas, options, **changed)
    return Forward(tuple(first), tuple(shown), tuple(levels))


def draws_noise(function: Sampler, model: Any, like: Tensor, *, sigmas: Tensor, **options: Any) -> bool:
    """Whether a sampler that takes no ``noise_sampler`` draws noise of its own (``s_churn``)."""
    one, other = (rehearse(function, StandIn(model), waves(0, like), sigmas, options, seed) for seed in (1, 2))
    return not torch.equal(one, other)


class _Moved(StandIn):
    """A stand-in that moves what it was shown at one call, in place, after it has answered."""

    def __init__(self, model: Any, call: int, by: float, answers: bool) -> None:
        """With ``answers`` False, D is 0 whatever it is shown."""
        super().__init__(model)
        self._left, self._by, self._answers = call, by, answers

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        denoised = super().__call__(x, sigma, **args)
        if self._left == 0:
            x += self._by
        self._left -= 1
        return denoised

    def answer(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().answer(x, sigma) if self._answers else torch.zeros_like(x)


def goes_on_from_shown(
    function: Sampler, model: Any, like: Tensor, firsts: Sequence[int], *, sigmas: Tensor, **options: Any
) -> bool:
    """Whether the tensor that a sampler shows its model at a step's first call is the state it goes on from.

    The stand-in moves that tensor in place after it has answered: a sampler that goes on from it then ends elsewhere,
    one that showed a copy does not. Nor does one that goes on from the answer alone (LCM): that one ends in the same
    place wherever it starts, if the answer does not depend on where it is, and a copy of nothing does no harm.
    Asked of the first two steps; where there is but one, its answer is the end, whatever the state.

    Arguments:
        firsts: The number of each step's first call.
    """
    if len(firsts) < 2:
        return True
    changed = {"callback": lambda _: None, **_silent(function, like)}

    def end(start: Tensor, by: float, answers: bool, way: Tensor) -> Tensor:
        return rehearse(function, _Moved(model, firsts[0], by, answers), start, way[:3], options, **changed)

    if not torch.equal(end(waves(0, like), 0.0, True, sigmas), end(waves(0, like), 0.5, True, sigmas)):
        return True
    noisy = sigmas[:-1]  # at the clean end every sampler is at the answer
    return torch.equal(end(waves(0, like), 0.0, False, noisy), end(waves(1, like), 0.0, False, noisy))
