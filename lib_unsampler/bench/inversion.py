"""Inversions side by side: what they find of a known noise, what comes back, and what a level costs in model calls.

Known noise (the protocol of the mixture's anchors): x0 = s[0] times normal noise goes down a 20-step Karras
schedule by Euler (ours of Heun and DPM++ 2M: by those) to the state at s[19]; the inversion starts from that
state and its x at s[0] is compared with x0: RMSE, and the dB of the state that Euler brings back from it. Picture:
the whole round trip of photographs that the model was not trained on, from sigma 0 and back to it, in dB.
dB is 20 log10(std(source) / RMSE); calls are the guided denoiser's for one image and level.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.inversion import Level, Unnumbered, invert
from ..core.noising import append_dims
from ..core.schedule import Levels
from ..standalone import sampling
from ..standalone.cli import note
from ..standalone.embedded import Denoiser, MixturePrior, anchor_mixture, guided, make_model
from ._pixels import SIDE, pixel_denoiser
from ._report import Report

STEPS, SEEDS = 20, 5
PLAIN_LIMIT = 60


@dataclass(frozen=True)
class Task:
    """A model with its known noises and, where it is one of pictures, photographs."""

    name: str
    model: Denoiser
    shape: tuple[int, ...]
    photographs: Tensor | None = None

    @cached_property
    def sigmas(self) -> Tensor:
        """The anchors' schedule, in float64."""
        return sampling.kd.get_sigmas_karras(STEPS, 0.0292, 14.6146).double()

    @cached_property
    def noise(self) -> Tensor:
        """x0 of every seed, with shape (seeds, *shape)."""
        drawn = [np.random.default_rng(seed).normal(size=self.shape) for seed in range(SEEDS)]
        return self.sigmas[0] * torch.from_numpy(np.stack(drawn))


@dataclass(frozen=True)
class Method:
    """An inversion: ``run(model, y, rising) -> x``, rising the sigmas from y's own to the noisiest."""

    name: str
    run: Callable[[Denoiser, Tensor, Tensor], Tensor]
    sampler: str = "euler"

    def __call__(self, model: Denoiser, y: Tensor, rising: Tensor) -> Tensor:
        """The inversion of a batch; one by one where it ends for all of them together."""
        if not getattr(self.run, "keywords", {}).get("tolerance") or getattr(self.run, "func", None) is ours:
            return self.run(model, y, rising)
        return torch.cat([self.run(model, one, rising) for one in y.split(1)])


