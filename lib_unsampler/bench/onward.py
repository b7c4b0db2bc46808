"""What guide, film and strength sweep take over the sampling that they belong to, on embedded models.

The bundled cat at 400x300, 20 Karras steps: the Gaussian prior under a prompt, whose call is a few passes over
memory, and the small trained network in its place. Each is run in turn with the plain sampling beside it, and times
are the processor's own, so that a busy machine changes neither; the figure is the median of the ratios. Beside it is
what was added outside the model's calls, whose own time varies by more than that. The film is the states on their way
to the disk; its frames' decoding and encoding is what every frame costs. The sweep's plain sampling is one from each
of its levels, as they are walked; with the network it is left out for its time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pictures.film import Film
from ..pictures.progression import Scene
from ..settings import Settings, parse
from ..standalone import onward, reading, running
from ..standalone.embedded import Denoiser
from ..standalone.progress import silent
from ._pixels import pixel_denoiser
from ._report import Report, progress

CAT = Path(__file__).resolve().parents[1] / "assets/cat.jpg"
SIDE = 400
CASES = [
    (model, name, sampler, cfg)
    for model, names in (("Gaussian", ("guide", "film", "sweep")), ("network", ("guide", "film")))
    for sampler, cfg in (("euler", 1), ("dpmpp_2m", 7))
    for name in names
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """How often each is run."""
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs; the median of their ratios is shown")


def run(options: argparse.Namespace) -> Report:
    """Every case beside its plain sampling."""
    source = reading.load_picture(CAT, SIDE)
    with torch.inference_mode():
        records = [measure(source, *case, options.rounds) for case in progress(CASES, len(CASES))]
    columns = ["model", "what", "sampler", "cfg", "plain", "with it", "ratio", "outside the model", "model calls"]
    rows = [
        [
            r["model"],
            r["what"],
            r["sampler"],
            str(r["cfg"]),
            f"{1e3 * r['plain']:.0f} ms",
            f"{1e3 * r['own']:.0f} ms",
            f"{r['ratio']:.3f}",
            f"{1e3 * r['added']:+.1f} ms ({100 * r['added'] / r['plain']:.1f} %)",
            f"{r['own_calls']} of {r['plain_calls']}",
        ]
        for r in records
    ]
    return Report("What goes on from the levels, beside the sampling it belongs to", columns, rows, records, [])


def measure(source: Tensor, model: str, what: str, sampler: str, cfg: float, rounds: int) -> dict[str, Any]:
    """One case: medians of both times, and of their ratio."""
    asked = {"sampler": sampler, "resample_positive": "sunset", "resample_cfg": cfg}
    plain, own = both(source, what, parse(asked, "cli"), parse({**asked, "guide": what == "guide"}, "cli"))
    with Counted(pixel_denoiser() if model == "network" else None) as counted:
        pairs = [(counted.run(plain), counted.run(own)) for _ in range(rounds + 1)][1:]
    return {
        "model": model,
        "what": what,
        "sampler": sampler,
        "cfg": cfg,
        "plain": statistics.median(p.seconds for p, _ in pairs),
        "own": statistics.median(o.seconds for _, o in pairs),
        "ratio": statistics.median(o.seconds / p.seconds for p, o in pairs),
        "added": statistics.median(o.outside - p.outside for p, o in pairs),
        "plain_calls": pairs[0][0].calls,
        "own_calls": pairs[0][1].calls,
    }


def both(
    source: Tensor, what: str, settings: Settings, wanted: Settings
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the plain sampling, the same with what is measured)."""
    plan = running.plan_levels(settings)
    prediction = onward.PREDICTION[settings.model]
    scene = Scene(source, plan.schedule, prediction, settings.view)
    level = onward.shared_levels(source, plan.schedule, settings)
    plain, guided = (running.Back(scene, s, s.sampler, level, None, 0) for s in (settings, wanted))
    z = level(0).clone()

    def filmed() -> None:
        with tempfile.TemporaryDirectory() as folder, Film(Path(folder) / "x", plan, prediction, wanted) as film:
            plain(0, z, silent, film.listen)

    def swept() -> None:
        with running.Sweep(settings, plan.sigmas.tolist(), "", None, None, lambda i, z: plain(i, z, silent)) as sweep:
            for index, noisy in running.noised(source, plan, settings):
                sweep.take(index, noisy)
            sweep.finish()

    def one_by_one() -> None:
        for index, noisy in running.noised(source, plan, settings):
            plain(index, noisy, silent)

    if what == "sweep":
        return one_by_one, swept
    return lambda: plain(0, z, silent), filmed if what == "film" else lambda: guided(0, z, silent)


@dataclass(frozen=True)
class Run:
    """Seconds that a run took of the processor, those of them outside the model's calls, and the calls."""

    seconds: float
    outside: float
    calls: int


class Counted:
    """Counts and times the embedded model's calls while it is entered, or those of a network in its place."""

    def __init__(self, network: Denoiser | None) -> None:
        self._own, self._network = onward.guided, network
        self._calls: list[float] = []

    def __enter__(self) -> Counted:
        onward.guided = self._guided
        return self

    def __exit__(self, *_: object) -> None:
        onward.guided = self._own

    def _guided(self, positive: Denoiser, negative: Denoiser, scale: float) -> Denoiser:
        denoiser = self._own(self._network or positive, self._network or negative, scale)

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            begun = time.process_time()
            answer = denoiser(x, sigma)
            self._calls.append(time.process_time() - begun)
            return answer

        return counted

    def run(self, function: Callable[[], Any]) -> Run:
        """What a run takes."""
        self._calls.clear()
        begun = time.process_time()
        function()
        taken = time.process_time() - begun
        return Run(taken, taken - sum(self._calls), len(self._calls))
