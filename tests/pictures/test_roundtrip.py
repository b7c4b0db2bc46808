"""Round-trip figures against known errors, and the page that shows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lib_unsampler.pictures.roundtrip import RoundTrip, latent_decibels, page, pixel_decibels


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-5])
def test_latent_decibels_are_of_the_source_s_own_deviation(share: float) -> None:
    source = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    error = torch.ones_like(source) * source.std() * share
    assert latent_decibels(source + error, source) == pytest.approx(-20 * np.log10(share), abs=1e-6)
    assert latent_decibels(source, source) is None


def test_pixel_decibels_of_a_known_error() -> None:
    one, other = Image.new("RGB", (8, 8), (10, 10, 10)), Image.new("RGB", (8, 8), (11, 11, 11))
    assert pixel_decibels(one, other) == pytest.approx(48.1308, abs=1e-3)
    assert pixel_decibels(one, one) is None


def test_the_page_marks_every_step_and_names_the_worst() -> None:
    trip = RoundTrip(101.3, None, 31.2, (2, 1, 0), (1e-7, 3e-4, 1e-8), 17, 1e-6)
    assert trip.lines()[0] == "latents 101.3 dB, pixels every bit"
    assert "0.0003" in trip.lines()[2] and "step 1" in trip.lines()[2] and "17" in trip.lines()[3]
    marked, bare = page(trip), page(RoundTrip(101.3, None, 31.2, (2, 1, 0), (), 17, 1e-6))
    assert marked.size == bare.size and marked.tobytes() != bare.tobytes()


@pytest.mark.parametrize("residuals", [(0.0,), (1e-6,), (1e-6, 1e-6), (1e-12, 10.0)])
def test_any_residuals_can_be_drawn(residuals: tuple[float, ...]) -> None:
    drawn = page(RoundTrip(None, None, None, tuple(range(len(residuals))), residuals, 3, 1e-6))
    assert len(drawn.getcolors(2**20) or []) > 3