def slope(model: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """k-diffusion's d = (x - D(x; s)) / s."""
    return (x - model(x, sigma.expand(len(x)))) / sigma


def flip_sigmas(model: Denoiser, y: Tensor, rising: Tensor, parts: int = 1) -> Tensor:
    """ComfyUI's FlipSigmas and ComfyUI_Noise's Unsampler under Euler; ``parts`` steps for each level."""
    sigmas = torch.where(rising > 0, rising, 1e-4)
    fine = [low * (high / low) ** (k / parts) for low, high in zip(sigmas, sigmas[1:]) for k in range(parts)]
    return sampling.kd.sample_euler(model, y, torch.stack([*fine, sigmas[-1]]), disable=True)


def img2img_alternative(model: Denoiser, y: Tensor, rising: Tensor) -> Tensor:
    """The WebUI's script: each step up uses the level it goes to; at the end the noise is brought to deviation 1."""
    x = y
    for low, high in zip(rising, rising[1:]):
        x = x + (high - low) * slope(model, x, high)
    return x / append_dims(x.flatten(1).std(1), x.ndim) * rising[-1]


def img2img_alternative_adjusted(model: Denoiser, y: Tensor, rising: Tensor) -> Tensor:
    """The same with *Sigma adjustment*: the level it comes from; from sigma 0, where that gives 0, no step."""
    x = y
    for low, high in zip(rising, rising[1:]):
        x = x + (high - low) * slope(model, x, low) if low > 0 else x
    return x


def ddim_inversion(model: Denoiser, y: Tensor, rising: Tensor) -> Tensor:
    """Diffusers' DDIMInverseScheduler: the noise of the level it goes to, z scaled as on the level it comes from."""
    x = y
    for low, high in zip(rising, rising[1:]):
        scaled = x * ((1 + high**2) / (1 + low**2)).sqrt()
        x = x + (high - low) * slope(model, scaled, high)
    return x


def fixed_point(
    model: Denoiser, y: Tensor, rising: Tensor, most: int = PLAIN_LIMIT, tolerance: float = 0.0, memory: int = 0
) -> Tensor:
    """Each Euler step's fixed point by plain iteration, or Anderson's with a memory, without a warm start.

    (AIDI, Pan et al. 2023.) Ends at ``most`` calls, or where all images reach a step's residual.
    """
    for low, high in zip(rising, rising[1:]):
        x = y
        states: list[Tensor] = []
        forces: list[Tensor] = []
        for _ in range(most):
            force = y + (high - low) * slope(model, x, high) - x
            states, forces = [*states, x][-memory - 1 :], [*forces, force][-memory - 1 :]
            if memory and len(forces) > 1:
                dx = torch.stack([(b - a).flatten(1) for a, b in zip(states, states[1:])], 2).double()
                df = torch.stack([(b - a).flatten(1) for a, b in zip(forces, forces[1:])], 2).double()
                weights = torch.linalg.lstsq(df, force.flatten(1).double()[:, :, None], driver="gelsd").solution
                x = x + force - ((dx + df) @ weights).reshape(x.shape).to(x)
            else:
                x = x + force
            if force.square().flatten(1).mean(1).max().sqrt() <= tolerance * max(1.0, float(high)):
                break
        y = x
    return y


def ours(
    model: Denoiser,
    y: Tensor,
    rising: Tensor,
    solver: str,
    sampler: str = "euler",
    tolerance: float = 1e-6,
    walked: list[Level] | None = None,
) -> Tensor:
    """The product; the levels go to ``walked``."""
    schedule = torch.cat([rising.flip(0), rising.new_zeros(int(rising[0] > 0))])
    visited = tuple(range(len(rising) - 2, -1, -1))
    function = sampling.function(sampler)
    plan = Levels(schedule, visited, visited)
    visit = (lambda level: None) if walked is None else walked.append
    return invert(Unnumbered(model), y, plan, solver, function, "eps", visit, tolerance=tolerance)


METHODS = (
    Method("img2img alternative, Euler", img2img_alternative),
    Method("img2img alternative, sigma adjustment", img2img_alternative_adjusted),
    Method("FlipSigmas / Unsampler, Euler", flip_sigmas),
    Method("FlipSigmas / Unsampler, Euler, 3 a level", partial(flip_sigmas, parts=3)),
    Method("DDIM inversion (diffusers)", ddim_inversion),
    Method("plain fixed point, 5 calls", partial(fixed_point, most=5)),
    *(Method(f"Anderson(3), {n} calls", partial(fixed_point, most=n, memory=3)) for n in (3, 5)),
    *(Method(f"ours, exact Euler, {t:g}", partial(ours, solver="exact", tolerance=t)) for t in (1e-4, 1e-6)),
    Method("ours, exact Heun, 1e-06", partial(ours, solver="exact", sampler="heun"), "heun"),
    Method("ours, exact DPM++ 2M, 1e-06", partial(ours, solver="exact", sampler="dpmpp_2m"), "dpmpp_2m"),
)


def photographs(count: int = 4) -> Tensor:
    """Photographs of scikit-image that the pixel denoiser has not seen, in [-1, 1], with shape (count, 3, 32, 32)."""
    from skimage import data

    left = torch.from_numpy(data.stereo_motorcycle()[0].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    small = torch.nn.functional.interpolate(left, scale_factor=0.25, mode="area")[0]
    tiles = small.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return tiles[torch.linspace(0, len(tiles) - 1, count).long()]


def tasks() -> list[Task]:
    """DESIGN 4's mixture, the Gaussian prior, and the trained network."""
    photos = photographs()
    return [
        *(Task(f"mixture, cfg {scale}", guided_mixture(scale), (16,)) for scale in (1, 7)),
        Task("Gaussian prior", make_model("gaussian", "", SIDE, SIDE), (3, SIDE, SIDE), photos),
        Task("pixel denoiser", pixel_denoiser(), (3, SIDE, SIDE), photos),
    ]


def guided_mixture(scale: float) -> Denoiser:
    """The anchors' mixture, guided towards its first three components."""
    whole = anchor_mixture()
    return guided(MixturePrior(whole.means[:3], whole.variance), whole, scale)


def decibels(made: Tensor, source: Tensor) -> float:
    """Over the whole batch; 999 without any error."""
    error = float((made.double() - source.double()).square().mean().sqrt())
    return 20 * math.log10(float(source.std()) / error) if error > 0 else 999.0


class Counted:
    """A denoiser in the precision its weights have, with the images it was given counted."""

    def __init__(self, model: Denoiser) -> None:
        self._model = model
        self._dtype = torch.float32 if isinstance(model, torch.nn.Module) else torch.float64
        self.images = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser's answer, in the precision of x."""
        self.images += len(x)
        return self._model(x.to(self._dtype), sigma.to(self._dtype)).to(x)


def measure(task: Task, method: Method) -> dict[str, Any]:
    """One method on one task."""
    note(f"{task.name}: {method.name}")
    model, sigmas = Counted(task.model), task.sigmas
    forward = sampling.function(method.sampler)
    with torch.inference_mode():
        y = forward(model, task.noise, sigmas[:STEPS], disable=True)
        model.images = 0
        found = method(model, y, sigmas[:STEPS].flip(0))
        calls = model.images / (len(y) * (STEPS - 1))
        back = forward(model, found, sigmas[:STEPS], disable=True)
        record = {
            "model": task.name,
            "method": method.name,
            "calls": calls,
            "noise_rmse": float((found - task.noise).square().flatten(1).mean(1).sqrt().mean()),
            "state_db": decibels(back, y),
        }
        if task.photographs is not None:
            source = task.photographs.double()
            model.images = 0
            z = method(model, source, sigmas.flip(0))
            calls = model.images / (len(source) * STEPS)
            record |= {"picture_calls": calls, "picture_db": decibels(forward(model, z, sigmas, disable=True), source)}
    return record


def calls_to(task: Task, run: Callable[..., Tensor], goal: float = 1e-5) -> float | None:
    """The fewest calls a level, over tolerances, with which the known noise is found to ``goal``."""
    found: list[float] = []
    for exponent in np.arange(-5.0, -8.0, -0.25):
        record = measure(task, Method(f"to 1e{exponent}", partial(run, tolerance=float(10**exponent))))
        if record["noise_rmse"] <= goal:
            found.append(record["calls"])
            if len(found) > 3:  # from here on they only rise
                break
    return min(found, default=None)


def converged(scale: float, count: int = 10) -> dict[str, Any]:
    """How many of the mixture's states the exact solver of DPM++ 2M brings back, and at how many calls a level."""
    task, walked = Task("", guided_mixture(scale), (16,)), list[Level]()
    noise = [np.random.default_rng(seed).normal(size=task.shape) for seed in range(count)]
    sigmas = task.sigmas
    y = sampling.function("dpmpp_2m")(task.model, sigmas[0] * torch.from_numpy(np.stack(noise)), sigmas, disable=True)
    ours(task.model, y, sigmas.flip(0), "exact", "dpmpp_2m", walked=walked)
    done = torch.stack([level.converged for level in walked]).all(0)
    calls = torch.stack([level.calls for level in walked]).double().mean()
    return {"cfg": scale, "converged": int(done.sum()), "of": count, "calls": float(calls)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(options: argparse.Namespace) -> Report:
    """Every method on every model, and what 1e-5 costs on the mixture."""
    records = [measure(task, method) for task in tasks() for method in METHODS]
    rows = []
    for r in records:
        picture = f"{r['picture_db']:.1f} dB ({r['picture_calls']:.1f})" if "picture_db" in r else ""
        rows.append(
            [r["model"], r["method"], f"{r['calls']:.1f}", f"{r['noise_rmse']:.1e}", f"{r['state_db']:.1f} dB", picture]
        )
    columns = ["model", "inversion", "calls a level", "noise RMSE", "state comes back", "picture comes back (calls)"]
    solvers: dict[str, Callable[..., Tensor]] = {
        "plain fixed point": fixed_point,
        "Anderson(3)": partial(fixed_point, memory=3),
        "ours": partial(ours, solver="exact"),
    }
    notes = ["Calls a level to a noise RMSE of 1e-5 on the mixture:"]
    for scale in (1, 3, 7):
        task = Task(f"mixture, cfg {scale}", guided_mixture(scale), (16,))
        costs = {name: calls_to(task, solver) for name, solver in solvers.items()}
        records.append({"model": task.name, "calls_to_1e-5": costs})
        shown = ", ".join(f"{name} {'never' if cost is None else f'{cost:.1f}'}" for name, cost in costs.items())
        notes.append(f"- cfg {scale}: {shown}")
    for scale in (1, 7):
        record = converged(scale)
        records.append(record)
        found = f"{record['converged']} of {record['of']} images converge, at {record['calls']:.1f} calls a level"
        notes.append(f"Exact DPM++ 2M to a step residual of 1e-6 on the mixture, cfg {scale}: {found}")
    return Report("Inversions: noise found, round trips and model calls", columns, rows, records, notes)
