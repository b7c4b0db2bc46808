"""Levels kept one after the other, in memory or on disk: what is made once and read again need not all be held."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..files import naming, spool


class Store(Protocol):
    """What takes levels of one shape and type, and gives them back as one tensor; on exit it takes no more."""

    def __enter__(self) -> Store: ...
    def __exit__(self, *_: object) -> None: ...

    def add(self, z: Tensor) -> None:
        """Takes a copy of the next level, with shape (B, C, [T,] H, W)."""

    def stack(self) -> Tensor:
        """All levels, with shape (L, B, C, [T,] H, W); L is at least 1. It outlives the store."""


class InMemory:
    """Levels in memory, on their own device."""

    def __init__(self) -> None:
        self._levels: list[Tensor] = []

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._levels.clear()

    def add(self, z: Tensor) -> None:
        """As :class:`Store` says."""
        self._levels.append(z.clone())

    def stack(self) -> Tensor:
        """As :class:`Store` says."""
        return torch.stack(self._levels)


class Kept:
    """Levels on disk; the file has no name and is gone with the store and what :meth:`stack` gave."""

    def __init__(self, path: Path) -> None:
        """``path`` is a file to be: its folder has room for the levels, or else nothing is begun."""
        self._path = path
        self._stack = ExitStack()
        self._file = self._stack.enter_context(spool(path))
        self._count = 0
        self._level = torch.empty(0, device="meta")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, z: Tensor) -> None:
        """As :class:`Store` says."""
        self._level = torch.empty_like(z, device="meta")
        with naming(self._path):
            self._file.write(data_of(z))
        self._count += 1

    def stack(self) -> Tensor:
        """As :class:`Store` says: on the CPU, a map of the file, of which the system holds in memory what it likes."""
        with naming(self._path):
            self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0)
        return torch.frombuffer(mapped, dtype=self._level.dtype).reshape(self._count, *self._level.shape)

    @property
    def outline(self) -> Tensor:
        """A tensor of the levels' shape and type without their data."""
        return self._level.expand(self._count, *self._level.shape)

    def tensors(self) -> Iterator[Tensor]:
        """Every level, as it was taken, on the CPU."""
        for data in self:
            yield torch.frombuffer(bytearray(data), dtype=self._level.dtype).reshape(self._level.shape)

    def __iter__(self) -> Iterator[bytes]:
        """Every level's data."""
        with naming(self._path):
            self._file.seek(0)
        length = self._level.element_size() * self._level.numel()
        return (self._file.read(length) for _ in range(self._count))


def data_of(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in memory, row after row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number; looked at a level at a time."""
    return all(bool(part.isfinite().all()) for part in (tensor if tensor.ndim else [tensor]))
