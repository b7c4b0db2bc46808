"""Noise from generators built as the host builds its own, and the host's own left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from k_diffusion import sampling as k_sampling
from modules import devices, rng
from torch import Tensor

from .request import attribute, same_shape


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Leaves the global generators (torch's and the host's NV one) as they were found."""
    devices_used = [devices.device.index or 0] if devices.device.type == "cuda" else []
    had, nv = hasattr(rng, "nv_rng"), getattr(rng, "nv_rng", None)
    with torch.random.fork_rng(devices=devices_used):
        try:
            yield
        finally:
            if had:
                rng.nv_rng = nv
            elif hasattr(rng, "nv_rng"):
                del rng.nv_rng


def _generators(p: Any, first: Tensor) -> Any:
    """The request's own generators, as they were before they drew ``first``, with shape (B, C, H, W)."""
    return rng.ImageRNG(
        tuple(first.shape[1:]),
        p.seeds,
        subseeds=p.subseeds,
        subseed_strength=p.subseed_strength,
        seed_resize_from_h=p.seed_resize_from_h,
        seed_resize_from_w=p.seed_resize_from_w,
    )


class HostDraws:
    """The noise draws of one batch, from generators built as the host builds its own.

    Draw 0 is img2img's own noise as the sampler receives it; the later ones continue the same
    seeds' streams, with the request's noise multiplier. None of the sampler's draws is consumed.
    Once draw 1 was asked for, later ones may be on another thread: they touch no global generator.
    """

    def __init__(self, p: Any, first: Tensor) -> None:
        """``first`` is the noise handed to the sampler, with shape (B, C, H, W)."""
        self._first = first
        self._scale = getattr(p, "initial_noise_multiplier", None)
        self._rng = _generators(p, first)
        self._next = 0

    def __call__(self, j: int) -> Tensor:
        """The j-th draw of every image, where the first is."""
        return self.made(j).to(self._first.device)

    def made(self, j: int) -> Tensor:
        """The same where it is made."""
        if j == 0:
            return self._first
        if self._next == 0:
            with untouched_generators():  # a host's first draw seeds them
                self._rng.next()
            self._next = 1
        while self._next <= j:
            drawn = same_shape(_next(self._rng), self._first, "the generators' noise")
            self._next += 1
        return drawn if self._scale in (None, 1.0) else drawn * self._scale


def _next(images: Any) -> Tensor:
    """The host's ``next()``, but that its NV source stays on the CPU.

    The host takes that to the GPU without letting go of the interpreter, where it would wait behind a decoder.
    """
    if all(hasattr(generator, "randn") for generator in images.generators):
        return torch.from_numpy(np.stack([generator.randn(images.shape) for generator in images.generators]))
    return images.next()


def pass_draws(p: Any, count: int) -> None:
    """Has what is sampled next begin behind ``count`` more of the request's own draws, which made z."""
    with untouched_generators():
        for _ in range(count):
            p.rng.next()


@contextmanager
def untouched_draws() -> Iterator[None]:
    """Has k-diffusion's functions draw from no generator of the request's: some do so only to throw it away."""
    with attribute(k_sampling, "torch", torch), untouched_generators():
        yield


@contextmanager
def repeatable_draws(p: Any, first: Tensor) -> Iterator[None]:
    """Has the sampler draw what it would draw next, after ``first``, and draw it again when it samples later."""
    with untouched_generators():
        again = _generators(p, first)
        again.next()
        with attribute(p, "rng", again):
            yield
