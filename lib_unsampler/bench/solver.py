"""What the exact solvers take beside their model: time of each, looks at the device, and levels asked together.

The embedded Gaussian prior on a picture of 400x300. On a CUDA device also latents of 4x128x128 in a batch of 4,
float32, under a model that costs next to nothing and under a network of Stable Diffusion 1.5's size (random weights,
float16); and that network on latents of 4x64x64: DPM++ 2M with a call for each level, and with all levels of a round
in one batch. 20 Karras steps, cfg 1. The time of a model is what its calls took, on the device where it is there; the
solver's is the rest. Looks are the times that the solver waited for the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.inversion import Level, Model, Unnumbered, invert
from ..core.schedule import levels
from ..standalone import sampling
from ..standalone.cli import note
from ..standalone.embedded import Denoiser, make_model
from ._report import Report
from ._unet import LargeDenoiser

HEIGHT, WIDTH, STEPS = 300, 400, 20
MOST = 4000
"""Marks in time of one inversion, which are made before it."""


class Timed:
    """A denoiser whose calls are timed, without waiting for them."""

    def __init__(self, denoiser: Denoiser, device: str) -> None:
        self._denoiser = denoiser
        self._cuda = device == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(MOST if self._cuda else 0)]

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser's answer."""
        begun = self._mark()
        answer = self._denoiser(z, sigma)
        self._marks.append((begun, self._mark()))
        return answer

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._events.pop()
        event.record()
        return event

    def taken(self) -> float:
        """Seconds so far."""
        if self._cuda:
            torch.cuda.synchronize()
            return sum(begun.elapsed_time(ended) for begun, ended in self._marks) / 1e3
        return sum(ended - begun for begun, ended in self._marks)


def apart(denoiser: Denoiser) -> Model:
    """The denoiser with a call for each level."""
    return lambda x, sigma, call, images=None: denoiser(x, sigma)


def measure(
    name: str, denoiser: Denoiser, x: Tensor, sampler: str, together: bool, tolerance: float, rounds: int
) -> dict[str, Any]:
    """An inversion, the median of some; once before them to warm up."""
    note(f"{name}, {sampler}{', levels together' if together else ''}")
    plan = levels(sampling.get_sigmas("karras", STEPS, "eps"))
    wrap: Callable[[Denoiser], Model] = Unnumbered if together else apart
    taken: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        model, walked = Timed(denoiser, x.device.type), list[Level]()
        if x.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        with torch.inference_mode():
            invert(wrap(model), x, plan, "exact", sampling.function(sampler), "eps", walked.append, tolerance=tolerance)
        inside = model.taken()
        taken.append((time.perf_counter() - begun, inside))
    wall, inside = (statistics.median(column) for column in zip(*taken[1:]))
    calls = len(model._marks)
    return {
        "model": name,
        "sampler": sampler,
        "together": together,
        "calls": calls,
        "images": int(sum(level.calls.sum() for level in walked)),
        "converged": all(bool(level.converged.all()) for level in walked),
        "seconds": wall,
        "model_ms": 1e3 * inside / calls,
        "solver_ms": 1e3 * (wall - inside) / calls,
        "looks": looks(denoiser, x, sampler, wrap, tolerance) / calls if x.is_cuda else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if x.is_cuda else None,
    }


def looks(denoiser: Denoiser, x: Tensor, sampler: str, wrap: Callable[[Denoiser], Model], tolerance: float) -> int:
    """How often an inversion waits for the device."""
    plan = levels(sampling.get_sigmas("karras", STEPS, "eps"))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told, torch.inference_mode():
            warnings.simplefilter("always")
            function = sampling.function(sampler)
            invert(wrap(denoiser), x, plan, "exact", function, "eps", lambda level: None, tolerance=tolerance)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in told)


def smooth(size: tuple[int, ...], device: str) -> Tensor:
    """Pictures with large forms and some grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(*size[:2], size[2] // 16, size[3] // 16, generator=generator)
    forms = torch.nn.functional.interpolate(coarse, size=size[2:], mode="bicubic")
    return (0.5 * forms + 0.02 * torch.randn(size, generator=generator)).to(device)


def cheap(z: Tensor, sigma: Tensor) -> Tensor:
    """A white Gaussian prior's answer."""
    return z * (0.49 / (0.49 + sigma**2))[:, None, None, None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """How large a batch the large network gets."""
    parser.add_argument("--images", type=int, default=1, help="images inverted together by the large network")


def run(options: argparse.Namespace) -> Report:
    """Everything that this machine has a device for."""
    picture = smooth((1, 3, HEIGHT, WIDTH), "cpu")
    gaussian = make_model("gaussian", "", HEIGHT, WIDTH)
    records = [measure("Gaussian 400x300", gaussian, picture, name, False, 1e-6, 5) for name in ("euler", "dpmpp_2m")]
    if torch.cuda.is_available():
        latents = smooth((4, 4, 128, 128), "cuda")
        records += [
            measure("next to none, 4x4x128x128", cheap, latents, s, False, 1e-6, 7) for s in ("euler", "dpmpp_2m")
        ]
        records += on_large_network(options.images)
    columns = [
        "model",
        "sampler",
        "levels",
        "calls",
        "states",
        "total",
        "model a call",
        "solver a call",
        "looks a call",
    ]
    notes = [f"{r['model']}, {r['sampler']}: not all converged" for r in records if not r["converged"]]
    notes += [f"{r['model']}: peak {r['peak_bytes'] / 1e9:.1f} GB" for r in records if r["peak_bytes"] is not None]
    return Report("The exact solvers beside their models", columns, [row(record) for record in records], records, notes)


def on_large_network(images: int) -> list[dict[str, Any]]:
    """Levels apart and together."""
    network = LargeDenoiser().to("cuda", torch.float16).eval().requires_grad_(False)
    wide, latents = smooth((4, 4, 128, 128), "cuda"), smooth((images, 4, 64, 64), "cuda")
    return [
        *(measure("SD 1.5's size, 4x4x128x128", network, wide, s, False, 1e-4, 2) for s in ("euler", "dpmpp_2m")),
        *(
            measure(f"SD 1.5's size, {images}x4x64x64", network, latents, "dpmpp_2m", together, 1e-4, 2)
            for together in (False, True)
        ),
    ]


def row(record: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        record["model"],
        record["sampler"],
        "together" if record["together"] else "apart",
        str(record["calls"]),
        str(record["images"]),
        f"{record['seconds']:.2f} s",
        f"{record['model_ms']:.2f} ms",
        f"{record['solver_ms']:.2f} ms",
        "" if record["looks"] is None else f"{record['looks']:.2f}",
    ]
