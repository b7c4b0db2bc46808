"""Every field, once, with what reads and writes it. Standard library only: `--help` and parse errors need no torch."""

from .effects import remarks
from .fields import (
    FORMATS,
    MODELS,
    OUTPUTS,
    SAMPLERS,
    SAMPLING,
    SCHEDULERS,
    STOCHASTIC,
    TITLE,
    Preferences,
    Settings,
    allowed,
    help_on,
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
    "SAMPLING",
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
    "help_on",
    "infotext_key",
    "named",
    "parse",
    "parse_args",
    "parse_preferences",
    "pasted",
    "read",
    "remarks",
    "surface_fields",
    "to_infotext",
    "whole_help",
]
