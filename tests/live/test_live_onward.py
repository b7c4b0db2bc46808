"""Guide, map, strength sweep, film and the rest of what goes on, in a running WebUI (see test_live.py)."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from test_live import (  # noqa: F401 (plain is a fixture)
    URL,
    apart,
    as_base64,
    ask,
    frames_of,
    img2img,
    kinds,
    notes,
    opened,
    pixels,
    plain,
    sampled_by_the_host,
)

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
CHOOSE_THEIR_STEPS = ("DPM fast", "DPM adaptive", "Restart")
SIZE = (128, 128)


def stepping() -> list[str]:
    return [s["name"] for s in ask("/sdapi/v1/samplers")] if URL else []


def refused_as(reply: dict[str, Any]) -> str:
    assert reply.get("status") == 422, reply.get("status")
    return str(reply["detail"])


@pytest.mark.parametrize("name", stepping())
def test_guide_of_strength_zero_is_plain_and_another_is_not(name: str) -> None:
    fields: dict[str, Any] = {"steps": 5}
    if name == "Restart":  # below 20 executed steps it does not restart, and is guided as Heun is
        fields |= {"steps": 30, "denoising_strength": 0.9}
    reply = img2img({"output": ["guide"], "guide_strength": 0}, sampler_name=name, **fields)
    if reply.get("status") == 422:
        assert name in refused_as(reply)
        return
    own = sampled_by_the_host(name, **fields)
    assert pixels(reply) == own
    guided = img2img({"output": ["guide"]}, sampler_name=name, **fields)
    if name in CHOOSE_THEIR_STEPS:
        assert name.lower().replace(" ", "_") in refused_as(guided).lower().replace(" ", "_")
    else:
        assert pixels(guided) != own


@pytest.mark.parametrize("name", ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "LCM", "Heun"])
def test_each_picture_of_a_sweep_is_plain_img2img_at_its_strength(name: str) -> None:
    reply = img2img({"output": ["strength sweep"], "step_increment": 2}, sampler_name=name)
    swept = [(i, n) for i, n in enumerate(notes(reply)) if n["kind"] == "sweep"]
    assert swept
    for place, note in swept:
        own = pixels(img2img(sampler_name=name, denoising_strength=note["strength"]))
        assert pixels({"images": [reply["images"][place]]}) == own, note
        assert f"Denoising strength: {note['strength']:g}" in reply["infotexts"][place]
        assert "Unsampler" not in reply["infotexts"][place]
    assert len(frames_of(opened(reply["images"][0]))) == len(swept) + 1


@pytest.mark.parametrize("name", ["Euler", "Heun", "DPM++ 2M SDE"])
def test_a_film_leaves_the_picture_and_ends_with_it(name: str) -> None:
    reply = img2img({"output": ["init", "frames", "animation"], "film": "both"}, sampler_name=name)
    parts = [note.get("part", "noising") for note in notes(reply)]
    frames = kinds(reply).count("frame")
    own = pixels(img2img(sampler_name=name))
    assert pixels({"images": reply["images"][-1:]}) == own
    assert parts.count("result") == 1 and parts.count("sampling") >= 3
    result = reply["images"][parts.index("result")]
    assert opened(result).convert("RGB").tobytes() == own[0]
    assert len(frames_of(opened(reply["images"][0]))) == frames


@pytest.mark.parametrize("name", ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE"])
def test_a_one_valued_map_is_img2img_at_that_strength(name: str) -> None:
    """Both encode the picture with a random draw of their own, so they may be a step apart."""
    grey = as_base64(Image.new("L", SIZE, 128))
    fields = {"sampler_name": name, "inpainting_fill": 1}
    reply = img2img({"output": ["guide"], "guide_weight": "map"}, mask=grey, denoising_strength=0.8, **fields)
    own = img2img(mask=None, denoising_strength=0.8 * 128 / 255, **fields)
    assert apart(pixels(reply)[0], pixels(own)[0]) <= 2


def test_a_black_map_is_the_source_and_what_does_not_go_with_a_map_is_refused() -> None:
    black = as_base64(Image.new("L", SIZE, 0))
    mapped = {"output": ["guide"], "guide_weight": "map"}
    reply = img2img({**mapped, "output": ["guide", "frames"]}, mask=black, inpainting_fill=1)
    source, *_, own = pixels(reply)
    assert notes(reply)[0]["sigma"] == 0 and apart(own, source) <= 1  # the host rounds down, and we to the nearest
    assert "masked content" in refused_as(img2img(mapped, mask=black, inpainting_fill=2))
    assert "only masked" in refused_as(img2img(mapped, mask=black, inpainting_fill=1, inpaint_full_res=True))
    assert "inpaint mask" in refused_as(img2img(mapped, mask=None))


def test_end_at_sigma_and_the_comfyui_file() -> None:
    shown = img2img({"output": ["frames"]})["params"]["Unsampler sigmas"]
    asked = {"output": ["latents"], "end_at_sigma": (shown[-2] + shown[-3]) / 2}
    assert max(img2img(asked)["params"]["Unsampler sigmas"]) == shown[-3]
    reply = img2img({**asked, "output": ["comfyui"]})
    if "status" in reply:  # Flux.2, Qwen and Wan have formats of their own
        assert "this model's is another" in refused_as(reply)
    else:
        assert reply["params"]["Unsampler comfyui"][0].endswith(".latent")


def test_nothing_is_left_behind(plain: list[bytes]) -> None:  # noqa: F811
    assert pixels(img2img()) == plain
