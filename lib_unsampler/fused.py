"""Where the fused kernel can serve, and its launch.

On an NVIDIA GPU with Triton the whole batch is written once, without a copy of any kind and without
waiting for the device. Everywhere else noising.py's torch path does the same arithmetic.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from .philox import PhiloxDraws

try:
    from . import kernels
except ImportError:  # no Triton: Windows, macOS, torch for the CPU
    kernels = None

STEP = np.dtype([("signal", np.float32), ("noise", np.float32), ("draw", np.int32), ("slot", np.int32)])
"""One level of a walk: ``z = noise * draw(j) + signal * base``, kept at ``slot`` (-1: walked through)."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEVELS_PER_PROGRAM = 64
PROGRAMS = 4096
"""Enough for any GPU's multiprocessors; levels are split no finer than that takes."""

STAGED_BYTES = 2**16
"""CUDA takes copies up to this size at once; larger ones wait for the device, unless page-locked."""


def serves(x: Tensor, philox: bool, kind: str) -> bool:
    """Whether :func:`fill` can write this batch: noise that is drawn once, or that it can compute.

    Arguments:
        x: Clean latents with shape (B, C, [T,] H, W).
        philox: Whether the noise is that of :class:`PhiloxDraws`, unchanged.
        kind: ``shared``, ``independent`` or ``path``.
    """
    if kernels is None or not x.is_cuda or x.dtype not in DTYPES or not 0 < x.numel() < 2**31:
        return False
    return (philox or kind == "shared") and _compiles(x.device.index, x.dtype)


@cache
def _compiles(device: int, dtype: torch.dtype) -> bool:
    """Whether Triton can build and run the kernel here: it may lack a C compiler, or know no such GPU."""
    if torch.version.cuda is None:
        return False
    x = torch.zeros((1, 16), dtype=dtype, device=f"cuda:{device}")
    steps = np.array([(1.0, 1.0, 0, 0)], STEP)
    try:
        fill(torch.empty_like(x)[None], x, steps, "independent", False, PhiloxDraws((0,), (16,)), None)
    except Exception:  # whatever Triton raises, the torch path still works
        return False
    return True


def fill(
    z: Tensor, x: Tensor, steps: np.ndarray, kind: str, flow: bool, draws: PhiloxDraws | None, noise: Tensor | None
) -> None:
    """Writes every kept level of a walk into z with one kernel.

    Arguments:
        z: The output with shape (L, B, C, [T,] H, W), contiguous.
        x: Clean latents with shape (B, C, [T,] H, W).
        steps: The levels, least noisy first, of dtype :data:`STEP`.
        kind: ``shared``, ``independent`` or ``path``.
        flow: Whether ``signal`` can differ from 1.
        draws: The source of noise, or None if ``noise`` is given.
        noise: ``shared``'s noise with the shape of x, float32.
    """
    images, size, levels = x.shape[0], x.numel() // x.shape[0], len(steps)
    # A path's levels cannot be split over programs: small blocks, and unrolling to keep them busy.
    block, warps, unroll = (256, 8, 2) if kind == "path" else (512, 2, 1)
    blocks = -(-size // block) * images
    chunk = levels if kind == "path" else min(max(levels * blocks // PROGRAMS, 1), LEVELS_PER_PROGRAM)
    x = x.contiguous()
    with torch.cuda.device(x.device.index):
        kernels.unsample[(blocks * -(-levels // chunk),)](
            z, x, x if noise is None else noise.contiguous(), _table(steps, draws, images, x.device),
            size, images, levels, chunk, kind if noise is None else "given", flow, block, unroll,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _table(steps: np.ndarray, draws: PhiloxDraws | None, images: int, device: torch.device) -> Tensor:
    """Keys (two words an image), then steps (four words each), on the device in one copy."""
    keys = np.array(draws.seeds if draws else [0] * images, np.uint64)
    staged = torch.from_numpy(np.concatenate([keys.view(np.int32), steps.view(np.int32)]))
    if staged.nbytes > STAGED_BYTES:
        staged = staged.pin_memory()
    return staged.to(device, non_blocking=True)
