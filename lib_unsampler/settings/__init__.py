"""Every field, once, with what reads and writes it. Standard library only: `--help` and parse errors need no torch."""

from .fields import (
    FORMATS,
    MODELS,
    OUTPUTS,
    SAMPLERS,
    SCHEDULERS,
    STOCHASTIC,
    TITLE,
    Preferences,
    Settings,
    allowed,
    surface_fields,
    whole_help,
)
from .infotext import INFOTEXT_PREFIX, VERSION_KEY, from_infotext, infotext_key, pasted, to_infotext
from .parsing import Pasted, SettingsError, named, parse, parse_args, parse_preferences, read

__all__ = [
    "FORMATS",
    "INFOTEXT_PREFIX",
    "MODELS",
    "OUTPUTS",
    "SAMPLERS",
    "SCHEDULERS",
    "STOCHASTIC",
    "TITLE",
    "VERSION_KEY",
    "Pasted",
    "Preferences",
    "Settings",
    "SettingsError",
    "allowed",
    "from_infotext",
    "infotext_key",
    "named",
    "parse",
    "parse_args",
    "parse_preferences",
    "pasted",
    "read",
    "surface_fields",
    "to_infotext",
    "whole_help",
]
