"""A batch of noisy latents: the original node's formula, in-place torch, ours, and memset.

Each call starts from a clean latent on the device and the schedule on the CPU and ends when the
device has finished: launches and the schedule's transfer are counted (ours keeps recent schedules
on the device, so it pays for that in the warm-up). Bandwidth is memset's time over the method's; peak
memory is what a call adds at its worst, as a multiple of its output (on the CPU: growth of the
resident set in a process of its own, on Linux, for outputs of 64 MiB or more).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..core.noising import SeededDraws, runs_fused, unsample
from ..core.philox import PhiloxDraws
from ..core.schedule import Levels, levels
from ._report import Report, peak_memory, progress

SHAPES = {"SD1.5": (4, 64, 64), "SDXL": (4, 128, 128), "Flux": (16, 128, 128)}
FRAMES = {"cuda": (20, 100, 1000, 10000), "cpu": (20, 100)}
SEED = 7
SMALLEST_GROWTH = 2**26
"""Resident memory grows too raggedly to judge smaller outputs by."""


@dataclass(frozen=True)
class Case:
    """One batch: ``frames`` levels of one image."""

    shape: str
    frames: int
    x: Tensor
    plan: Levels
    sigmas: Tensor

    @property
    def bytes(self) -> int:
        """Size of the output."""
        return self.frames * self.x.numel() * self.x.element_size()


def make_case(shape: str, frames: int, device: str) -> Case:
    """A case with a latent of random numbers and an evenly spaced schedule."""
    plan = levels(torch.linspace(14.6, 0.03, frames))
    return Case(shape, frames, torch.randn((1, *SHAPES[shape]), device=device), plan, plan.sigmas)


def original(case: Case) -> Tensor:
    """ComfyUI Iterative Mixer's BatchUnsampler: repeat, draw, multiply, add; unseeded."""
    sigmas = case.sigmas.to(case.x.device).repeat_interleave(len(case.x))
    x = case.x.repeat(case.frames, 1, 1, 1)
    noise = torch.randn_like(x)
    return x + noise * sigmas.view(-1, 1, 1, 1)


def in_place(case: Case) -> Tensor:
    """The least that plain torch needs: draw all levels from one seed, then one fused multiply-add."""
    generator = torch.Generator(case.x.device).manual_seed(SEED)
    z = torch.randn((case.frames, *case.x.shape[1:]), device=case.x.device, generator=generator)
    return torch.addcmul(case.x, z, case.sigmas.to(z.device).view(-1, 1, 1, 1), out=z)


def memset(case: Case) -> Tensor:
    """Writes the output's memory and nothing else."""
    return torch.empty((case.frames, *case.x.shape[1:]), device=case.x.device).zero_()


def ours(case: Case, kind: str, source: type = PhiloxDraws) -> Tensor:
    """The product, from the settings to the batch."""
    draw = source((SEED,), tuple(case.x.shape[1:]), case.x.device)
    return unsample(case.x, case.plan, draw, kind, "eps")


METHODS: dict[str, Callable[[Case], Tensor]] = {
    "original formula": original,
    "in-place torch": in_place,
    "ours, shared": partial(ours, kind="shared"),
    "ours, independent": partial(ours, kind="independent"),
    "ours, path": partial(ours, kind="path"),
    "ours, independent, torch's generator": partial(ours, kind="independent", source=SeededDraws),
    "memset": memset,
}


def code_path(case: Case, method: str) -> str | None:
    """Which of our two code paths serves: ``fused`` or ``torch``; None for the peers."""
    if not method.startswith("ours"):
        return None
    source = SeededDraws if "generator" in method else PhiloxDraws
    draw = source((SEED,), tuple(case.x.shape[1:]), case.x.device)
    return "fused" if runs_fused(case.x, case.plan, draw, method.split(", ")[1]) else "torch"


