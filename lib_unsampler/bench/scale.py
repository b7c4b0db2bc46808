"""A whole run of the command line at scale: peak memory and time for 100 to 500 frames, with --full to 10,000.

Every run is a process of its own. ``overlap`` is the time from the first frame to the finished file over
the larger of decoding and encoding alone, with a decoder that takes as long as encoding does (the hardest
case) and leaves the processor alone, as a GPU's does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from ..pictures import animation
from ..pictures.timing import Timing
from ..settings import Settings
from ..standalone import progress as bars
from ..standalone import reading, running
from ._report import Report, peak_memory, progress
from .animation import PHOTOGRAPH, levels_of_noise

ENDINGS = (".gif", ".png", ".webp", ".mp4")
LEAST = 100


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        frames: Frames of the runs beside the one of LEAST, by the frame's side.
        overlapped: Frames of the run whose overlap is measured: more of the small ones, whose run is soon over.
        rounds: Times that the overlap is measured.
    """

    frames: Mapping[int, tuple[int, ...]]
    overlapped: Mapping[int, int]
    rounds: int


SHORT = Scale({128: (500,), 512: (150,)}, {128: 120, 512: 24}, 3)
FULL = Scale({128: (1000, 10000), 512: (1000,)}, {128: 1000, 512: 300}, 5)


def at_scale(ending: str, side: int, frames: int) -> dict[str, Any]:
    """One run, with its latents; in this process."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        Image.open(PHOTOGRAPH).convert("RGB").resize((side, side)).save(picture)
        settings = Settings(steps=frames - 1, noise="independent")
        film = Path(folder) / f"film{ending}"
        targets = running.Targets(film, latents=Path(folder) / "film.safetensors")
        begun = time.perf_counter()
        running.unsample_picture(reading.load_picture(picture, side), settings, targets, bars=bars.silent)
        taken = time.perf_counter() - begun
        size = film.stat().st_size
    return {"ending": ending, "side": side, "frames": frames, "seconds": taken, "bytes": size, "memory": peak_memory()}


def overlap(ending: str, side: int, count: int, rounds: int) -> float:
    """Time of a run over the larger of decoding and encoding alone, where decoding takes as long; the median."""
    frames = levels_of_noise(count, side)

    def decoded(wait: float) -> Iterator[Image.Image]:
        for frame in frames:
            time.sleep(wait)
            yield frame

    def seconds(made: Callable[[Iterator[Image.Image], Path], Any], wait: float) -> float:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            made(decoded(wait), Path(folder) / f"film{ending}")
            return time.perf_counter() - begun

    def written(source: Iterator[Image.Image], path: Path) -> None:
        animation.write(path, source, Timing([0.1] * len(frames)))

    ratios = []
    for _ in range(rounds):  # side by side, since the machine's speed drifts
        encoding = seconds(written, 0)
        wait = encoding / len(frames)
        decoding = seconds(lambda source, _: deque(source, maxlen=0), wait)  # a sleep is never exact
        ratios.append(seconds(written, wait) / max(encoding, decoding))
    return median(ratios)


def add_options(parser: argparse.ArgumentParser) -> None:
    """This bench's own options."""
    known = ENDINGS if find_spec("av") else ENDINGS[:-1]
    parser.add_argument("--formats", nargs="+", choices=known, default=known, help="file endings (default: all)")
    parser.add_argument("--full", action="store_true", help="up to 10,000 frames: some twenty minutes on two cores")


def run(options: argparse.Namespace) -> Report:
    """Measures every format and size."""
    scale = FULL if options.full else SHORT
    cases = [(ending, side) for ending in options.formats for side in scale.frames]
    each = progress(cases, len(cases))
    records = [record for ending, side in each for record in _measured(ending, side, scale)]
    columns = ["format", "frame", "frames", "time", "size", "peak memory", f"over {LEAST} frames", "overlap"]
    title = "The command line from picture to animation and latents file, independent noise"
    notes = ["Peak memory is the whole process's, torch included."]
    return Report(title, columns, [_row(record) for record in records], records, notes)


def _measured(ending: str, side: int, scale: Scale) -> list[dict[str, Any]]:
    """Every run of one format and size."""
    ratio = _apart("overlap", ending, str(side), str(scale.overlapped[side]), str(scale.rounds))
    found = [_apart("at_scale", ending, str(side), str(frames)) for frames in (LEAST, *scale.frames[side])]
    return [{**record, "overlap": ratio, "first": found[0]["memory"]} for record in found]


def _row(record: dict[str, Any]) -> list[str]:
    growth = (record["memory"] - record["first"]) / 1e6
    return [
        record["ending"],
        f"{record['side']} x {record['side']}",
        f"{record['frames']:,}",
        f"{record['seconds']:.1f} s",
        f"{record['bytes'] / 1e6:.1f} MB",
        f"{record['memory'] / 1e6:.0f} MB",
        "" if record["frames"] == LEAST else f"{growth:+.0f} MB",
        f"{record['overlap']:.2f}",
    ]


def _apart(function: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", __name__, function, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, ending, *numbers = sys.argv[1:]
    jobs: dict[str, Callable[..., Any]] = {"overlap": overlap, "at_scale": at_scale}
    print(json.dumps(jobs[name](ending, *map(int, numbers))))
