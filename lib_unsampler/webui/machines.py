"""One request on several machines: what each of them is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..settings import SettingsError, named, surface_fields
from .host.machines import engine
from .host.page import earlier_defaults, field_defaults
from .host.request import set_arguments


class ForWorkers(dict[str, Any]):
    """The script's arguments as other machines get them, as JSON; ``own`` are this machine's."""

    def __init__(self, values: dict[str, Any], own: list[Any]) -> None:
        super().__init__(values)
        self.own = own


def own(args: Sequence[Any]) -> list[Any]:
    """The script's arguments as this machine's user gave them."""
    return args[0].own if args and isinstance(args[0], ForWorkers) else list(args)


def share(p: Any, args: Sequence[Any]) -> None:
    """Where an engine shares requests out: has it ask for each image's own picture alone, of its workers.

    Every field is named, so that nothing is read otherwise there: JSON keeps no marks, and each machine has its own
    preferences. What is no request here is none there either: it is refused later.
    """
    if engine(p) is None:
        return
    args = own(args)
    try:
        values = {**field_defaults(), **named(args, "host", earlier_defaults())}
    except SettingsError:
        return
    behind = [f.default for f in surface_fields("host")]  # the page's own, which are in the dict now
    set_arguments(p, [ForWorkers({**values, "reply": "own only"}, args), *behind])
