"""What a limit of an animation's bytes costs: time beside one write without it, and what is made of 24 frames.

Three films of 512 x 512: the two of the bench ``animation``, and one whose frames are now of the one, now of the other.
Times are processor seconds of all threads, since other work on the machine counts in no others: of a write without a
limit, of one with it, and of one that is told the side and the quality that were chosen; medians of five rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from ..pictures.animation import Animation, Making
from ..pictures.background import Background
from ..pictures.fitting import Fit, Fitted
from ..pictures.timing import Timing
from ._report import Report, progress
from .animation import FRAMES, SIDE, film

ENDINGS, SHARES, ROUNDS = (".gif", ".png", ".webp", ".mp4"), (1.2, 0.9, 0.5, 0.25), 5
TIMING = Timing([0.1] * FRAMES)


def films() -> dict[str, list[Image.Image]]:
    """The frames of every film."""
    noise, smooth = film("noise"), film("smooth")
    mixed = [both[number % 2] for number, both in enumerate(zip(noise, smooth))]
    return {"noise": noise, "smooth": smooth, "mixed": mixed}


def timed(path: Path, frames: list[Image.Image], making: Making, most: int = 0) -> tuple[float, Any]:
    """Processor seconds of a write, and what its end tells; ``most`` is the limit, if there is one."""
    begun = time.process_time()
    with Background() as background:
        about = (path, TIMING, "", background, making)
        with Fitted(*about, most) if most else Animation(*about) as made:
            for frame in frames:
                made.add(frame)
            told = made.finish()
    return time.process_time() - begun, told


def measured(path: Path, name: str, frames: list[Image.Image]) -> list[dict[str, Any]]:
    """One film in one format, under every limit; each round has all writes in turn."""
    _, size = timed(path, frames, Making())
    plain, fits = list[float](), dict[float, Fit]()
    limited, told = (defaultdict[float, list[float]](list) for _ in range(2))
    for _ in range(ROUNDS):
        plain.append(timed(path, frames, Making())[0])
        for share in SHARES:
            seconds, fit = timed(path, frames, Making(), round(share * size))
            limited[share].append(seconds)
            told[share].append(timed(path, frames, Making(max(fit.size), fit.quality))[0])
            fits[share] = fit
    return [
        _record(name, share, size, fit, median(limited[share]), median(plain), median(told[share]))
        for share, fit in fits.items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """This bench has no options of its own."""


def run(options: argparse.Namespace) -> Report:
    """Measures every film in every format."""
    endings = ENDINGS if find_spec("av") else ENDINGS[:-1]
    records = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        made = films()
        for ending, name in progress(list(product(endings, made)), len(endings) * len(made)):
            records += measured(Path(folder) / f"film{ending}", f"{ending[1:]}, {name}", made[name])
    rows = [
        [
            str(record["film"]),
            f"{record['most'] / 1e6:.2f} of {record['natural'] / 1e6:.2f} MB",
            record["made"],
            f"{record['used']:.0%}",
            f"{record['over a write']:.2f}",
            f"{record['over one as chosen']:.2f}",
        ]
        for record in records
    ]
    columns = ["film", "limit", "made", "of the limit", "time over a write", "over one as chosen"]
    return Report(f"{FRAMES} frames of {SIDE} x {SIDE} under a limit of bytes", columns, rows, records, [])


def _record(name: str, share: float, size: int, fit: Fit, limited: float, plain: float, told: float) -> dict[str, Any]:
    made = f"{fit.size[0]} x {fit.size[1]}" + ("" if fit.quality is None else f", quality {fit.quality}")
    return {
        "film": name,
        "share": share,
        "natural": size,
        "most": fit.most,
        "made": made if fit.kept else f"not: {made}",
        "used": fit.bytes / fit.most,
        "over a write": limited / plain,
        "over one as chosen": limited / told,
    }
