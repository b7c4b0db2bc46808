"""Axes for the WebUI's X/Y/Z plot: one for every field that is a number or a choice.

The plot copies the request for each of its cells and applies the axes to the copy; its always-on
scripts run again for each, so it is enough to change our arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..settings import TITLE, SettingsError, named, read, surface_fields
from .host.page import earlier_defaults, xyz_plot
from .host.request import RefusedError, arguments, set_arguments
from .machines import own, share

PREFIX = "[Unsampler] "


def register() -> None:
    """Adds the axes to the plot, once: a reload of the page must not double them."""
    plot = xyz_plot()
    if plot is None:
        return
    there = {option.label for option in plot.axis_options}
    kind = next(type(option) for option in plot.axis_options if getattr(option, "is_img2img", False))
    plot.axis_options += [axis for f in surface_fields("host") for axis in _axes(kind, f) if axis.label not in there]


def _axes(kind_of_axis: Any, f: Any) -> list[Any]:
    """A field's axis; none for a field of free text, which says nothing on a grid."""
    kind, choices = type(f.default), f.metadata["choices"]
    if kind is bool:
        choices = ("true", "false")
    if kind is str and choices is None:
        return []
    return [
        kind_of_axis(
            PREFIX + f.name.replace("_", " "),
            _Number(f) if kind in (int, float) else str,
            _apply(f),
            confirm=_confirm(f),
            choices=None if choices is None else lambda: list(choices),
        )
    ]


class _Number:
    """A number's type to the plot, which reads ranges where it equals ``int`` or ``float``; takes its word too."""

    def __init__(self, f: Any) -> None:
        self._kind, self._word = type(f.default), f.metadata["word"]

    def __eq__(self, other: object) -> bool:
        return other is self._kind

    def __hash__(self) -> int:
        return hash(self._kind)

    def __call__(self, value: Any) -> Any:
        said = str(value).strip().lower()
        if "_" in said:  # Python would read 1_0 as 10
            raise ValueError(f"{value!r} is not a number")
        return said if said and said == self._word else self._kind(value)


def _apply(f: Any) -> Callable[[Any, Any, Sequence[Any]], None]:
    def apply(p: Any, value: Any, values: Sequence[Any]) -> None:
        behind = [field.default for field in surface_fields("host")]  # the page's own, which are in the dict now
        set_arguments(p, [{**_named(p), f.name: value}, *behind])
        share(p, arguments(p))

    return apply


def _named(p: Any) -> dict[str, Any]:
    try:
        return named(own(arguments(p)), "host", earlier_defaults())
    except SettingsError as error:
        raise RefusedError(f"{TITLE}: {error}") from None


def _confirm(f: Any) -> Callable[[Any, Sequence[Any]], None]:
    """Checks an axis before its first cell, since the plot shows a refused cell as an empty one."""

    def confirm(p: Any, values: Sequence[Any]) -> None:
        if _named(p)["enabled"] is False:
            raise RefusedError(f"{PREFIX}{f.name}: {TITLE} is not ticked, so this axis would change nothing")
        for value in values:
            try:
                read(f, value)
            except SettingsError as error:
                raise RefusedError(f"{PREFIX}{error}") from None

    return confirm
