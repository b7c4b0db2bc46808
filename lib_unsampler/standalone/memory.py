"""How much memory there is: a run that needs more is refused before the system kills it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free() -> int | None:
    """Bytes that this process may still take (Linux, containers included); None where it cannot be told."""
    found: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        lines = MEMINFO.read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        found.append(int((CGROUP / "memory.max").read_text()) - _held())
    return min(found, default=None)


def _held() -> int:
    """Bytes of the container's that cannot be given back as files' pages can."""
    stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    return int((CGROUP / "memory.current").read_text()) - int(stat.get("inactive_file", 0))


def check(needed: int, what: str) -> None:
    """Raises MemoryError where there is less than ``needed`` bytes; ``what`` needs them."""
    there = free()
    if there is not None and there < needed:
        raise MemoryError(f"{what} take {needed / 1e9:.1f} GB, and {max(there, 0) / 1e9:.1f} GB are free")
