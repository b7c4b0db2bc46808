"""From what a user gave to settings: every value as its field's type, or all that is wrong with it at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from .combinations import refusals
from .fields import STOCHASTIC, TITLE, Preferences, Settings, allowed, surface_fields


class SettingsError(ValueError):
    """All that is wrong with a request: ``errors`` holds one sentence per bad field."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("; ".join(self.errors))


def convert(f: Any, value: Any) -> Any:
    """``value`` as the field's type. Text is read (command line, infotext); raises ValueError."""
    kind = type(f.default)
    word = f.metadata["word"]
    if word and isinstance(value, str) and value.strip().lower() == word:
        return f.default
    if kind is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
            raise ValueError
        wanted = {p.strip() for p in parts}
        if not wanted or wanted - set(f.metadata["choices"]):
            raise ValueError
        return tuple(c for c in f.metadata["choices"] if c in wanted)
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False}[str(value).lower()]
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
    elif isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python would read 1_0 as 10
        raise ValueError
    elif kind is int:
        value = int(value) if isinstance(value, (str, int)) else _whole(value)
    else:
        value = float(value)
    _check_bounds(f, value)
    return value


def read(f: Any, value: Any) -> Any:
    """``value`` as the field's type, like :func:`convert`.

    Raises:
        SettingsError: naming the field, the value and what is allowed.
    """
    try:
        return convert(f, value)
    except (ValueError, TypeError, KeyError, OverflowError):
        cleared = value is None and type(f.default) in (int, float)
        said = "None (empty)" if cleared else repr(value)
        raise SettingsError([f"{f.name}: {said} is not {allowed(f)}"]) from None


def _whole(value: Any) -> int:
    if not isinstance(value, float) or not value.is_integer():
        raise ValueError
    return int(value)


def _check_bounds(f: Any, value: Any) -> None:
    low, high, choices = (f.metadata[k] for k in ("minimum", "maximum", "choices"))
    if choices is not None and value not in choices:
        raise ValueError
    if low is not None and value != f.metadata["automatic"] and not (math.isfinite(value) and low <= value <= high):
        raise ValueError


def _read_all(values: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Each value as its field's type, and a sentence for each that is unknown or not allowed."""
    good, errors = {}, []
    for name, value in values.items():
        if name not in known:
            errors.append(f"{name}: unknown field (known: {', '.join(known)})")
            continue
        try:
            good[name] = read(known[name], value)
        except SettingsError as error:
            errors += error.errors
    return good, errors


def parse_preferences(values: Mapping[str, Any]) -> Preferences:
    """Preferences from what the WebUI keeps of them.

    Raises:
        SettingsError: naming each one that its bounds do not allow, as the Settings tab shows it.
    """
    good, errors = _read_all(values, {f.name: f for f in fields(Preferences)})
    if errors:
        raise SettingsError([f"Settings, {TITLE}: {error}" for error in errors])
    return Preferences(**good)


def parse(values: Mapping[str, Any], surface: str) -> Settings:
    """Settings from a mapping of field names, for one surface.

    Raises:
        SettingsError: with one sentence per unknown key, bad value or contradiction, all at once.
    """
    good, errors = _read_all(values, {f.name: f for f in surface_fields(surface)})
    errors += refusals(Settings(**good)) + _check_replay(good, surface)
    if errors:
        raise SettingsError(errors)
    if good.get("mode") == "replay":
        good["noise"] = "independent"
    return Settings(**good)


def _check_replay(read: Mapping[str, Any], surface: str) -> list[str]:
    """In the host the sampler is img2img's own, and known later."""
    sampler = read.get("sampler", Settings.sampler)
    if read.get("mode") != "replay" or surface != "cli" or sampler in STOCHASTIC:
        return []
    return [f"sampler: {sampler!r} adds no noise, which mode replay needs (one of {', '.join(STOCHASTIC)})"]


class Pasted(list[str]):
    """The output of pasted parameters: the host then fills every argument in, also behind a dict, which goes before."""


NO_VALUES: Mapping[str, Any] = MappingProxyType({})


def named(args: Sequence[Any], surface: str, filled: Mapping[str, Sequence[Any]] = NO_VALUES) -> dict[str, Any]:
    """An always-on script's arguments by name, ``enabled`` among them; of their values nothing is checked.

    ``args`` is either one dict of fields, optionally with ``enabled`` (default true: whoever
    names the script wants it), or positional: enabled, then the surface's fields in order.

    Arguments:
        filled: With what, beside a field's default, the host may have filled up what is missing behind a dict.

    Raises:
        SettingsError: naming what is too much.
    """
    args = list(args)
    names = ["enabled", *(f.name for f in surface_fields(surface))]
    if len(args) > len(names):
        raise SettingsError([f"args: {len(args)} values where at most {len(names)} are known"])
    if not args or not isinstance(args[0], Mapping):
        return {"enabled": False, **dict(zip(names, args))}
    values = {"enabled": True, **args[0]}
    if values["enabled"] is not False:
        _check_behind_dict(args[1:], surface, filled)
    return values


def _check_behind_dict(rest: Sequence[Any], surface: str, filled: Mapping[str, Sequence[Any]]) -> None:
    errors = []
    if rest and isinstance(rest[0], Pasted):
        return
    for f, value in zip(surface_fields(surface), rest):
        if not any(_means(f, value, other) for other in (f.default, *filled.get(f.name, ()))):
            errors.append(f"{f.name}: {value!r} stands behind a dict, which holds every field; put it in there")
    if errors:
        raise SettingsError(errors)


def _means(f: Any, value: Any, other: Any) -> bool:
    """Whether a field reads two values as the same; what it cannot read, it does not."""
    try:
        return bool(convert(f, value) == convert(f, other))
    except (ValueError, TypeError, KeyError, OverflowError):
        return False


def parse_args(
    args: Sequence[Any],
    surface: str,
    defaults: Mapping[str, Any] = NO_VALUES,
    filled: Mapping[str, Sequence[Any]] = NO_VALUES,
) -> tuple[bool, Settings]:
    """``(enabled, settings)`` from an always-on script's arguments, as :func:`named` takes them.

    Arguments:
        defaults: Values of fields that are left out, where they are not the fields' own defaults.
        filled: As in :func:`named`; the defaults are among it.
    """
    beside = {name: (value, *filled.get(name, ())) for name, value in defaults.items()}
    values = {**defaults, **named(args, surface, {**filled, **beside})}
    enabled = values.pop("enabled")
    if not isinstance(enabled, bool):
        raise SettingsError([f"enabled: {enabled!r} is not true or false"])
    return enabled, (parse(values, surface) if enabled else Settings())
