"""From the first decode to the closed GIF, beside the decoder alone, by a WebUI's own autoencoder.

Needs a CUDA device and ``--host``, a checkout of A1111 with its ``repositories``: the decoder is its code, of Stable
Diffusion's size, with random weights in float16, its attention torch's own; the noise is its NV source. 20 levels of
independent noise and the source, variance preserving: SDXL's 1024x1024 and SD 1.5's 512x512.

*One by one* decodes picture by picture on the GPU and looks for values that are not numbers, as A1111 does. *Four at
once* hands float32 pictures from 0 to 1 to the CPU and brings them to -1 to 1 there, as Forge does.

*GIF* is what an extension's own work adds: noising, decoding, pictures, the animation. *and PNG* also saves every
frame. Both end when the last file is whole.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..core.ahead import Ahead
from ..core.noising import Draw, walk
from ..core.schedule import Levels, levels
from ..pictures.background import Background
from ..pictures.progression import Scene, frames
from ..pictures.reel import Reel
from ..pictures.render import pixels, to_pictures
from ..settings import Settings
from ..standalone import sampling
from ..standalone.stills import Stills
from ._report import Report, progress

SIDES = {"SDXL 1024x1024": 128, "SD 1.5 512x512": 64}
WAYS = {"one by one": False, "four at once": True}
STEPS = 20


class Decoder:
    """Latents to pictures as a WebUI's ``decode_latent_batch`` makes them."""

    def __init__(self, host: Path, together: bool) -> None:
        """``host`` is A1111's checkout; ``together`` decodes as Forge does."""
        sys.path.insert(0, str(host / "repositories/stable-diffusion-stability-ai"))
        made = import_module("ldm.modules.diffusionmodules.model")
        made.AttnBlock.forward = _attention
        torch.manual_seed(0)
        size: dict[str, Any] = {"ch": 128, "out_ch": 3, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2}
        size |= {"attn_resolutions": [], "in_channels": 3, "resolution": 256, "z_channels": 4}
        network = nn.Sequential(nn.Conv2d(4, 4, 1), made.Decoder(**size))
        self._network = network.to("cuda", torch.float16).eval().requires_grad_(False)
        self.at_once = 4 if together else 1

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1] or near it, with shape (B, 3, H, W)."""
        pictures = self._network(latents.half() / 0.18215)
        if self.at_once > 1:
            return ((pictures.cpu().float() + 1) / 2).clamp(0, 1) * 2 - 1
        if pictures.isnan().all():
            raise ValueError("the decoder's answer is not a number")
        return pictures


class HostDraws:
    """The NV source's draws of one image, in order."""

    def __init__(self, host: Path, shape: tuple[int, ...]) -> None:
        spec = spec_from_file_location("rng_philox", host / "modules/rng_philox.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        self._generator, self._shape = module.Generator(1), shape

    def __call__(self, j: int) -> Tensor:
        """The next draw."""
        return torch.from_numpy(self._generator.randn(self._shape))[None]


def _attention(self: Any, x: Tensor) -> Tensor:
    """The decoder's attention by torch's own function (A1111's ``sdp_attnblock_forward``)."""
    h = self.norm(x)
    q, k, v = (part(h).flatten(2).transpose(1, 2).contiguous() for part in (self.q, self.k, self.v))
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    answer: Tensor = x + self.proj_out(out)
    return answer


def alone(decoder: Decoder, source: Tensor, plan: Levels) -> float:
    """The decoder on as many latents, and nothing else; returns when it had ended."""
    for latents in source.expand(len(plan.kept) + 1, -1, -1, -1).split(decoder.at_once):
        decoder(latents)
    torch.cuda.synchronize()
    return time.perf_counter()


def filed(decoder: Decoder, draw: Draw, source: Tensor, plan: Levels, folder: Path, stills: bool) -> float:
    """Every level decoded and written, as the extension does; returns when the last decode had ended."""
    draws = Ahead(draw, len(plan.visited) - 1, source.device)
    settings = Settings(output=("animation",))
    scene = Scene(source, plan.schedule, "eps", "variance preserving")
    walked = walk(source, plan, draws, "independent", "eps")

    ends: list[float] = []

    def decode(latents: Tensor) -> Callable[[], list[Image.Image]]:
        made = pixels(decoder(latents))
        ends.append(time.perf_counter())
        return partial(to_pictures, made)

    with Background() as background, Background() as savers:
        sigmas = [0.0, *plan.sigmas.tolist()]
        saver = Stills(folder, "", savers) if stills else None
        with Reel(settings, sigmas, "", background, folder / "x.gif", False) as reel:
            for frame, sigma in zip(frames(walked, scene, True, decode, decoder.at_once, lambda *_: True), sigmas):
                shown = reel.add(frame.pictures[0], frame.index, None)
                if saver is not None:
                    saver.add(shown, sigma)
            savers.finish()
            reel.finish()
    return ends[-1]


def measure(name: str, way: str, host: Path, rounds: int) -> list[dict[str, Any]]:
    """The three, one after the other in each round; medians."""
    decoder, side = Decoder(host, WAYS[way]), SIDES[name]
    source = torch.randn(1, 4, side, side, device="cuda")
    plan = levels(sampling.get_sigmas("karras", STEPS, "eps"))
    with tempfile.TemporaryDirectory() as made, torch.inference_mode():
        folder = Path(made)

        def written(stills: bool) -> float:
            return filed(decoder, HostDraws(host, source.shape[1:]), source, plan, folder, stills)

        runs: dict[str, Callable[[], float]] = {
            "decoder alone": lambda: alone(decoder, source, plan),
            "GIF": lambda: written(False),
            "GIF and PNG": lambda: written(True),
        }
        seconds: dict[str, list[float]] = {to: [] for to in runs}
        after: dict[str, list[float]] = {to: [] for to in runs}
        peaks = {}
        for number in range(rounds + 1):
            for to, run in runs.items():
                torch.cuda.reset_peak_memory_stats()
                begun = time.perf_counter()
                last, ended = run(), time.perf_counter()
                if number:
                    seconds[to].append(ended - begun)
                    after[to].append(ended - last)
                peaks[to] = torch.cuda.max_memory_allocated()
    medians = {to: statistics.median(taken) for to, taken in seconds.items()}
    return [
        {
            "size": name,
            "way": way,
            "to": to,
            "seconds": medians[to],
            "ratio": medians[to] / medians["decoder alone"],
            "after": statistics.median(after[to]),
            "peak": peaks[to],
        }
        for to in runs
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the host's code is."""
    parser.add_argument("--host", type=Path, required=True, help="a checkout of A1111, its repositories included")


def run(options: argparse.Namespace) -> Report:
    """Both sizes both ways, where there is a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("unsampler: error: bench decode needs a CUDA device")
    cases = [(name, way) for way in WAYS for name in SIDES]
    records = [record for name, way in progress(cases, len(cases)) for record in measure(name, way, options.host, 5)]
    rows = [
        [
            *(r["size"], r["way"], r["to"], f"{r['seconds']:.3f} s", f"{r['ratio']:.3f}"),
            *(f"{1e3 * r['after']:.0f} ms", f"{r['peak'] / 1e6:.0f} MB"),
        ]
        for r in records
    ]
    columns = [
        "pictures",
        "decoded",
        "to",
        "time",
        "over the decoder alone",
        "after the last decode",
        "peak GPU memory",
    ]
    return Report("From the first decode to the closed GIF, 21 frames", columns, rows, records, [])
