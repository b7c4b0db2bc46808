r"""From a clean latent to every noise level, and back to the noise.

A noisy latent is :math:`z = a(s) x + s n` with n standard normal. In sigma space (eps- and
v-prediction, Karras et al. 2022) :math:`a = 1`; on flow models (rectified flow, Liu et al. 2022)
:math:`a = 1 - s`. The inverse is :math:`n = (z - a(s) x) / s`.

Arithmetic is float32 whatever the latent's dtype and is done in the WebUI's own order (multiply,
then add: two roundings), so that z at img2img's start level equals img2img's start state bit for
bit. Sigma is in the space the model's schedule uses; latents are the model's, already scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .schedule import Levels

PREDICTIONS = ("eps", "v", "flow")

Draw = Callable[[int], Tensor]
"""``draw(j)``: the j-th noise draw of every image, with shape (B, C, [T,] H, W) in float32.
Called with rising j; a sequential generator discards the draws in between."""


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """Appends dimensions of size 1 to ``x`` until it has ``ndim`` of them (k-diffusion's helper)."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def signal_scale(sigma: Tensor, prediction: str) -> Tensor:
    r""":math:`a(s)`: 1 in sigma space, :math:`1 - s` on flow; the shape of ``sigma``."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")
    return 1.0 - sigma if prediction == "flow" else torch.ones_like(sigma)


def add_noise(x: Tensor, noise: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    r""":math:`z = a(s) x + s n` in float32.

    Arguments:
        x: Clean latents with shape (B, C, [T,] H, W).
        noise: Standard normal noise of the same shape.
        sigma: Noise level, with shape () or (B).
    """
    sigma = append_dims(sigma.to(x.device, torch.float32), x.ndim)
    scaled = noise.float() * sigma
    if prediction == "flow":
        return scaled + signal_scale(sigma, prediction) * x.float()
    return x.float() + scaled


def implied_noise(z: Tensor, x: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    r""":math:`n = (z - a(s) x) / s` in float32, the inverse of :func:`add_noise`; sigma above 0."""
    sigma = append_dims(sigma.to(x.device, torch.float32), x.ndim)
    return (z.float() - signal_scale(sigma, prediction) * x.float()) / sigma


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
    s, t = sigma.double(), to_sigma.double()
    if s == t:
        return z
    r = (1 - t) / (1 - s) if prediction == "flow" else torch.ones_like(t)
    scale = (t**2 - r**2 * s**2).sqrt()
    return r.item() * z + scale.item() * noise.float()


def normalize_noise(noise: Tensor) -> Tensor:
    """Each image's noise brought to mean 0 and (population) variance 1 over its channels and pixels.

    An image without any variance is only centred.
    """
    dims = tuple(range(1, noise.ndim))
    centred = noise.double() - noise.double().mean(dims, keepdim=True)
    std = centred.square().mean(dims, keepdim=True).sqrt()
    return (centred / torch.where(std > 0, std, torch.ones_like(std))).float()


def blend(z: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """z where the mask is 1, the clean latent where it is 0, mixed in between.

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
        draw: The source of noise.
        kind: ``shared``, ``independent`` or ``path``.
        prediction: ``eps``, ``v`` or ``flow``.
        normalize: Whether each image's implied noise is brought to mean 0 and variance 1.
    """
    if kind == "path":
        states = _path_states(x, levels, draw, prediction)
    elif kind in ("shared", "independent"):
        states = _marginal_states(x, levels, draw, kind, prediction, normalize)
    else:
        raise ValueError(f"noise: {kind!r} is not one of shared, independent, path")
    for index, z in states:
        sigma = levels.schedule[index]
        if kind == "path" and normalize and sigma > 0:
            noise = normalize_noise(implied_noise(z, x, sigma, prediction))
            z = add_noise(x, noise, sigma, prediction)
        yield index, z


def _marginal_states(
    x: Tensor, levels: Levels, draw: Draw, kind: str, prediction: str, normalize: bool
) -> Iterator[tuple[int, Tensor]]:
    prepare = normalize_noise if normalize else torch.Tensor.float
    common = prepare(draw(0)) if kind == "shared" else None
    for index in levels.kept:
        noise = prepare(draw(levels.draw_index(index))) if common is None else common
        yield index, add_noise(x, noise, levels.schedule[index], prediction)


def _path_states(x: Tensor, levels: Levels, draw: Draw, prediction: str) -> Iterator[tuple[int, Tensor]]:
    z, sigma = x.float(), torch.zeros(())
    kept = set(levels.kept)
    for index in levels.visited:
        to_sigma = levels.schedule[index]
        z = diffuse(z, draw(levels.draw_index(index)), sigma, to_sigma, prediction)
        sigma = to_sigma
        if index in kept:
            yield index, z


def unsample(
    x: Tensor,
    levels: Levels,
    draw: Draw,
    kind: str,
    prediction: str,
    normalize: bool = False,
) -> Tensor:
    """The batch of every kept level: :func:`walk`, collected in the latent's own dtype.

    Returns:
        z with shape (L, B, C, [T,] H, W), least noisy first; ``z.flatten(0, 1)`` is the
        original node's ``latent_batch``.
    """
    z = torch.empty((len(levels.kept), *x.shape), dtype=x.dtype, device=x.device)
    for slot, (_, state) in zip(z, walk(x, levels, draw, kind, prediction, normalize)):
        slot.copy_(state)
    return z


def variance_preserving(z: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    r"""z as the diffusion papers show it: :math:`z / \sqrt{1 + s^2}` in sigma space; flow as it is.

    Arguments:
        z: Latents with shape (B, C, [T,] H, W).
        sigma: Noise level in sigma space, with shape () or (B).
    """
    if prediction == "flow":
        return z
    sigma = append_dims(sigma.to(z.device, torch.float32), z.ndim)
    return (z.float() / (1 + sigma**2).sqrt()).to(z.dtype)


class SeededDraws:
    """Noise draws from one generator per image, as the WebUI's ``ImageRNG`` makes them on the CPU.

    A batch of B images draws what B single runs draw, bit for bit. Draws come in order; asking for
    an earlier one again raises ValueError.
    """

    def __init__(self, seeds: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """``shape`` is one image's latent, (C, [T,] H, W)."""
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape = shape
        self._next = 0

    def __call__(self, j: int) -> Tensor:
        if j < self._next:
            raise ValueError(f"draw {j} was already taken (next is {self._next})")
        for _ in range(self._next, j + 1):
            drawn = [torch.randn(self._shape, generator=g) for g in self._generators]
        self._next = j + 1
        return torch.stack(drawn)
