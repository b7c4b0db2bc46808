"""Settings as an image's generation parameters, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .fields import Settings, surface_fields
from .parsing import SettingsError, parse, read

INFOTEXT_PREFIX = "Unsampler "


SIZE = re.compile(r"\d+x\d+$")


def infotext_key(f: Any) -> str:
    """The name of a field in an image's generation parameters."""
    return f"{INFOTEXT_PREFIX}{f.name.replace('_', ' ')}"


def _plain(value: Any) -> str:
    """A value as text that comes back whole from the host's parameters.

    The host strips text, takes quotes off and splits ``512x512`` in two: a text that it would change
    is written as a JSON list of one.
    """
    if isinstance(value, tuple):
        return ", ".join(value)
    text = str(value)
    odd = text != text.strip() or not text.isprintable() or text.startswith(('"', '["')) or SIZE.match(text)
    return json.dumps([text]) if odd or not text else text


def _whole_text(text: str) -> str:
    """The text that :func:`_plain` wrote."""
    if not (text.startswith('["') and text.endswith('"]')):
        return text
    try:
        (read,) = json.loads(text)
    except ValueError:
        return text
    return str(read)


def to_infotext(settings: Settings, surface: str) -> dict[str, str]:
    """The fields that differ from their defaults, for the image's generation parameters."""
    pairs = ((f, getattr(settings, f.name)) for f in surface_fields(surface) if f.metadata["pasted"])
    return {infotext_key(f): _plain(v) for f, v in pairs if v != f.default}


def from_infotext(params: Mapping[str, str], surface: str) -> Settings:
    """The settings that :func:`to_infotext` wrote; absent keys are defaults.

    Raises:
        SettingsError: if a value was edited into something the field does not allow.
    """
    keys = {infotext_key(f): f.name for f in surface_fields(surface)}
    return parse({keys[k]: _whole_text(str(v)) for k, v in params.items() if k in keys}, surface)


VERSION_KEY = INFOTEXT_PREFIX + "version"
"""Written into every image's parameters while the extension is enabled, whatever the settings."""


def pasted(params: Mapping[str, str], surface: str) -> dict[str, Any] | None:
    """Every field's value from pasted generation parameters; None if they are not ours.

    Where a value was edited into one that is not allowed, the error that says so stands for it.
    """
    if VERSION_KEY not in params:
        return None
    try:
        settings = from_infotext(params, surface)
    except SettingsError:
        return {f.name: _read_alone(f, params) for f in surface_fields(surface)}
    return {f.name: getattr(settings, f.name) for f in surface_fields(surface)}


def _read_alone(f: Any, params: Mapping[str, str]) -> Any:
    text = params.get(infotext_key(f))
    try:
        return f.default if text is None else read(f, _whole_text(str(text)))
    except SettingsError as error:
        return error
