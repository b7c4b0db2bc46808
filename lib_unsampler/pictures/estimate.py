"""What a request will cost, before it is made: frames, seconds, bytes, model calls. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..settings import Settings
from .timing import TIMINGS, Timing

BYTES_A_PIXEL = {"gif": (0.68, 1.25), "webp": (0.13, 0.62), "apng": (1.6, 2.75), "mp4": (0.16, 0.27)}
"""Of a clean frame and of one of pure noise, as :mod:`.containers` and :mod:`.video` write them: between the
measured ones of noise with a grain of one pixel and of four."""

FRESH_MP4 = (0.2, 0.6)
"""The same of an MP4 whose noise is another in each frame, which no frame foretells."""

CURVE = 0.6
"""The bytes grow with this power of the noise's share: a little noise costs much."""

EXACT_CALLS = {"euler": 4, "2m": 14}
"""Model calls of the exact solver for a level of a single-step and of a multistep sampler, in the benchmarks."""

MANY_CALLS, MANY_MEGAPIXELS, MANY_BYTES = 400, 2000, 100_000_000
"""Beyond these a request is worth a word beforehand."""


@dataclass(frozen=True)
class Estimate:
    """What a request will cost.

    Attributes:
        frames: Of each image.
        seconds: One play of the animation; 0 without one.
        bytes: Of one animation; 0 without one.
        calls: Of the model, of the whole request.
        megapixels: Of all frames together.
        limited: Whether the animation will be brought down to so many bytes.
    """

    frames: int
    seconds: float
    bytes: int
    calls: int
    megapixels: float
    limited: bool = False

    def said(self, form: str) -> list[str]:
        """In words; ``form`` is the animation's format."""
        words = [f"{self.frames} frame{'' if self.frames == 1 else 's'}"] if self.frames else []
        if self.bytes:
            about = "at most" if self.limited else "about"
            words += [f"{self.seconds:.3g} s", f"{about} {size(self.bytes)} {form.upper()}"]
        calls = "no model calls" if not self.calls else f"about {self.calls} model calls"
        return [*words, calls]

    def warning(self) -> str:
        """What is large about it, or nothing."""
        large = []
        if self.calls > MANY_CALLS:
            large.append(f"about {self.calls} model calls")
        if self.megapixels > MANY_MEGAPIXELS:
            large.append(f"{self.megapixels:.0f} megapixels of frames")
        if self.bytes > MANY_BYTES:
            large.append(f"a file of about {size(self.bytes)}")
        return f"This will take long: {', '.join(large)}." if large else ""


def size(count: float) -> str:
    """A number of bytes, in words."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def estimate(
    settings: Settings,
    sigmas: Sequence[float],
    visited: int,
    sampled: int,
    width: int,
    height: int,
    images: int = 1,
    calls_a_step: int = 1,
    multistep: bool = False,
) -> Estimate:
    """The estimate of a request.

    Arguments:
        settings: What is wanted.
        sigmas: The kept levels' sigmas, least noisy first.
        visited: Levels that are walked, kept or not.
        sampled: Steps of img2img's own sampling, or 0.
        width: Of a picture.
        height: Of a picture.
        images: Pictures of the whole request.
        calls_a_step: Model calls of the sampler's step.
        multistep: Whether the sampler remembers earlier steps (DPM++ 2M), which is dearer to invert.
    """
    wanted = set(settings.output)
    shown = [0.0] * settings.include_clean + list(sigmas) if wanted & {"frames", "animation", "contact sheet"} else []
    megapixels = len(shown) * width * height * images / 1e6
    seconds, data, limited = 0.0, 0, False
    if "animation" in wanted and shown:
        durations = TIMINGS[settings.timing](shown, settings.duration)
        holds = settings.hold_first, settings.hold_last
        order = Timing(durations, *holds, settings.reverse, settings.ping_pong).shown(len(shown))
        seconds = sum(time for _, time in order)
        pixels = (width * height) * min(1.0, (settings.animation_side or math.inf) / max(width, height)) ** 2
        data = round(sum(_bytes(settings, shown[frame]) for frame, _ in order) * pixels)
        most = round(settings.max_megabytes * 1e6) or data
        data, limited = min(data, most), data > most
    calls = images * (_driven(settings, visited, calls_a_step, multistep) + sampled * calls_a_step)
    return Estimate(len(shown), seconds, data, calls, megapixels, limited)


def _bytes(settings: Settings, sigma: float) -> float:
    """Bytes a pixel of a frame: between the two by the share of noise in it."""
    clean, noise = BYTES_A_PIXEL[settings.format]
    if settings.format == "mp4" and (settings.mode == "replay" or settings.noise != "shared"):
        clean, noise = FRESH_MP4
    share = sigma / math.sqrt(1 + sigma * sigma)
    return clean + math.pow(share, CURVE) * (noise - clean)


def _driven(settings: Settings, visited: int, calls_a_step: int, multistep: bool) -> int:
    """Model calls for one image before any sampling."""
    step = visited * calls_a_step
    if settings.mode == "replay":
        return step if set(settings.output) & {"init", "latents"} and not settings.trajectory else 0
    if settings.mode == "noise":
        return 0
    each = 1 if settings.solver == "reverse" else min(settings.max_calls, EXACT_CALLS["2m" if multistep else "euler"])
    return step * each + (step if settings.report else 0)
