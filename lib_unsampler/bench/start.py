"""How soon the command line is there: its smallest run beside what it must import, in turn, each in a fresh process.

The smallest run is a picture of 8 pixels and one noise level, as a GIF. Times are medians, after one run that warms the
disk's cache; the first byte is the one on standard error.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from ._report import Report, progress
from .animation import PHOTOGRAPH

ROUNDS = 7
RUN = ["-m", "lib_unsampler", str(PHOTOGRAPH), "--size", "8", "--steps", "1", "-o"]
CASES = {
    "python": ["-c", "pass"],
    "import torch, PIL": ["-c", "import torch, PIL"],
    "the command line's help": ["-m", "lib_unsampler", "--help"],
    "the smallest noise run": RUN,
}
FLOOR = "import torch, PIL"


def seconds(arguments: list[str]) -> tuple[float, float | None]:
    """Until the end, and until the first byte on standard error, if any comes."""
    root = Path(__file__).resolve().parent.parent.parent
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stderr is not None
        first = time.perf_counter() - begun if process.stderr.read(1) else None
        process.stderr.read()
        if process.wait():
            raise RuntimeError(f"{' '.join(arguments)} ended with status {process.returncode}")
    return time.perf_counter() - begun, first


def add_options(parser: argparse.ArgumentParser) -> None:
    """This bench has no options of its own."""


def run(options: argparse.Namespace) -> Report:
    """Measures every case."""
    taken: dict[str, list[tuple[float, float | None]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        every = [name for _ in range(ROUNDS + 1) for name in CASES]
        for name in progress(every, len(every)):
            out = [str(Path(folder) / "a.gif")] if CASES[name] is RUN else []
            taken[name].append(seconds([*CASES[name], *out]))
    ends = {name: median(end for end, _ in times[1:]) for name, times in taken.items()}
    firsts = {
        name: median(first for _, first in times[1:] if first is not None)
        for name, times in taken.items()
        if times[0][1] is not None
    }
    rows = [
        [name, f"{end:.2f} s", f"{end / ends[FLOOR]:.2f}", f"{firsts[name]:.2f} s" if name in firsts else ""]
        for name, end in ends.items()
    ]
    records = [{"case": name, "seconds": end, "first byte": firsts.get(name)} for name, end in ends.items()]
    columns = ["what", "time", f"over {FLOOR}", "first byte on stderr"]
    return Report(f"Starting, median of {ROUNDS} warm runs", columns, rows, records, [])
