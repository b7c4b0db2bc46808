"""PNGs of our own making hold what Pillow's would: the pixels, the texts, and no more bytes than noise needs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lib_unsampler.pictures import png


def picture(width: int, height: int, spread: int, seed: int) -> Image.Image:
    made = np.random.default_rng(seed).integers(0, 1 + spread, (height, width, 3))
    return Image.fromarray(made.astype(np.uint8))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 9, 255]), st.integers(0, 99))
def test_pillow_reads_every_pixel(width: int, height: int, spread: int, seed: int) -> None:
    made = picture(width, height, spread, seed)
    parts = [*png.header(made.size), *png.chunk(b"IDAT", png.deflated(made)), *png.chunk(b"IEND")]
    with Image.open(io.BytesIO(b"".join(parts))) as read:
        assert read.mode == "RGB" and read.size == made.size and read.tobytes() == made.tobytes()


def test_texts_are_kept_as_pillow_keeps_them(tmp_path: Path) -> None:
    made, info = picture(9, 5, 255, 0), PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat, Steps: 20")
    info.add_itxt("other", "eine Kätzin")
    png.save(made, tmp_path / "ours.png", info)
    made.save(tmp_path / "pillows.png", pnginfo=info)
    with Image.open(tmp_path / "ours.png") as ours, Image.open(tmp_path / "pillows.png") as theirs:
        assert ours.info == theirs.info and ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("spread", [0, 9, 255])
def test_it_is_about_as_small_as_pillows(spread: int) -> None:
    made, theirs = picture(256, 256, spread, 1), io.BytesIO()
    made.save(theirs, "PNG")
    assert len(png.deflated(made)) < 1.1 * len(theirs.getvalue()) + 1000


@pytest.mark.parametrize("change", [{"mode": "RGBA"}, {"profile": True}, {"format": "JPEG"}, {"dpi": (72, 72)}])
def test_what_is_more_than_pixels_and_texts_is_left_to_pillow(change: dict[str, Any]) -> None:
    made, options = picture(4, 4, 255, 0), {"format": change.get("format", "PNG"), "quality": 80, "pnginfo": None}
    assert png.serves(made, options) is ("format" not in change)
    if "mode" in change:
        made = made.convert(change["mode"])
    if "profile" in change:
        made.info["icc_profile"] = b"x"
    assert not png.serves(made, {**options, **({"dpi": change["dpi"]} if "dpi" in change else {})})


def test_what_is_drawn_on_a_picture_after_it_was_prepared_is_saved_too(tmp_path: Path) -> None:
    made = picture(20, 10, 255, 3)
    prepared = png.Prepared(made)
    png.save(made, tmp_path / "as it was.png", None, prepared)
    made.putpixel((3, 4), (1, 2, 3))
    png.save(made, tmp_path / "marked.png", None, prepared)
    with Image.open(tmp_path / "as it was.png") as one, Image.open(tmp_path / "marked.png") as other:
        assert other.getpixel((3, 4)) == (1, 2, 3) and other.tobytes() == made.tobytes() != one.tobytes()
