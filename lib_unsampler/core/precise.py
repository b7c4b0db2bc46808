"""float32 products of matrices in float32, whatever precision a host allows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

KINDS: tuple[Any, ...] = tuple(
    kind
    for kind in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(kind, "fp32_precision")
)
"""What has the setting in PyTorch from 2.9 on; set by it alone, what was set by its older name stays as it was."""


@contextmanager
def precise() -> Iterator[None]:
    """Within it, or within a function that it decorates, nothing is rounded to TensorFloat-32 or bfloat16.

    A1111 allows the former: its 10 bits do for a model, but not for what a solver's step misses by.
    """
    allowed = [kind.fp32_precision for kind in KINDS] or torch.get_float32_matmul_precision()
    _set(["ieee"] * len(KINDS) or "highest")
    try:
        yield
    finally:
        _set(allowed)


def _set(precision: list[str] | str) -> None:
    """Of each of KINDS; of all products, where there are none."""
    if isinstance(precision, str):
        torch.set_float32_matmul_precision(precision)
    else:
        for kind, own in zip(KINDS, precision):
            kind.fp32_precision = own
