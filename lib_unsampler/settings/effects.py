"""What was asked for and changes nothing, or less than it says: remarks by one table for every surface.

The table is :mod:`.needs`. A bad value is an error (:mod:`.parsing`); here are good
values that the rest of the request does not use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from .fields import OUTPUTS, Settings
from .needs import RECORDED, Need, is_used, ways


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
    values = {**vars(settings), "output": tuple(outputs)}
    values["trajectory"] = settings.trajectory or ("" if walked else SAVED)
    if settings.resample_cfg < 0:
        values["resample_cfg"] = settings.cfg
    lacking = [f for f in fields(Settings) if f.name in given and not is_used(f, values)]
    return [f"{f.name}: has no effect {_why(f, values, called)}" for f in lacking]


SAVED = "(saved)"
"""Stands for the command line's trajectory, which is no field of its."""


def _why(f: Any, values: Mapping[str, Any], called: Mapping[str, str]) -> str:
    """Why a field has no effect: what is missing in the way that comes nearest, and an output that would do alone."""
    missing = {way: next(n for n, need in enumerate(way) if not need.holds(values)) for way in ways(f)}
    there = {way: n for way, n in missing.items() if _is_there(way[n], called)}
    nearest = max((there or missing).values())
    said = [
        _said(way[n], values, called)
        for way, n in (there or missing).items()
        if n == nearest or (n == 0 and way[n].field == "output")
    ]
    return " ".join(dict.fromkeys(said))


def _is_there(need: Need, called: Mapping[str, str]) -> bool:
    """Whether a surface has what a need asks for."""
    return need.field != "output" or any(o in (called or OUTPUTS) for o in need.values)


def _said(need: Need, values: Mapping[str, Any], called: Mapping[str, str]) -> str:
    """A need that is not met, in words."""
    name, value = need.field, values[need.field]
    if name == "mode":
        return f"in mode {value}"
    if name == "output":
        there = [o for o in need.values if o in (called or OUTPUTS)]
        why = ", for which a replay is recorded" if need.values == RECORDED else ""
        return f"without {' or '.join(called.get(o, o) for o in there or need.values)}{why}"
    if name == "trajectory":
        return "on a saved trajectory" if value == SAVED else "with trajectory, whose levels are made already"
    if name in ("cfg", "resample_cfg"):
        return "at cfg 1, which is the positive prompt alone"
    return f"without {name}" if value is False else f"with {name.replace('_', '-')} {value}"


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
