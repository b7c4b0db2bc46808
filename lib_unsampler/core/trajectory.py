"""Trajectory: the noise levels of one run, with all that is needed to go on from them.

The file is safetensors: tensors ``z`` (levels, images, C, [T,] H, W), ``sigmas`` (levels),
``schedule`` (n + 1) and ``source`` (images, C, [T,] H, W), with a mask also ``mask``, where sampling began
elsewhere than at the last z also ``handoff``, of a replay also ``states``, ``maps`` and ``residual``, and text
metadata. Loading never unpickles anything.

Format 2 holds z as the sampler knows it, unmasked. Format 1 held, with a mask, the source outside it (``blended``),
and the unmasked last level as ``handoff``: all that such a file can be sampled from.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import whole
from .kept import Kept, data_of, finite
from .replay import Recording
from .soundness import DTYPES, bad_values, misfits

FORMAT = "batch-unsampler-trajectory"
VERSION = 2
BARE_TENSORS = ("z", "sigmas", "schedule", "source")
MASK_TENSORS = ("mask", "handoff")
REPLAY_TENSORS = ("states", "maps", "residual")


class TrajectoryError(ValueError):
    """A file that is not a whole, known trajectory, or tensors that do not fit together or hold what none can."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Noise levels of a batch of images, least noisy first.

    Attributes:
        z: Latents with shape (L, B, C, [T,] H, W), unmasked unless ``blended``.
        sigmas: The levels' sigmas, rising, with shape (L).
        schedule: The whole descending schedule the levels are from, to where sampling ends, with shape (n + 1).
        start: The index in ``schedule`` of the noisiest level, where sampling goes on.
        source: The clean latents with shape (B, C, [T,] H, W).
        prediction: ``eps``, ``v`` or ``flow``.
        seeds: One seed per image.
        mask: With a mask, its weights, broadcastable against ``source``; else None.
        handoff: Where sampling goes on from, with the shape of ``source``, if that is not ``z[-1]``: with extra
            noise, or where z is ``blended`` (a model must not see a clean border at a high noise level).
        replay: The source as a sampler's noises, made on the end of ``schedule`` from ``start`` or
            later; None unless the run was a replay.
        settings: The request's fields, as plain values.
        info: Anything else worth keeping as text (model name, host).
        blended: Whether z is the source outside the mask, as in masked files of format 1.
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
    blended: bool = False

    def __post_init__(self) -> None:
        found = misfits(self)
        if found:
            raise TrajectoryError("; ".join(found))

    @property
    def latent(self) -> Tensor:
        """The latent from which sampling goes on, with shape (B, C, [T,] H, W)."""
        return self.z[-1] if self.handoff is None else self.handoff

    @property
    def remaining(self) -> Tensor:
        """The schedule from the hand-off level to where sampling ends."""
        return self.schedule[self.start :]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the file."""
        own = {name: getattr(self, name) for name in (*BARE_TENSORS, *MASK_TENSORS)}
        replayed = {} if self.replay is None else {name: getattr(self.replay, name) for name in REPLAY_TENSORS}
        return {name: tensor for name, tensor in (own | replayed).items() if tensor is not None}


def of_walk(
    schedule: Tensor,
    indices: Sequence[int],
    z: Tensor,
    source: Tensor,
    prediction: str,
    *,
    mask: Tensor | None,
    handoff: Tensor | None = None,
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
        handoff: Where sampling began, if not at the noisiest level.
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
        handoff=None if handoff is None else handoff.cpu(),
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
    if trajectory.blended and start != trajectory.start:
        raise TrajectoryError("of a masked file of format 1, only the noisiest level is kept unmasked")
    count = int(found[-1]) + 1
    fits = trajectory.replay is not None and len(trajectory.replay.states) <= len(trajectory.schedule) - 1 - start
    replay = trajectory.replay if fits else None
    handoff = trajectory.handoff if start == trajectory.start else None
    z, sigmas = trajectory.z[:count], trajectory.sigmas[:count]
    return replace(trajectory, z=z, sigmas=sigmas, start=start, handoff=handoff, replay=replay)


def save(trajectory: Trajectory, path: Path, kept: Kept | None = None) -> None:
    """Writes a trajectory file; it appears under its name only when whole.

    Arguments:
        kept: The data of ``trajectory.z``, where that is only an outline.

    Raises:
        TrajectoryError: for blended levels, which are of format 1, and for values that are not finite.
    """
    if trajectory.blended:
        raise TrajectoryError("blended levels are of format 1, which is no longer written")
    tensors = trajectory.tensors()
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "prediction": trajectory.prediction,
        "start": str(trajectory.start),
        "end": repr(float(trajectory.schedule[-1])),
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
            for part_of_it in kept.tensors() if name == "z" and kept is not None else [tensor]:
                if not finite(part_of_it):
                    raise TrajectoryError(f"{name} holds values that are not finite")
                file.write(data_of(part_of_it))


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
    """Reads a trajectory file, and all that it holds.

    Raises:
        FileNotFoundError: if there is none.
        TrajectoryError: if it is damaged, foreign, newer, does not fit together or holds what no run makes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        read = _read(path)
        found = bad_values(read)
        if found:
            raise TrajectoryError("; ".join(found))
        return read
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


def _read(path: Path) -> Trajectory:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        _check_version(metadata)
        masked = set(MASK_TENSORS) & set(file.keys())
        tensors = {name: file.get_tensor(name) for name in (*BARE_TENSORS, *masked)}
        maps = {name: file.get_tensor(name) for name in REPLAY_TENSORS} if "replay" in metadata else {}
    schedule, end = tensors["schedule"], float(metadata.get("end", 0))  # before there was a key, all ended at 0
    if schedule.ndim == 1 and len(schedule) and float(schedule[-1]) != end:
        raise TrajectoryError(f"the schedule ends at {float(schedule[-1]):g}, and sampling ended at {end:g}")
    return Trajectory(
        **tensors,
        replay=_recording(maps, metadata["replay"], schedule) if maps else None,
        start=int(metadata["start"]),
        prediction=metadata["prediction"],
        seeds=tuple(json.loads(metadata["seeds"])),
        settings=_words(metadata, "settings"),
        info=_words(metadata, "info"),
        blended=metadata["version"] == "1" and bool(masked),
    )


def _words(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    told = json.loads(metadata[name])
    if not isinstance(told, dict):
        raise TrajectoryError(f"{name}: not names and values")
    return told


def _recording(tensors: Mapping[str, Tensor], about: str, schedule: Tensor) -> Recording:
    told = json.loads(about)
    if not all(type(step) is int for step in told["steps"]):
        raise TrajectoryError(f"the replay's steps {told['steps']} are not whole numbers")
    return Recording(
        **tensors,
        sigmas=schedule[-len(tensors["states"]) - 1 :],
        sampler=str(told["sampler"]),
        options=dict(told["options"]),
        steps=tuple(told["steps"]),
    )


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise TrajectoryError("a safetensors file, but not a Batch Unsampler trajectory")
    version = int(metadata["version"])
    if version < 1:
        raise TrajectoryError(f"written in format {version}, which there has never been")
    if version > VERSION:
        raise TrajectoryError(
            f"written in format {version} by a newer Batch Unsampler; this one reads up to {VERSION}: update it"
        )
