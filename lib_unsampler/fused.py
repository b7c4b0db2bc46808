"""Where the fused kernel can serve, and its launch.

On an NVIDIA GPU with Triton the whole batch is written once, without a copy of any kind and without
waiting for the device. Everywhere else noising.py's torch path does the same arithmetic.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import torch
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
    """Whether Triton can build and run the kernel here: it may lack a C compiler, or know no such GPU."""
    if torch.version.cuda is None:
        return False
    x = torch.zeros((1, 16), dtype=dtype, device=f"cuda:{device}")
    try:
        fill(x[None].clone(), x, torch.ones(2), 1, (0,), "independent", False, PhiloxDraws((0,), (16,)), None)
    except Exception:  # whatever Triton raises, the torch path still works
        return False
    return True


def fill(
    z: Tensor, x: Tensor, factors: Tensor, clean: int, kept: tuple[int, ...], kind: str, flow: bool,
    draws: PhiloxDraws | None, noise: Tensor | None,
) -> None:  # fmt: skip
    """Writes every kept level of a walk into z with one kernel.

    Arguments:
        z: The output with shape (L, B, C, [T,] H, W), contiguous.
        x: Clean latents with shape (B, C, [T,] H, W).
        factors: The whole schedule with shape (n + 1), or for ``path`` the factors (of z, of the
            noise) of each level from the least noisy on, with shape (n - e, 2); float32 on the CPU.
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
    with torch.cuda.device(x.device.index):
        kernels().unsample[(blocks * -(-levels // chunk),)](
            z, x, x if noise is None else noise.contiguous(), _table(factors, draws, images, x.device),
            size, images, levels, chunk, clean, kept[0], _stride(kept),
            kind if noise is None else "given", flow, block,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _table(factors: Tensor, draws: PhiloxDraws | None, images: int, device: torch.device) -> Tensor:
    """Keys (two words an image), then the factors' words, on the device in one copy."""
    keys = torch.from_numpy(np.array(draws.seeds if draws else [0] * images, np.uint64).view(np.int32))
    staged = torch.cat([keys, factors.view(torch.int32).flatten()])
    if staged.nbytes > STAGED_BYTES:
        staged = staged.pin_memory()
    return staged.to(device, non_blocking=True)
