r"""From a clean latent to every noise level, and back to the noise.

A noisy latent is :math:`z = a(s) x + s n` with n standard normal. In sigma space (eps- and
v-prediction, Karras et al. 2022) :math:`a = 1`; on flow models (rectified flow, Liu et al. 2022)
:math:`a = 1 - s`. The inverse is :math:`n = (z - a(s) x) / s`.

Arithmetic is float32 whatever the latent's dtype and is done in the WebUI's own order (multiply,
then add: two roundings), so that z at img2img's start level equals img2img's start state bit for
bit. Sigma is in the space the model's schedule uses; latents are the model's, already scaled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import fused
from .philox import PhiloxDraws
from .schedule import Levels

PREDICTIONS = ("eps", "v", "flow")
NOISE_KINDS = ("shared", "independent", "path")

Draw = Callable[[int], Tensor]
"""``draw(j)``: the j-th noise draw of every image, with shape (B, C, [T,] H, W) in float32.
Called with rising j; a sequential generator discards the draws in between."""


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """Appends dimensions of size 1 to ``x`` until it has ``ndim`` of them (k-diffusion's helper)."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def signal_scale(sigma: Tensor, prediction: str) -> Tensor:
    r""":math:`a(s)`: 1 in sigma space, :math:`1 - s` on flow; the shape of ``sigma``."""
    _check("prediction", prediction, PREDICTIONS)
    return 1.0 - sigma if prediction == "flow" else torch.ones_like(sigma)


def add_noise(x: Tensor, noise: Tensor, sigma: Tensor, prediction: str, out: Tensor | None = None) -> Tensor:
    r""":math:`z = a(s) x + s n` in float32.

    Arguments:
        x: Clean latents with shape (B, C, [T,] H, W).
        noise: Standard normal noise of the same shape.
        sigma: Noise level, with shape () or (B).
        out: Where z goes, in float32; a new tensor where there is none.
    """
    sigma = append_dims(sigma.to(x.device, torch.float32), x.ndim)
    scaled = torch.mul(noise.float(), sigma, out=out)
    clean = signal_scale(sigma, prediction) * x.float() if prediction == "flow" else x.float()
    return torch.add(clean, scaled, out=out)


def implied_noise(z: Tensor, x: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    r""":math:`n = (z - a(s) x) / s` in float32, the inverse of :func:`add_noise`; sigma above 0."""
    sigma = append_dims(sigma.to(x.device, torch.float32), x.ndim)
    return (z.float() - signal_scale(sigma, prediction) * x.float()) / sigma


def diffusion(
    sigma: NDArray[Any], to_sigma: NDArray[Any], prediction: str
) -> tuple[NDArray[Any] | float, NDArray[Any]]:
    r"""The factors (of z, of the noise) of :func:`diffuse`; everything float64 and of one shape.

    In numpy: for a handful of numbers torch takes longer than the GPU takes for the whole batch.
    """
    _check("prediction", prediction, PREDICTIONS)
    if prediction != "flow":
        return 1.0, np.sqrt(to_sigma * to_sigma - sigma * sigma)
    r = np.divide(1 - to_sigma, 1 - sigma, out=np.ones_like(sigma), where=sigma != to_sigma)
    return r, np.sqrt(to_sigma * to_sigma - (r * r) * (sigma * sigma))


def diffuse(z: Tensor, noise: Tensor, sigma: Tensor, to_sigma: Tensor, prediction: str) -> Tensor:
    r"""One step of the forward process, from level s to the noisier s'.

    Sigma space: :math:`z' = z + \sqrt{s'^2 - s^2}\, n`. Flow: with :math:`r = (1 - s') / (1 - s)`,
    :math:`z' = r z + \sqrt{s'^2 - r^2 s^2}\, n`. Equal levels leave z as it is.

    Arguments:
        z: Latents at level s with shape (B, C, [T,] H, W), float32.
        noise: Standard normal noise of the same shape.
        sigma: The level s, with shape ().
        to_sigma: The level s', not below s, with shape ().
    """
    if sigma == to_sigma:
        return z
    s, t = (level.double().cpu().numpy() for level in (sigma, to_sigma))
    r, scale = (torch.tensor(factor, dtype=torch.float32, device=z.device) for factor in diffusion(s, t, prediction))
    return r * z + scale * noise.float()


def normalize_noise(noise: Tensor) -> Tensor:
    """Each image's noise brought to mean 0 and (population) variance 1 over its channels and pixels.

    An image without any variance is only centred.
    """
    dims = tuple(range(1, noise.ndim))
    centred = noise.double() - noise.double().mean(dims, keepdim=True)
    std = centred.square().mean(dims, keepdim=True).sqrt()
    return (centred / torch.where(std > 0, std, torch.ones_like(std))).float()


def blend(z: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Z where the mask is 1, the clean latent where it is 0, mixed in between.

    Arguments:
        z: Noisy latents with shape (..., B, C, [T,] H, W).
        x: Clean latents with shape (B, C, [T,] H, W).
        mask: Weights from 0 to 1 that broadcast against ``x``, or None for everywhere.
    """
    if mask is None:
        return z
    mask = mask.to(z.device, torch.float32)
    return (mask * z.float() + (1 - mask) * x.float()).to(z.dtype)


def walk(
    x: Tensor,
    levels: Levels,
    draw: Draw,
    kind: str,
    prediction: str,
    normalize: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Every kept level, least noisy first, as (schedule index, z in float32 with the shape of x).

    Draw numbering: draw j belongs to schedule index n - 1 - j, kept or not, so thinning never
    changes the levels that remain. ``shared`` uses draw 0 (img2img's own) everywhere.

    Arguments:
        x: Clean latents with shape (B, C, [T,] H, W).
        levels: The walk.
        draw: The source of noise, on x's device.
        kind: ``shared``, ``independent`` or ``path``.
        prediction: ``eps``, ``v`` or ``flow``.
        normalize: Whether each image's implied noise is brought to mean 0 and variance 1.
    """
    _check("noise", kind, NOISE_KINDS)
    _check("prediction", prediction, PREDICTIONS)
    states = _states(x, levels, draw, kind, prediction, normalize)
    for index, z in zip(levels.kept, states):
        sigma = levels.schedule[index]
        if kind == "path" and normalize and sigma > 0:
            noise = normalize_noise(implied_noise(z, x, sigma, prediction))
            z = add_noise(x, noise, sigma, prediction)
        yield index, z


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}")


def plan(levels: Levels, kind: str, prediction: str) -> list[tuple[float, float, int, int]]:
    """A walk as rows (signal, scale, j, slot): ``z = scale * draw(j) + signal * base``.

    ``shared`` and ``independent``: a row for each kept level, base x, :func:`add_noise`'s factors.
    ``path``: a row for each visited level, base the row before (x first), :func:`diffuse`'s factors;
    slot is -1 where the level is not kept.
    """
    indices = levels.visited if kind == "path" else levels.kept
    draws = [0 if kind == "shared" else levels.draw_index(index) for index in indices]
    if kind == "path":
        signal, scale = path_factors(levels.schedule.numpy(), prediction)[draws].T.tolist()
    else:
        sigma = levels.sigmas
        signal, scale = signal_scale(sigma, prediction).tolist(), sigma.tolist()
    slots = {index: slot for slot, index in enumerate(levels.kept)}
    return list(zip(signal, scale, draws, (slots.get(index, -1) for index in indices)))


def path_factors(schedule: NDArray[Any], prediction: str) -> NDArray[Any]:
    """:func:`diffusion`'s factors by draw number: row j leads to schedule index n - 1 - j; float32, (n, 2).

    The first begins at the clean latent, sigma 0, wherever sampling ends.
    """
    sigma = schedule[::-1].astype(np.float64)
    sigma[0] = 0
    factors = np.empty((len(sigma) - 1, 2), np.float32)
    factors[:, 0], factors[:, 1] = diffusion(sigma[:-1], sigma[1:], prediction)
    return factors


@lru_cache(maxsize=32)
def _device_factors(schedule: bytes, path: bool, prediction: str, device: torch.device, stream: int) -> Tensor:
    """What the kernel reads of a schedule (float32 words), on the device.

    Kept, because runs share few schedules and a transfer takes as long as a small batch; for each
    stream of its own, so that nothing has to wait for it.
    """
    sigma = np.frombuffer(schedule, np.float32)
    return fused.upload(path_factors(sigma, prediction) if path else sigma, device)


def _states(
    x: Tensor, levels: Levels, draw: Draw, kind: str, prediction: str, normalize: bool, into: Tensor | None = None
) -> Iterator[Tensor]:
    """The kept levels in float32, written into the slots of ``into`` if that is given."""
    prepare = normalize_noise if normalize and kind != "path" else torch.Tensor.float
    common = prepare(draw(0)) if kind == "shared" else None
    base = x.float()
    for signal, scale, j, slot in plan(levels, kind, prediction):
        noise = prepare(draw(j)) if common is None else common
        out = None if into is None or slot < 0 else into[slot]
        z = torch.mul(noise.expand_as(base), scale, out=out)
        z += base if signal == 1 else signal * base
        if kind == "path":
            base = z
        if slot >= 0:
            yield z


def unsample(
    x: Tensor,
    levels: Levels,
    draw: Draw,
    kind: str,
    prediction: str,
    normalize: bool = False,
) -> Tensor:
    """The batch of every kept level: :func:`walk`, collected in the latent's own dtype.

    One kernel writes it where :mod:`.fused` serves; otherwise torch does, level by level in place.

    Returns:
        z with shape (L, B, C, [T,] H, W), least noisy first; ``z.flatten(0, 1)`` is the
        original node's ``latent_batch``.
    """
    _check("noise", kind, NOISE_KINDS)
    _check("prediction", prediction, PREDICTIONS)
    z = x.new_empty((len(levels.kept), *x.shape))
    if runs_fused(x, levels, draw, kind, normalize):
        if isinstance(draw, PhiloxDraws) and not normalize:
            draws, noise = draw, None
        else:
            draws, noise = None, (normalize_noise(draw(0)) if normalize else draw(0).float()).expand_as(x)
        schedule = levels.schedule.numpy().tobytes()
        factors = _device_factors(schedule, kind == "path", prediction, x.device, fused.stream(x.device))
        fused.fill(z, x, factors, len(levels.schedule) - 1, levels.kept, kind, prediction == "flow", draws, noise)
    elif z.dtype == torch.float32 and not (kind == "path" and normalize):
        deque(_states(x, levels, draw, kind, prediction, normalize, into=z), maxlen=0)
    else:
        for slot, (_, state) in zip(z, walk(x, levels, draw, kind, prediction, normalize)):
            slot.copy_(state)
    return z


def runs_fused(x: Tensor, levels: Levels, draw: Draw, kind: str, normalize: bool = False) -> bool:
    """Whether :func:`unsample` writes this batch with the fused kernel: for benchmarks and tests."""
    philox = draw if isinstance(draw, PhiloxDraws) and not normalize else None
    if philox is not None and (len(philox.seeds), *philox.shape) != x.shape:
        raise ValueError(f"noise: draws of shape {(len(philox.seeds), *philox.shape)} for latents of {tuple(x.shape)}")
    return fused.serves(x, levels.kept, philox is not None, kind)


def variance_preserving(z: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    r"""Z as the diffusion papers show it: :math:`z / \sqrt{1 + s^2}` in sigma space; flow as it is.

    Arguments:
        z: Latents with shape (B, C, [T,] H, W).
        sigma: Noise level in sigma space, with shape () or (B).
    """
    if prediction == "flow":
        return z
    sigma = append_dims(sigma.to(z.device, torch.float32), z.ndim)
    return (z.float() / (1 + sigma**2).sqrt()).to(z.dtype)


class SeededDraws:
    """Noise draws from one torch generator per image, as the WebUI's ``ImageRNG`` makes them.

    On the CPU these are its ``CPU`` source, on a CUDA device its ``GPU`` source (NV is
    :class:`~.philox.PhiloxDraws`). A batch of B images draws what B single runs draw, bit for bit.
    Draws come in order; asking for an earlier one again raises ValueError.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        """``shape`` is one image's latent, (C, [T,] H, W)."""
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._shape = shape
        self._device = device
        self._next = 0

    def __call__(self, j: int) -> Tensor:
        """The j-th draw of every image."""
        if j < self._next:
            raise ValueError(f"draw {j} was already taken (next is {self._next})")
        drawn = torch.empty((len(self._generators), *self._shape), device=self._device)
        for _ in range(self._next, j + 1):
            for image, generator in zip(drawn, self._generators):
                torch.randn(self._shape, generator=generator, out=image)
        self._next = j + 1
        return drawn