def synchronize(device: torch.device) -> None:
    """Waits for the device; the CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[Case], Tensor], case: Case) -> float:
    """Median duration of a call: 3 to 50 repeats within half a second, fewer where one takes long."""
    taken: list[float] = []
    for repeat in range(52):
        synchronize(case.x.device)
        start = time.perf_counter()
        z = function(case)
        synchronize(case.x.device)
        taken.append(time.perf_counter() - start)
        del z
        if sum(taken) > 3 or (repeat >= 4 and sum(taken) > 0.5):
            break
    # The first two pay for compilation and for memory that later ones reuse.
    return statistics.median(taken[2:] or taken[-1:])


def peak(method: str, case: Case) -> float | None:
    """Memory that a call adds at its worst, as a multiple of its output; None if it can't be told."""
    if case.x.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        z = METHODS[method](case)
        added = torch.cuda.max_memory_allocated() - before
        del z
        return added / case.bytes
    if case.bytes < SMALLEST_GROWTH:
        return None
    command = [sys.executable, "-m", __name__, method, case.shape, str(case.frames)]
    answer = subprocess.run(command, capture_output=True, text=True)
    return int(answer.stdout) / case.bytes if answer.returncode == 0 else None


def growth(method: str, shape: str, frames: int) -> int:
    """Bytes by which this process's resident set grows in one call, after a small one as warm-up."""
    case = make_case(shape, frames, "cpu")
    METHODS[method](make_case(shape, 2, "cpu"))
    before = peak_memory()
    METHODS[method](case)
    return peak_memory() - before


def measure(case: Case) -> list[dict[str, Any]]:
    """One record per method; time None where the device lacks memory for the hungriest method."""
    records: list[dict[str, Any]] = []
    for method, function in METHODS.items():
        record = {"shape": case.shape, "frames": case.frames, "method": method, "path": code_path(case, method)}
        records.append({**record, "ms": seconds(function, case) * 1e3, "peak": peak(method, case)})
        if case.x.is_cuda:
            torch.cuda.empty_cache()
    for record in records:
        record["bandwidth"] = records[-1]["ms"] / record["ms"]
    return records


def fits(shape: str, frames: int, device: str) -> bool:
    """Whether the original formula's four copies fit the GPU; the CPU may swap."""
    need = 4.5 * 4 * frames * torch.Size(SHAPES[shape]).numel()
    return device == "cpu" or need < torch.cuda.mem_get_info()[0]


def cell(record: dict[str, Any]) -> str:
    """Time, share of memset's bandwidth, peak memory."""
    memory = "" if record["peak"] is None else f", {record['peak']:.1f}x"
    duration = f"{record['ms']:,.0f}" if record["ms"] >= 100 else f"{record['ms']:.3g}"
    return f"{duration} ms ({record['bandwidth']:.1%}{memory})"


def frame_counts(text: str) -> tuple[int, ...]:
    """``20,100`` as numbers, for argparse."""
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise ValueError
    return counts


def add_options(parser: argparse.ArgumentParser) -> None:
    """This bench's own options."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=frame_counts, help="levels, such as 20,1000 (default: by device)")


def run(options: argparse.Namespace) -> Report:
    """Measures every shape and number of frames that fits."""
    records, rows = [], []
    cases = list(product(SHAPES, options.frames or FRAMES[options.device]))
    for shape, frames in progress(cases, len(cases)):
        if fits(shape, frames, options.device):
            found = measure(make_case(shape, frames, options.device))
            records += found
            rows.append([shape, str(frames), *map(cell, found)])
    used = {record["method"]: record["path"] for record in records}
    columns = ["latent", "frames", *(f"{m} [{used[m]}]" if used.get(m) else m for m in METHODS)]
    title = f"Noising one image to many levels on {options.device}, float32, eps; ours with the WebUI's NV noise"
    notes = [
        "Median time of a call with all overheads (share of memset's bandwidth, peak memory over the output).",
        "[fused]: one Triton kernel. [torch]: level by level in place. The original formula is unseeded; in-place",
        "torch seeds the batch, not the images; torch's generators give the WebUI's own draws, one at a time.",
    ]
    return Report(title, columns, rows, records, notes)


if __name__ == "__main__":
    print(growth(sys.argv[1], sys.argv[2], int(sys.argv[3])))
