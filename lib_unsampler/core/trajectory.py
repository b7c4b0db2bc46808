"""Trajectory: the noise levels of one run, with all that is needed to go on from them.

The file is safetensors: tensors ``z`` (levels, images, C, [T,] H, W), ``sigmas`` (levels),
``schedule`` (n + 1) and ``source`` (images, C, [T,] H, W), with a mask also ``mask`` and
``handoff``, of a replay also ``states``, ``maps`` and ``residual``, and text metadata. Loading never
unpickles anything.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import naming, spool, whole
from .noising import PREDICTIONS
from .replay import Recording

FORMAT = "batch-unsampler-trajectory"
VERSION = 1
TENSORS = ("z", "sigmas", "schedule", "source")
MASK_TENSORS = ("mask", "handoff")
REPLAY_TENSORS = ("states", "maps", "residual")


class TrajectoryError(ValueError):
    """A file that is not a whole, known trajectory, or tensors that do not fit together."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Noise levels of a batch of images, least noisy first.

    Attributes:
        z: Latents with shape (L, B, C, [T,] H, W); outside a mask they are the source.
        sigmas: The levels' sigmas, rising, with shape (L).
        schedule: The whole descending schedule the levels are from, ending in 0, with shape (n + 1).
        start: The index in ``schedule`` of the noisiest level, where sampling goes on.
        source: The clean latents with shape (B, C, [T,] H, W).
        prediction: ``eps``, ``v`` or ``flow``.
        seeds: One seed per image.
        mask: With a mask, its weights, broadcastable against ``source``; else None.
        handoff: With a mask, the noisiest level *unmasked*: a model must not see a clean border
            at a high noise level. None without a mask, where it is ``z[-1]``.
        replay: The source as a sampler's noises, made on the end of ``schedule`` from ``start`` or
            later; None unless the run was a replay.
        settings: The request's fields, as plain values.
        info: Anything else worth keeping as text (model name, host).
    """

    z: Tensor
    sigmas: Tensor
    schedule: Tensor
    start: int
    source: Tensor
    prediction: str
    seeds: tuple[int, ...]
    mask: Tensor | None = None
    handoff: Tensor | None = None
    replay: Recording | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, count = tuple(self.source.shape), len(self.schedule)
        if self.prediction not in PREDICTIONS:
            raise TrajectoryError(f"prediction {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if self.source.ndim not in (4, 5) or self.z.shape[1:] != self.source.shape or len(self.z) == 0:
            raise TrajectoryError(f"z {tuple(self.z.shape)} does not fit source {shape}")
        if self.sigmas.shape != self.z.shape[:1]:
            raise TrajectoryError(f"sigmas {tuple(self.sigmas.shape)} do not fit z {tuple(self.z.shape)}")
        if len(self.seeds) != len(self.source):
            raise TrajectoryError(f"{len(self.seeds)} seeds do not fit {len(self.source)} images")
        if self.schedule.ndim != 1 or not self.schedule.isfinite().all() or (self.schedule.diff() > 0).any():
            raise TrajectoryError("the schedule does not descend")
        if (self.sigmas.diff() < 0).any() or not torch.isin(self.sigmas, self.schedule).all():
            raise TrajectoryError("the sigmas are not rising levels of the schedule")
        if not 0 <= self.start < count or self.schedule[self.start] != self.sigmas[-1]:
            raise TrajectoryError(f"start {self.start} does not name the noisiest level in the schedule of {count}")
        if (self.mask is None) != (self.handoff is None):
            raise TrajectoryError("mask and handoff come together")
        if self.handoff is not None and tuple(self.handoff.shape) != shape:
            raise TrajectoryError(f"handoff {tuple(self.handoff.shape)} does not fit source {shape}")
        if self.mask is not None and not _broadcasts(tuple(self.mask.shape), shape):
            raise TrajectoryError(f"mask {tuple(self.mask.shape)} does not fit source {shape}")
        if self.replay is not None:
            steps = len(self.replay.states)
            if tuple(self.replay.residual.shape) != shape or not 1 <= steps <= count - 1 - self.start:
                raise TrajectoryError(f"states {tuple(self.replay.states.shape)} do not fit source {shape} and start")
            if not torch.equal(self.replay.sigmas.cpu().float(), self.schedule.cpu().float()[-steps - 1 :]):
                raise TrajectoryError("the maps were made on another schedule")

    @property
    def latent(self) -> Tensor:
        """The latent from which sampling goes on, with shape (B, C, [T,] H, W)."""
        return self.z[-1] if self.handoff is None else self.handoff

    @property
    def remaining(self) -> Tensor:
        """The schedule from the hand-off level to 0."""
        return self.schedule[self.start :]


def of_walk(
    schedule: Tensor,
    indices: Sequence[int],
    z: Tensor,
    source: Tensor,
    prediction: str,
    *,
    mask: Tensor | None,
    last: Tensor,
    **about: Any,
) -> Trajectory:
    """The trajectory of a walk through a schedule.

    Arguments:
        schedule: The whole descending schedule, with shape (n + 1).
        indices: The kept levels' schedule indices, least noisy first.
        z: Their latents or only an outline of them, with shape (L, B, C, [T,] H, W).
        source: Clean latents with shape (B, C, [T,] H, W).
        prediction: ``eps``, ``v`` or ``flow``.
        mask: Weights that broadcast against the source, or None.
        last: The noisiest level, unmasked.
        about: Its other attributes.
    """
    return Trajectory(
        z=z,
        sigmas=schedule[list(indices)],
        schedule=schedule,
        start=indices[-1],
        source=source.cpu(),
        prediction=prediction,
        mask=None if mask is None else mask.cpu().float(),
        handoff=None if mask is None else last.cpu(),
        **about,
    )


def cut(trajectory: Trajectory, start: int) -> Trajectory:
    """The same walk, ended at a less noisy level.

    Raises:
        TrajectoryError: if that level is not in it, or its unmasked state was not kept.
    """
    inside = trajectory.start <= start < len(trajectory.schedule)
    found = (trajectory.sigmas == trajectory.schedule[start if inside else trajectory.start]).nonzero()
    if not inside or len(found) == 0:
        raise TrajectoryError(f"step {start} is not one of the levels that were kept")
    if trajectory.handoff is not None and start != trajectory.start:
        raise TrajectoryError("with a mask, only the noisiest level is kept unmasked")
    count = int(found[-1]) + 1
    fits = trajectory.replay is not None and len(trajectory.replay.states) <= len(trajectory.schedule) - 1 - start
    replay = trajectory.replay if fits else None
    return replace(trajectory, z=trajectory.z[:count], sigmas=trajectory.sigmas[:count], start=start, replay=replay)


def _broadcasts(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(onto))
    return len(shape) <= len(onto) and all(one in (1, other) for one, other in pairs)


class Kept:
    """The levels of a trajectory that is being made, on disk one after the other; forgotten on exit."""

    def __init__(self, path: Path) -> None:
        """``path`` is the trajectory file to be: its folder has room for it, or else nothing is begun."""
        self._path = path
        self._file = spool(path)
        self._count = 0
        self._level = torch.empty(0, device="meta")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, z: Tensor) -> None:
        """Takes the next noisier level, with shape (B, C, [T,] H, W)."""
        self._level = torch.empty_like(z, device="meta")
        with naming(self._path):
            self._file.write(_bytes(z))
        self._count += 1

    @property
    def outline(self) -> Tensor:
        """A tensor of the levels' shape and type without their data."""
        return self._level.expand(self._count, *self._level.shape)

    def __iter__(self) -> Iterator[bytes]:
        """Every level's data."""
        self._file.seek(0)
        length = self._level.element_size() * self._level.numel()
        return (self._file.read(length) for _ in range(self._count))


DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The types of latents by their names in safetensors."""


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def save(trajectory: Trajectory, path: Path, kept: Kept | None = None) -> None:
    """Writes a trajectory file; it appears under its name only when whole.

    Arguments:
        kept: The data of ``trajectory.z``, where that is only an outline.
    """
    names = TENSORS if trajectory.mask is None else TENSORS + MASK_TENSORS
    tensors = {name: getattr(trajectory, name) for name in names}
    if trajectory.replay is not None:
        tensors |= {name: getattr(trajectory.replay, name) for name in REPLAY_TENSORS}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "prediction": trajectory.prediction,
        "start": str(trajectory.start),
        "seeds": json.dumps(list(trajectory.seeds)),
        "settings": json.dumps(dict(trajectory.settings)),
        "info": json.dumps(dict(trajectory.info)),
    }
    if trajectory.replay is not None:
        about = {name: getattr(trajectory.replay, name) for name in ("sampler", "options", "steps")}
        metadata["replay"] = json.dumps(about)
    with whole(path) as part, part.open("wb") as file:
        file.write(_head(tensors, metadata))
        for name, tensor in tensors.items():
            for data in kept if name == "z" and kept is not None else [_bytes(tensor)]:
                file.write(data)


def _head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: the header's length, then a JSON of types, shapes and places."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # data aligned for every type
    return struct.pack("<Q", len(text)) + text


def load(path: Path) -> Trajectory:
    """Reads a trajectory file.

    Raises:
        FileNotFoundError: if there is none.
        TrajectoryError: if it is damaged, foreign, newer, or does not fit together.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(metadata)
            masked = set(MASK_TENSORS) & set(file.keys())
            tensors = {name: file.get_tensor(name) for name in (*TENSORS, *masked)}
            maps = {name: file.get_tensor(name) for name in REPLAY_TENSORS} if "replay" in metadata else {}
        return Trajectory(
            **tensors,
            replay=_recording(maps, metadata["replay"], tensors["schedule"]) if maps else None,
            start=int(metadata["start"]),
            prediction=metadata["prediction"],
            seeds=tuple(json.loads(metadata["seeds"])),
            settings=dict(json.loads(metadata["settings"])),
            info=dict(json.loads(metadata["info"])),
        )
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from None
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise TrajectoryError(f"{path}: not a readable trajectory file ({error})") from None


def check(path: Path) -> None:
    """Raises TrajectoryError unless a file's head says that it is a trajectory which this version reads."""
    try:
        with safe_open(path, framework="pt") as file:
            _check_version(file.metadata() or {})
    except TrajectoryError as error:
        raise TrajectoryError(f"{path.name}: {error}") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise TrajectoryError(f"{path.name}: not a readable trajectory file ({error})") from None


def _recording(tensors: Mapping[str, Tensor], about: str, schedule: Tensor) -> Recording:
    told = json.loads(about)
    return Recording(
        **tensors,
        sigmas=schedule[-len(tensors["states"]) - 1 :],
        sampler=str(told["sampler"]),
        options=dict(told["options"]),
        steps=tuple(map(int, told["steps"])),
    )


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise TrajectoryError("a safetensors file, but not a Batch Unsampler trajectory")
    version = int(metadata["version"])
    if version > VERSION:
        raise TrajectoryError(
            f"written in format {version} by a newer Batch Unsampler; this one reads up to {VERSION}: update it"
        )
