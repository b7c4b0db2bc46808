"""How near sampling back comes to the source: figures, and a page that shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.inversion import Level
from .drawing import ACCENT, FAINT, INK, Plot

SIZE = (720, 405)


@dataclass(frozen=True)
class RoundTrip:
    """One image's way to noise and back.

    Attributes:
        latents: Decibels of the latents sampled back against the source; None is every bit.
        pixels: Decibels of their pictures; None is every bit.
        codec: Decibels of the source's picture against the picture that was encoded: more than that the
            model's codec does not give back anyway. None where the two are not the same picture.
        steps: Schedule indices, least noisy first.
        residuals: Each step's residual; empty where the solver measures none.
        calls: Model calls spent on this image.
        tolerance: The residual that was asked for.
    """

    latents: float | None
    pixels: float | None
    codec: float | None
    steps: Sequence[int]
    residuals: Sequence[float]
    calls: int
    tolerance: float

    def lines(self) -> list[str]:
        """The figures in words."""
        found = [f"latents {_decibels(self.latents)}, pixels {_decibels(self.pixels)}"]
        if self.codec is not None:
            found.append(f"the codec's own round trip: {_decibels(self.codec)} in pixels")
        if self.residuals:
            worst = max(range(len(self.residuals)), key=lambda i: self.residuals[i])
            found.append(f"largest residual {self.residuals[worst]:.2g}, at step {self.steps[worst]}")
        return [*found, f"{self.calls} model calls for {len(self.steps)} levels"]


def _decibels(value: float | None) -> str:
    return "every bit" if value is None else f"{value:.1f} dB"


def latent_decibels(made: Tensor, source: Tensor) -> float | None:
    r""":math:`20 \log_{10}(\mathrm{std}(source) / \mathrm{RMSE})` of one image's latents; None without any error."""
    made, source = made.double().cpu(), source.double().cpu()
    error = float((made - source).square().mean().sqrt())
    return None if error == 0 else 20 * math.log10(max(float(source.std()), 1e-30) / error)


def pixel_decibels(made: Image.Image, source: Image.Image) -> float | None:
    r""":math:`20 \log_{10}(255 / \mathrm{RMSE})` of two pictures; None without any error.

    A codec gives back whole blocks: where it drops or adds some rows or columns, the shared part is compared.
    """
    shared = (0, 0, min(made.width, source.width), min(made.height, source.height))
    pictures = (picture.convert("RGB").crop(shared) for picture in (made, source))
    one, other = (np.asarray(picture, dtype=np.float64) for picture in pictures)
    error = math.sqrt(float(np.mean((one - other) ** 2)))
    return None if error == 0 else 20 * math.log10(255 / error)


def measured(
    levels: Sequence[Level],
    image: int,
    latents: tuple[Tensor, Tensor],
    pictures: tuple[Image.Image, Image.Image],
    encoded: Image.Image | None,
    tolerance: float,
) -> RoundTrip:
    """The round trip of one image of a batch.

    Arguments:
        levels: What the inversion walked, least noisy first.
        image: The image's number in the batch.
        latents: Its latents sampled back, and its source's, of one shape.
        pictures: The pictures of both.
        encoded: The picture that the source was encoded from, if it is known.
        tolerance: The residual that was asked for.
    """
    return RoundTrip(
        latents=latent_decibels(*latents),
        pixels=pixel_decibels(*pictures),
        codec=None if encoded is None else pixel_decibels(pictures[1], encoded),
        steps=[level.index for level in levels],
        residuals=[float(level.residual[image]) for level in levels if level.residual is not None],
        calls=sum(int(level.calls[image]) for level in levels),
        tolerance=tolerance,
    )


def page(trip: RoundTrip) -> Image.Image:
    """The figures above a plot of each step's residual, logarithmic, with the tolerance."""
    sheet = Plot(SIZE)
    for number, line in enumerate(["Round trip", *trip.lines()]):
        sheet.text((24, 14 + 22 * number), line, 16)
    if trip.residuals:
        _plot(sheet, trip, (64, 14 + 22 * 6, SIZE[0] - 24, SIZE[1] - 48))
    return sheet.page()


def _plot(plot: Plot, trip: RoundTrip, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    values = torch.tensor([*trip.residuals, trip.tolerance]).clamp(1e-16).log10()
    low, high = math.floor(float(values.min())), math.ceil(float(values.max()) + 1e-9)
    high = max(high, low + 1)

    def height(value: float) -> float:
        return bottom - (math.log10(max(value, 1e-16)) - low) / (high - low) * (bottom - top)

    plot.frame(box)
    for power in range(low, high + 1, max(1, (high - low) // 6)):
        plot.line([(left, height(10.0**power)), (right, height(10.0**power))], FAINT, 1)
        plot.text((left - 8, height(10.0**power) - 8), f"1e{power}", 13, 1)
    plot.line([(left, height(trip.tolerance)), (right, height(trip.tolerance))], ACCENT, 2)
    plot.text((right - 8, height(trip.tolerance) - 18), "tolerance", 13, 1)
    across = [left + (i + 0.5) / len(trip.steps) * (right - left) for i in range(len(trip.steps))]
    points = [(x, height(residual)) for x, residual in zip(across, trip.residuals)]
    plot.line(points, INK, 2)
    for number, (x, y) in enumerate(points):
        plot.mark((x, y), INK)
        if number % max(1, -(-len(points) // 12)) == 0:
            plot.text((x, bottom + 8), str(trip.steps[number]), 13, 0.5)
    plot.text((right, bottom + 26), "step (least noisy first)", 13, 1)
