"""Guided img2img upscaling in a running WebUI with the small trained model (``train_model.py``), whole and tiled.

The model knows pictures of 128 and 256 pixels. A photograph that it knows is doubled beyond that, from 256 to 512, at
denoising strength 0.8. Tiles are Forge's or Neo's own MultiDiffusion, or in A1111 the extension
``multidiffusion-upscaler-for-automatic1111``. Figures are root mean squares out of 255: *low* is the distance to the
source of both averaged over blocks of 8 of its pixels, *high* what a picture has above the source's Nyquist frequency.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import train_model
from PIL import Image
from test_live import URL, as_base64, ask, kinds, opened
from test_live import img2img as request

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
SIDE, TILE, OVERLAP = 256, 256, 64
"""The source's, and the tiles' in pixels."""
WORD = os.environ.get("WEBUI_UPSCALED", "coins")
STEPS = int(os.environ.get("WEBUI_UPSCALED_STEPS", 20))
"""Of the schedule; Forge and Neo have the model at full width, where a step takes a busy processor half a minute."""
ALPHA = 1.0


def source() -> Image.Image:
    """The whole photograph, squeezed to a square."""
    (photograph,) = [p for w, p in zip(train_model.PHOTOGRAPHS, train_model.photographs("cpu")) if w == WORD]
    whole = Image.fromarray((photograph.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    return whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def scripts() -> set[str]:
    return {s["name"] for s in ask("/sdapi/v1/script-info")}


def tiles() -> dict[str, Any]:
    """The arguments of the tiling that this WebUI has."""
    if "multidiffusion integrated" in scripts():
        return {"MultiDiffusion Integrated": {"args": [True, "MultiDiffusion", TILE, TILE, OVERLAP, 4]}}
    if "tiled diffusion" in scripts():
        sizes = [TILE // 8, TILE // 8, OVERLAP // 8, 4]
        return {"Tiled Diffusion": {"args": [True, "MultiDiffusion", False, True, 512, 512, *sizes]}}
    pytest.skip("this WebUI has no tiling")


def upscaled(big: Image.Image, settings: dict[str, Any] | None, tiled: dict[str, Any], **fields: Any) -> dict[str, Any]:
    ours = {} if settings is None else {"Batch Unsampler": {"args": [settings]}}
    asked = {"width": big.width, "height": big.height, "steps": STEPS, "cfg_scale": 1, "prompt": WORD, "mask": None}
    asked |= {"sampler_name": "Euler", "scheduler": "Uniform", "denoising_strength": 0.8, **fields}
    return request(init_images=[as_base64(big)], alwayson_scripts={**ours, **tiled}, **asked)


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), float)


def low(picture: Image.Image, small: Image.Image) -> float:
    side = (small.width // 8,) * 2
    one, other = (values(p.resize(side, Image.Resampling.BOX)) for p in (picture, small))
    return float(np.sqrt(((one - other) ** 2).mean()))


def high(picture: Image.Image) -> float:
    """By Parseval's theorem: the spectrum's part beyond the source's, over the number of values squared."""
    spectrum = np.fft.fft2(values(picture), axes=(0, 1)) / picture.width / picture.height
    turns = np.abs(np.fft.fftfreq(picture.width) * picture.width)
    beyond = np.maximum(turns[:, None], turns[None]) >= SIDE / 2
    return float(np.sqrt((np.abs(spectrum * beyond[..., None]) ** 2).sum() / 3))


@pytest.mark.skipif(not (URL and "small" in ask("/sdapi/v1/options")["sd_model_checkpoint"]), reason="another model")
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_a_guided_upscale_keeps_the_composition_and_has_detail(tiled: bool) -> None:
    """At most half of plain img2img's distance at low frequencies, more than Lanczos' at high ones.

    Beside Lanczos itself stands Lanczos through the same autoencoder, which every sampled picture goes through.
    """
    small, tiling = source(), tiles() if tiled else {}
    big = small.resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    replies = {
        "plain": upscaled(big, None, tiling),
        "guided": upscaled(big, {"output": ["guide"], "guide_alpha": ALPHA}, tiling),
    }
    assert all("images" in reply for reply in replies.values()), replies
    clean = upscaled(big, {"output": ["frames"], "steps": 1}, {})
    assert kinds(clean)[0] == "frame"
    made = {name: opened(reply["images"][-1]) for name, reply in replies.items()}
    made |= {"Lanczos": big, "Lanczos, encoded and decoded": opened(clean["images"][0])}
    for name, picture in made.items():
        assert picture.size == big.size
        print(
            f"{WORD}, {'tiled' if tiled else 'whole'}: {name}: low {low(picture, small):.2f}, high {high(picture):.2f}"
        )
        if folder := os.environ.get("WEBUI_UPSCALED_TO"):
            picture.save(f"{folder}/{WORD}-{'tiled' if tiled else 'whole'}-{name}.png")
    assert low(made["guided"], small) <= low(made["plain"], small) / 2
    assert high(made["guided"]) > max(high(big), high(made["Lanczos, encoded and decoded"]))
