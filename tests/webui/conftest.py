"""The doubled host, for the tests of what runs inside it."""

from __future__ import annotations

from doubled import host  # noqa: F401  (a fixture)
