"""When a field changes anything: one table, by which pages hide fields and every surface says what has no effect.

A field is used where one of its *ways* holds, and a way holds where all of its needs do. Most follow from the field's
own ``modes`` and ``outputs`` (either is enough); here is what needs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .combinations import FILE_OWNED
from .fields import SHOWN

RECORDED = ("init", "latents", "resample")
"""Outputs for which a replay's noises are found at all."""


@dataclass(frozen=True)
class Need:
    """Another field has one of these values; ``unless``: it has none of them."""

    field: str
    values: tuple[Any, ...]
    unless: bool = False

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it does, under these values of all fields."""
        value = values[self.field]
        several = isinstance(value, (tuple, list, set, frozenset))
        return bool(set(value if several else (value,)) & set(self.values)) is not self.unless


Way = tuple[Need, ...]

WALKED = Need("trajectory", ("",))
"""A latents file's levels are made already."""
GUIDED = Need("cfg", (1.0,), unless=True)
"""At scale 1 the negative prompt is not looked at."""
RESAMPLING_GUIDED = Need("resample_cfg", (1.0,), unless=True)

MORE: dict[str, Way] = {
    **dict.fromkeys(FILE_OWNED, (WALKED,)),
    "tolerance": (Need("solver", ("exact",)),),
    "max_calls": (Need("solver", ("exact",)),),
    "panel": (Need("mode", ("invert",)),),
    "report": (Need("mode", ("invert",)),),
    "film": (Need("output", SHOWN),),
    "film_view": (Need("output", SHOWN), Need("film", ("sampling", "both"))),
    "resample_negative": (RESAMPLING_GUIDED,),
}
"""What a field needs besides its modes and outputs, in every way."""

RECORDS = ("cfg", "positive", "negative", "sampler", "skip")
"""Fields that a replay uses only where it finds noises, or has them."""


def ways(f: Any) -> tuple[Way, ...]:
    """The ways in which a field is used."""
    name, modes, outputs = f.name, f.metadata["modes"], f.metadata["outputs"]
    found: list[Way] = []
    if modes:
        walked = () if name == "skip" else (WALKED,)
        guided = (GUIDED,) if name == "negative" else ()
        others = tuple(mode for mode in modes if mode != "replay" or name not in RECORDS)
        if others:
            found.append((Need("mode", others), WALKED, *guided))
        if others != modes:
            found.append((Need("mode", ("replay",)), *walked, Need("output", RECORDED), *guided))
    if outputs:
        found += _by_output(name, outputs)
    more = MORE.get(name, ())
    return tuple((*way, *more) for way in found or [()])


def _by_output(name: str, outputs: tuple[str, ...]) -> list[Way]:
    """The ways that outputs open; of a resampling they hang on how it is done."""
    if name.startswith("guide_") and "resample" in outputs:
        return [(Need("output", ("guide",)),), (Need("output", ("resample",)), Need("guide", (True,)))]
    if name == "negative":
        return [(Need("output", outputs), RESAMPLING_GUIDED, Need("resample_negative", ("",)))]
    return [(Need("output", outputs),)]


def is_used(f: Any, values: Mapping[str, Any]) -> bool:
    """Whether a field changes anything under these values of all fields."""
    return any(all(need.holds(values) for need in way) for way in ways(f))
