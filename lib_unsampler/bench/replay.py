"""What comes back from a picture sampled again under its own prompt: replay beside inversions, and the calls.

The model is an embedded one; the source is the bundled photograph, which is not one of its samples; 20
Karras steps from sigma 14.6. Calls are the guided denoiser's, inverting and sampling together. dB is
20 log10(std(source) / RMSE).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.inversion import invert
from ..core.noising import SeededDraws, unsample
from ..core.replay import record, replay
from ..core.schedule import levels
from ..standalone import reading, sampling
from ..standalone.embedded import Denoiser, guided, make_model
from ._report import Report, progress

PICTURE = Path(__file__).parents[1] / "assets/cat.jpg"
STEPS, SIZE, SEED = 20, 96, 0
SCALES = (1.0, 7.0)
MODELS = ("gaussian", "mixture")


def replayed(sampler: str, residual: bool = True) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    """Ours: the picture as the sampler's noises; without the residual, what they alone bring back."""

    def method(model: Denoiser, source: Tensor, sigmas: Tensor) -> Tensor:
        function = sampling.function(sampler)
        draw = SeededDraws((SEED,), tuple(source.shape[1:]))
        states = unsample(source, levels(sigmas), draw, "independent", "eps")
        fresh = (draw(j) for j in count(STEPS))
        made = record(function, model, sigmas, states, source, fresh, "eps", disable=True)
        if not residual:
            made = dataclasses.replace(made, residual=torch.zeros_like(made.residual))
        return replay(function, model, sigmas, made, disable=True)

    return method


def exact(model: Denoiser, source: Tensor, sigmas: Tensor) -> Tensor:
    """Ours: exact inversion of Euler."""

    def numbered(x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        return model(x, sigma)

    euler = sampling.function("euler")
    z = invert(numbered, source, levels(sigmas), "exact", euler, "eps", lambda level: None)
    return euler(model, z, sigmas, disable=True)


def flip_sigmas(model: Denoiser, source: Tensor, sigmas: Tensor) -> Tensor:
    """ComfyUI's FlipSigmas under Euler: the ascending schedule, its first level 0 raised to 0.0001."""
    rising = sigmas.flip(0).clone()
    rising[0] = 1e-4
    z = sampling.kd.sample_euler(model, source, rising, disable=True)
    return sampling.kd.sample_euler(model, z, sigmas, disable=True)


def img2img_alternative(model: Denoiser, source: Tensor, sigmas: Tensor) -> Tensor:
    """The WebUI's *img2img alternative test*: each step up uses the level it goes to; the noise to variance 1."""
    x = source
    for low, high in zip(sigmas.flip(0), sigmas.flip(0)[1:]):
        x = x + (x - model(x, high.expand(len(x)))) / high * (high - low)
    return sampling.kd.sample_euler(model, x / x.std() * sigmas[0], sigmas, disable=True)


METHODS: dict[str, Callable[[Denoiser, Tensor, Tensor], Tensor]] = {
    "replay, Euler a": replayed("euler_ancestral"),
    "replay, Euler a, no residual": replayed("euler_ancestral", residual=False),
    "replay, DPM++ 2M SDE": replayed("dpmpp_2m_sde"),
    "replay, DPM++ SDE": replayed("dpmpp_sde"),
    "exact inversion, Euler": exact,
    "FlipSigmas, Euler": flip_sigmas,
    "img2img alternative, Euler": img2img_alternative,
}


def measure(name: str, model_name: str, scale: float, source: Tensor, sigmas: Tensor) -> dict[str, Any]:
    """One method on one model at one guidance scale."""
    positive, negative = (make_model(model_name, p, *source.shape[-2:]) for p in ("sunset", "night"))
    inner = guided(positive, negative, scale)
    calls = 0

    def model(z: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(z, sigma)

    begun = time.perf_counter()
    found = METHODS[name](model, source, sigmas)
    seconds = time.perf_counter() - begun
    error = (found.double() - source.double()).square().mean().sqrt().item()
    decibels = 20 * math.log10(source.std().item() / error) if error else None
    return {
        "model": model_name,
        "cfg": scale,
        "method": name,
        "calls": calls,
        "seconds": seconds,
        "exact": error == 0,
        "db": decibels,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(options: argparse.Namespace) -> Report:
    """Every method on every model at every guidance scale."""
    source = reading.load_picture(PICTURE, SIZE)
    sigmas = sampling.get_sigmas("karras", STEPS, "eps")
    cases = [(model, name) for model in MODELS for name in METHODS]
    each_scale = [(model, name, scale) for model, name in cases for scale in SCALES]
    shown = progress(each_scale, len(each_scale))
    records = [measure(name, model, scale, source, sigmas) for model, name, scale in shown]
    by_case = {(r["model"], r["method"], r["cfg"]): r for r in records}
    rows = []
    for model, name in cases:
        each = [by_case[model, name, scale] for scale in SCALES]
        found = ["every bit" if r["exact"] else f"{r['db']:.1f} dB" for r in each]
        rows.append([model, name, " / ".join(str(c) for c in sorted({r["calls"] for r in each})), *found])
    columns = ["model", "method", "calls", *(f"cfg {scale:g}" for scale in SCALES)]
    title = "A picture inverted and sampled again under its own prompt: how much of it comes back"
    notes = [f"{source.shape[-1]}x{source.shape[-2]} photograph, {STEPS} Karras steps."]
    return Report(title, columns, rows, records, notes)
