"""Where the fused kernel can serve, and its launch.

On an NVIDIA GPU with Triton the whole batch is written once, without a copy of any kind and without
waiting for the device. Everywhere else noising.py's torch path does the same arithmetic.
"""

from __future__ import annotations

from functools import cache
from struct import pack, unpack
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .philox import PhiloxDraws

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEVELS_PER_PROGRAM = 64
PROGRAMS = 4096
"""Enough for any GPU's multiprocessors; levels are split no finer than that takes."""

STAGED_BYTES = 2**16
"""CUDA takes copies up to this size at once; larger ones wait for the device, unless page-locked."""


@cache
def kernels() -> ModuleType | None:
    """The module of the kernels, None without Triton; imported at the first use, since Triton takes its time."""
    try:
        from . import kernels
    except Exception:  # no Triton (Windows, macOS, torch for the CPU), or one that is old or broken
        return None
    return kernels


def serves(x: Tensor, kept: tuple[int, ...], philox: bool, kind: str) -> bool:
    """Whether :func:`fill` can write this batch: noise drawn once, or that it can compute; even thinning.

    Arguments:
        x: Clean latents with shape (B, C, [T,] H, W).
        kept: The kept levels' schedule indices, falling.
        philox: Whether the noise is that of :class:`PhiloxDraws`, unchanged.
        kind: ``shared``, ``independent`` or ``path``.
    """
    if not x.is_cuda or x.dtype not in DTYPES or not 0 < x.numel() < 2**31 or kernels() is None:
        return False
    stride = _stride(kept)
    # Falling by at least 1 each, indices that span as many as there are fall by 1: nothing to compare.
    even = kept[0] - kept[-1] + 1 == len(kept) or kept == tuple(range(kept[0], kept[-1] - 1, -stride))
    return even and (philox or kind == "shared") and _compiles(x.device.index, x.dtype)


def _stride(kept: tuple[int, ...]) -> int:
    return kept[0] - kept[1] if len(kept) > 1 else 1


@cache
def _compiles(device: int, dtype: torch.dtype) -> bool:
    """Whether Triton can build, run and keep the kernel here: it may lack a C compiler, or know no such GPU."""
    if torch.version.cuda is None:
        return False
    x = torch.zeros((1, 16), dtype=dtype, device=f"cuda:{device}")
    factors, draws = torch.ones(2, device=x.device), PhiloxDraws((0,), (16,))
    compiled, kept = x[None].clone(), x[None].clone()
    try:
        for z in (compiled, kept):
            fill(z, x, factors, 1, (0,), "independent", False, draws, None)
    except Exception:  # whatever Triton raises, the torch path still works
        return False
    return torch.equal(compiled, kept)


def fill(
    z: Tensor, x: Tensor, factors: Tensor, clean: int, kept: tuple[int, ...], kind: str, flow: bool,
    draws: PhiloxDraws | None, noise: Tensor | None,
) -> None:  # fmt: skip
    """Writes every kept level of a walk into z with one kernel.

    Arguments:
        z: The output with shape (L, B, C, [T,] H, W), contiguous.
        x: Clean latents with shape (B, C, [T,] H, W).
        factors: The whole schedule with shape (n + 1), or for ``path`` the factors (of z, of the
            noise) of each draw, with shape (n, 2); float32, contiguous, on x's device.
        clean: The schedule index n of the clean image.
        kept: The kept levels' schedule indices, evenly falling.
        kind: ``shared``, ``independent`` or ``path``.
        flow: Whether the source is scaled too.
        draws: The source of noise, or None if ``noise`` is given.
        noise: ``shared``'s noise with the shape of x, float32.
    """
    images, size = x.shape[0], x.numel() // x.shape[0]
    # A path's levels cannot be split over programs, so its elements are: one per thread.
    block, warps = (256, 8) if kind == "path" else (512, 2)
    levels = clean - kept[-1] if kind == "path" else len(kept)
    blocks = -(-size // block) * images
    chunk = levels if kind == "path" else min(max(levels * blocks // PROGRAMS, 1), LEVELS_PER_PROGRAM)
    x = x.contiguous()
    noise = factors if noise is None else noise.contiguous()
    seeds = draws.seeds if draws else (0,)
    keys = factors if len(seeds) == 1 else upload(np.array(seeds, np.uint64).view(np.int32), x.device)
    constants = (kind if draws else "given", flow, len(seeds) == 1, block)
    with torch.cuda.device(x.device.index):
        _launch(
            (x.device, x.dtype, size, x.data_ptr() % 16, noise.data_ptr() % 16, *constants),
            (blocks * -(-levels // chunk), 1, 1),
            (z, x, noise, factors, keys, *unpack("<2i", pack("<Q", seeds[0])), size, images, levels, chunk, clean,
             kept[0], _stride(kept), *constants),
            warps,
        )  # fmt: skip


_ready: dict[tuple[Any, ...], Any] = {}


def _launch(key: tuple[Any, ...], grid: tuple[int, int, int], arguments: tuple[Any, ...], warps: int) -> None:
    """Launches the kernel; from the second time on without Triton's search for it, which takes as long again.

    ``key`` is the device and all that Triton compiles for: types, constants, the divisibility of ``size`` and of
    addresses (memory that torch has just given out is aligned).
    """
    try:
        _ready[key][grid](*arguments, stream=stream(key[0]))
    except (KeyError, TypeError):  # not compiled yet, or a Triton whose compiled kernels take other arguments
        module = kernels()
        assert module is not None  # or serves() would have said so
        _ready[key] = module.unsample[grid](*arguments, num_warps=warps, enable_fp_fusion=False)


def stream(device: torch.device) -> int:
    """The current stream's handle, got the way Triton gets it: the public way makes an object, ten times as slow."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def upload(words: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, for the kernels launched after it; nothing waits."""
    staged = torch.tensor(words)
    if words.nbytes > STAGED_BYTES:
        staged = staged.pin_memory()
    return staged.to(device, non_blocking=True)
