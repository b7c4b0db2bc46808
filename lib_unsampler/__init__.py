"""Batch Unsampler: every noise level of a diffusion schedule, from one picture, as one batch.

What people who script the core need is here by name, and imported when it is asked for:
``import lib_unsampler`` loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

HOMES = {
    "levels": "schedule",
    "unsample": "noising",
    "add_noise": "noising",
    "SeededDraws": "noising",
    "invert": "inversion",
    "record": "replay",
    "replay": "replay",
    "Trajectory": "trajectory",
    "save": "trajectory",
    "load": "trajectory",
}
"""The file of ``core`` that each public name comes from."""


def __getattr__(name: str) -> Any:
    """A public name, from where it lives (PEP 562)."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.core.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
