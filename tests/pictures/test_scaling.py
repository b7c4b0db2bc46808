"""Lanczos' filter: PyTorch's and Pillow's make the same picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lib_unsampler.pictures import scaling


@pytest.mark.parametrize(
    "size", [(236, 177), (128, 96), (255, 191), (255, 192), (256, 192), (31, 1), (1, 1), (300, 300)]
)
@pytest.mark.parametrize("fast", [scaling.FAST, False])
def test_any_size_is_lanczos(size: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "FAST", fast)
    pixels = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    pixels[:, 128:] //= 4  # an edge between a light half and a dark one
    made = scaling.lanczos(pixels, size)
    wanted = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    assert made.mode == "RGB" and made.size == size
    assert np.abs(np.asarray(made).astype(int) - np.asarray(wanted)).max() <= (2 if fast else 0)
