"""Animation writers on 24 frames of 512 x 512: seconds, size, distance of what is read back, peak memory.

Two films: levels of noise over a photograph, and the same at an eighth of the size, enlarged, as a VAE's
frames are smooth. Pillow's own ``save_all`` with its defaults stands beside ours. Every writer runs in a
process of its own, twice; the faster run counts, the memory is what the first one adds (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pictures import animation
from ..pictures.progression import Scene
from ..pictures.timing import Timing
from ..settings import Settings
from ..standalone import running
from ._report import Report, peak_memory, progress

FRAMES, SIDE, SCALE = 24, 512, 8
PHOTOGRAPH = Path(__file__).parent.parent / "assets" / "cat.jpg"
FILMS = ("noise", "smooth")


def levels_of_noise(frames: int, side: int) -> list[Image.Image]:
    """A photograph and its noise levels, as the command line makes them."""
    settings = Settings(steps=frames - 1)
    photograph = Image.open(PHOTOGRAPH).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    source = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None] / 127.5 - 1
    plan = running.plan_levels(settings)
    scene = Scene(source, plan.schedule, "eps", settings.view)
    return [frame.pictures[0] for frame in running.shown(running.noised(source, plan, settings), scene, settings)]


def film(name: str) -> list[Image.Image]:
    """The frames of one of the films."""
    if name == "noise":
        return levels_of_noise(FRAMES, SIDE)
    small = levels_of_noise(FRAMES, SIDE // SCALE)
    return [frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for frame in small]


def ours(path: Path, frames: list[Image.Image]) -> None:
    """The product's writer for the path's ending."""
    animation.write(path, frames, Timing([0.1] * len(frames)))


def pillow(path: Path, frames: list[Image.Image]) -> None:
    """Pillow's own, with its defaults."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


def pillow_each(path: Path, frames: list[Image.Image]) -> None:
    """Pillow's own, a file for each frame: none is dropped or takes anything over from the one before."""
    for number, frame in enumerate(frames):
        frame.save(path.with_stem(f"{path.stem}-{number:03d}"), quality=80)


WRITERS: dict[str, tuple[Callable[[Path, list[Image.Image]], None], str]] = {
    "GIF, Pillow": (pillow, ".gif"),
    "GIF, ours": (ours, ".gif"),
    "WebP, Pillow": (pillow, ".webp"),
    "WebP, Pillow, each frame": (pillow_each, ".webp"),
    "WebP, ours": (ours, ".webp"),
    "APNG, Pillow": (pillow, ".png"),
    "APNG, ours": (ours, ".png"),
    "MP4, ours": (ours, ".mp4"),
}


def distance(shown: list[Image.Image], frames: list[Image.Image]) -> float:
    """PSNR in dB of what is read back, over all frames and channels; infinite for no loss."""
    error = np.mean([np.mean((np.asarray(a, float) - np.asarray(b)) ** 2) for a, b in zip(shown, frames)])
    return float(20 * np.log10(255) - 10 * np.log10(error)) if error else float("inf")


def read(path: Path) -> list[Image.Image]:
    """The frames of a file."""
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    found = []
    with Image.open(path) as picture:
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            found.append(picture.convert("RGB"))
    return found


def measure(writer: str, name: str) -> dict[str, Any]:
    """One writer on one film, in this process."""
    write, ending = WRITERS[writer]
    frames = film(name)
    with tempfile.TemporaryDirectory() as folder:
        path, taken, memory = Path(folder) / f"film{ending}", [], [peak_memory()]
        for _ in range(2):
            begun = time.perf_counter()
            write(path, frames)
            taken.append(time.perf_counter() - begun)
            memory.append(peak_memory())
        files = sorted(Path(folder).iterdir())
        size, shown = sum(file.stat().st_size for file in files), [frame for file in files for frame in read(file)]
    return {
        "film": name,
        "writer": writer,
        "seconds": min(taken),
        "bytes": size,
        "frames": len(shown),
        "dB": distance(shown, frames),
        "memory": memory[1] - memory[0],
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """This bench has no options of its own."""


def run(options: argparse.Namespace) -> Report:
    """Measures every writer on both films."""
    wanted = [writer for writer in WRITERS if "MP4" not in writer or find_spec("av")]
    records = []
    for name, writer in progress(product(FILMS, wanted), len(FILMS) * len(wanted)):
        command = [sys.executable, "-m", __name__, writer, name]
        records.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    rows = [
        [
            record["film"],
            record["writer"],
            f"{record['seconds']:.2f} s",
            f"{record['bytes'] / 1e6:.2f} MB",
            str(record["frames"]),
            "lossless" if record["dB"] == float("inf") else f"{record['dB']:.1f} dB",
            f"{record['memory'] / 1e6:.0f} MB",
        ]
        for record in records
    ]
    notes = ["" if len(wanted) == len(WRITERS) else "MP4 was left out: no PyAV."]
    columns = ["film", "writer", "time", "size", "frames", "read back", "peak memory added"]
    return Report(f"{FRAMES} frames of {SIDE} x {SIDE}", columns, rows, records, notes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(*sys.argv[1:])))
