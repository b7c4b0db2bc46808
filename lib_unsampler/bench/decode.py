"""From the first decode to the closed GIF, beside the decoder alone, by a WebUI's own autoencoder.

Needs a CUDA device and ``--ldm``, a folder with Stability's ``ldm`` as A1111 keeps one under ``repositories``. The
decoder has Stable Diffusion's size and random weights, in float16, its attention torch's own, as a WebUI runs it; it
decodes picture by picture and looks for values that are not numbers, as A1111 does. 20 levels of independent noise and
the source, variance preserving: SDXL's 1024x1024 and SD 1.5's 512x512. Noise is the WebUI's NV source.

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
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..core.ahead import Ahead
from ..core.noising import walk
from ..core.philox import PhiloxDraws
from ..core.schedule import Levels, levels
from ..pictures.background import Background
from ..pictures.progression import Scene, frames
from ..pictures.reel import Reel
from ..pictures.render import to_pictures
from ..settings import Settings
from ..standalone import sampling
from ..standalone.stills import Stills
from ._report import Report, progress

SIDES = {"SDXL 1024x1024": 128, "SD 1.5 512x512": 64}
STEPS = 20


class Decoder:
    """Latents to pictures as A1111's ``decode_latent_batch`` makes them, on the GPU."""

    def __init__(self, ldm: Path) -> None:
        """``ldm`` is the folder that holds the package of that name."""
        sys.path.insert(0, str(ldm))
        made = import_module("ldm.modules.diffusionmodules.model")
        made.AttnBlock.forward = _attention
        torch.manual_seed(0)
        size: dict[str, Any] = {"ch": 128, "out_ch": 3, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2}
        size |= {"attn_resolutions": [], "in_channels": 3, "resolution": 256, "z_channels": 4}
        network = nn.Sequential(nn.Conv2d(4, 4, 1), made.Decoder(**size))
        self._network = network.to("cuda", torch.float16).eval().requires_grad_(False)

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1] or near it, with shape (B, 3, H, W)."""
        made = []
        for latent in latents.split(1):
            picture = self._network(latent.half() / 0.18215).float()[0]
            if picture.isnan().all():
                raise ValueError("the decoder's answer is not a number")
            made.append(picture)
        return torch.stack(made)


def _attention(self: Any, x: Tensor) -> Tensor:
    """The decoder's attention by torch's own function (A1111's ``sdp_attnblock_forward``)."""
    h = self.norm(x)
    q, k, v = (part(h).flatten(2).transpose(1, 2).contiguous() for part in (self.q, self.k, self.v))
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    answer: Tensor = x + self.proj_out(out)
    return answer


def alone(decoder: Decoder, source: Tensor, plan: Levels) -> None:
    """The decoder on as many latents, and nothing else."""
    for _ in range(len(plan.kept) + 1):
        decoder(source)
    torch.cuda.synchronize()


def filed(decoder: Decoder, source: Tensor, plan: Levels, folder: Path, stills: bool) -> None:
    """Every level decoded and written, as the extension does."""
    draws = Ahead(PhiloxDraws((1,), source.shape[1:]), len(plan.visited) - 1)
    settings = Settings(output=("animation",))
    scene = Scene(source, plan.schedule, "eps", "variance preserving")
    walked = walk(source, plan, lambda j: draws(j).to(source.device), "independent", "eps")

    def decode(latents: Tensor) -> list[Image.Image]:
        return to_pictures(decoder(latents))

    with Background() as background:
        sigmas = [0.0, *plan.sigmas.tolist()]
        saver = Stills(folder, "", background) if stills else None
        with Reel(settings, sigmas, "", background, folder / "x.gif", False) as reel:
            for frame, sigma in zip(frames(walked, scene, True, decode, 1, lambda *_: True), sigmas):
                shown = reel.add(frame.pictures[0], frame.index, None)
                if saver is not None:
                    saver.add(shown, sigma)
            reel.finish()
        background.finish()


def measure(name: str, decoder: Decoder, rounds: int) -> list[dict[str, Any]]:
    """The three, one after the other in each round; medians."""
    side = SIDES[name]
    source = torch.randn(1, 4, side, side, device="cuda")
    plan = levels(sampling.get_sigmas("karras", STEPS, "eps"))
    with tempfile.TemporaryDirectory() as made, torch.inference_mode():
        folder = Path(made)
        ways: dict[str, Callable[[], None]] = {
            "decoder alone": lambda: alone(decoder, source, plan),
            "GIF": lambda: filed(decoder, source, plan, folder, False),
            "GIF and PNG": lambda: filed(decoder, source, plan, folder, True),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks = {}
        for number in range(rounds + 1):
            for way, run in ways.items():
                torch.cuda.reset_peak_memory_stats()
                begun = time.perf_counter()
                run()
                if number:
                    seconds[way].append(time.perf_counter() - begun)
                peaks[way] = torch.cuda.max_memory_allocated()
    return [
        {"size": name, "way": way, "seconds": statistics.median(seconds[way]), "peak_bytes": peaks[way]} for way in ways
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the autoencoder's code is."""
    parser.add_argument("--ldm", type=Path, required=True, help="the folder that holds Stability's package ldm")


def run(options: argparse.Namespace) -> Report:
    """Both sizes, where there is a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("unsampler: error: bench decode needs a CUDA device")
    decoder = Decoder(options.ldm)
    records = [record for name in progress(SIDES, len(SIDES)) for record in measure(name, decoder, 5)]
    base = {record["size"]: record for record in records if record["way"] == "decoder alone"}
    rows = [
        [
            record["size"],
            record["way"],
            f"{record['seconds']:.3f} s",
            f"{record['seconds'] / base[record['size']]['seconds']:.3f}",
            f"{record['peak_bytes'] / 1e6:.0f} MB",
        ]
        for record in records
    ]
    columns = ["pictures", "to", "time", "over the decoder alone", "peak GPU memory"]
    return Report("From the first decode to the closed GIF, 21 frames", columns, rows, records, [])
