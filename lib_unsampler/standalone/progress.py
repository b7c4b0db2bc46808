"""How a run says how far it is: bars, by whoever shows them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tqdm import tqdm


class Bar(Protocol):
    """One part of a run, on its way."""

    def update(self) -> Any:
        """A step of it is done."""

    def set_postfix_str(self, s: str, refresh: bool) -> Any:
        """What is to be said beside it."""


Bars = Callable[[str, "int | None", str], AbstractContextManager[Bar]]
"""Makes the bar of a part: its name, how many steps it has (None: nobody knows), and what a step is called."""


def terminal(name: str, total: int | None, unit: str) -> AbstractContextManager[Bar]:
    """A bar on standard error."""
    return tqdm(total=total, desc=name, unit=unit)


def silent(name: str, total: int | None, unit: str) -> AbstractContextManager[Bar]:
    """No bar."""
    return tqdm(disable=True)
