"""A digest of values, so that what depends on nothing else need not be computed twice."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEPTH = 12


def fingerprint(*parts: Any) -> str:
    """The same text for equal values, and another for others.

    Numbers, text, tensors, arrays, pictures, and lists, mappings and objects of them. What cannot be
    looked into has another text each time, so a doubt never makes two values equal.
    """
    digest = hashlib.sha256()
    for piece in _pieces(parts, DEPTH):
        digest.update(len(piece).to_bytes(8, "big") + piece)
    return digest.hexdigest()


def _pieces(value: Any, depth: int) -> Iterator[bytes]:
    yield type(value).__qualname__.encode()
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        yield from _array(value.detach().cpu().reshape(-1).view(torch.uint8).numpy() if value.numel() else None)
        yield f"{value.dtype} {tuple(value.shape)}".encode()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield from _array(value)
        yield f"{value.dtype} {value.shape}".encode()
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a Pillow picture
        yield value.tobytes()
        yield f"{value.mode} {value.size}".encode()
    else:
        yield from _inside(value, depth)


def _array(array: NDArray[Any] | None) -> Iterator[bytes]:
    yield b"" if array is None else np.ascontiguousarray(array).tobytes()


def _inside(value: Any, depth: int) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        members: Any = sorted(value.items(), key=lambda item: repr(item[0]))
    elif isinstance(value, (list, tuple)):
        members = enumerate(value)
    elif isinstance(value, (set, frozenset)):
        members = enumerate(sorted(value, key=repr))
    elif hasattr(value, "__qualname__"):
        members = [("name", f"{value.__module__}.{value.__qualname__}")]
    elif hasattr(value, "__dict__"):
        members = sorted(vars(value).items())
    else:
        members = None
    if members is None or depth == 0:
        yield uuid.uuid4().bytes
        return
    for key, member in members:
        yield repr(key).encode()
        yield from _pieces(member, depth - 1)
    yield b"end"
