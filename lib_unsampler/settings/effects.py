"""What was asked for and changes nothing, or less than it says: remarks by one table for every surface.

The table is the fields' own ``modes`` and ``outputs``. A bad value is an error (:mod:`.parsing`); here are good
values that the rest of the request does not use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from .fields import Settings

RECORDED = {"latents", "init", "resample"}
"""Outputs for which a replay's noises are found at all."""


def remarks(
    settings: Settings,
    given: Collection[str],
    outputs: Collection[str],
    *,
    walked: bool = True,
    called: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """A sentence for each field that was given and has no effect.

    Arguments:
        settings: The request.
        given: The fields that somebody set, to something else than would have been there anyway.
        outputs: What is made, ``resample`` and ``report`` of the command line included.
        walked: Whether the levels are made now; of a saved trajectory they are what they are.
        called: The outputs' names for the user, where they are not their own.
    """
    found = {f.name: _why(f, settings, set(outputs), walked, called) for f in fields(Settings) if f.name in given}
    return [f"{name}: has no effect {why}" for name, why in found.items() if why]


def _why(f: Any, settings: Settings, outputs: set[str], walked: bool, called: Mapping[str, str]) -> str:
    """Why a field has no effect; empty if it has."""
    name, modes, uses = f.name, f.metadata["modes"], f.metadata["outputs"]
    without = f"without {' or '.join(called.get(o, o) for o in uses)}"
    by_output = bool(outputs & set(uses))
    if not walked and modes and not by_output:
        return without if uses else "on a saved trajectory"
    if modes and settings.mode not in modes and not by_output:
        return f"in mode {settings.mode}" + (f" {without}" if uses and "resample" in called else "")
    if uses and not modes and not by_output:
        return without
    if name in ("tolerance", "max_calls") and settings.solver != "exact":
        return "with solver reverse"
    if name in ("negative", "resample_negative") and not _guided(settings, outputs, name):
        return "at cfg 1, which is the positive prompt alone"
    if settings.mode == "replay" and modes and name not in ("noise", "normalize", "seed"):
        if settings.trajectory and name != "skip":
            return "with trajectory, whose noises are recorded already"
        if not outputs & RECORDED:
            recorded = " or ".join(called.get(o, o) for o in sorted(RECORDED) if not called or o in called)
            return f"without {recorded}, for which a replay is recorded"
    return ""


def _guided(settings: Settings, outputs: set[str], name: str) -> bool:
    """Whether a negative prompt is looked at."""
    scales = [settings.cfg] if name == "negative" else []
    if "resample" in outputs and not (name == "negative" and settings.resample_negative):
        scales.append(settings.cfg if settings.resample_cfg < 0 else settings.resample_cfg)
    return any(scale != 1 for scale in scales)


def clamped(settings: Settings, levels: int) -> list[str]:
    """A sentence for each count that goes beyond the schedule, and what is taken instead.

    Arguments:
        levels: The noisy levels of the whole schedule.
    """
    said, end = [], max(settings.end_at_step, 0)
    if end >= levels:
        said.append(
            f"end_at_step: {end} is not one of the {levels} steps; {levels - 1} is taken, so that a level remains"
        )
    remaining = max(1, levels - end)
    if settings.mode == "replay" and settings.skip >= remaining:
        said.append(
            f"skip: {settings.skip} is not below the {remaining} steps; {remaining - 1} is taken, so that one remains"
        )
    return said
