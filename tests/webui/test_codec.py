"""Between pictures and latents: the factor is the loaded model's, and any picture that img2img takes has a report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from doubled import latents_of
from fastapi import HTTPException
from PIL import Image

from lib_unsampler.pictures.roundtrip import pixel_decibels

REPORT = {"mode": "invert", "output": ["frames"], "report": True, "steps": 6}


@pytest.fixture
def factor_16(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host with a model whose autoencoder makes a sixteenth, as Flux.2's does in Forge Neo."""
    monkeypatch.setattr(host.processing, "opt_f", 16)
    return host


def test_a_request_takes_its_own_file_whatever_the_factor(factor_16: SimpleNamespace) -> None:
    made, processed = factor_16.run({"output": ["init", "latents"], "noise": "path"})
    assert latents_of(processed)[0].source.shape == (1, 4, 4, 4)
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    again, shown = factor_16.run({"output": ["init", "frames"], "trajectory": name})
    assert torch.equal(again.latest_samples, made.latest_samples) and shown.images[0].size == (64, 64)
    said = "it holds other pictures: 1 of 64 x 64, and a batch of this request is 1 of 128 x 64"
    with pytest.raises(HTTPException, match=said):
        factor_16.run({"output": ["init"], "trajectory": name}, width=128)


def test_a_latents_file_is_named_as_a_picture_of_its_size(
    factor_16: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modules import images

    save, sizes = images.save_image, []
    monkeypatch.setattr(images, "save_image", lambda image, *a, **k: sizes.append(image.size) or save(image, *a, **k))
    factor_16.run({"output": ["init", "latents"]})
    assert sizes[0] == (64, 64)


@pytest.mark.parametrize("settings", [{"noise": "path"}, {"mode": "invert"}, {"output": ["init", "strength sweep"]}])
def test_a_batch_whose_latent_is_encoded_once_is_as_any(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Neo's Qwen-Image encodes the first picture alone, and its sampling broadcasts it against the noise."""
    asked = {"output": ["init", "frames", "latents"], **settings}
    usual, shown = host.run(asked, batch_size=2)
    init = host.processing.StableDiffusionProcessingImg2Img.init

    def encoding_once(p: Any, *args: Any) -> None:
        init(p, *args)
        p.init_latent = p.init_latent[:1]

    monkeypatch.setattr(host.processing.StableDiffusionProcessingImg2Img, "init", encoding_once)
    once, again = host.run(asked, batch_size=2)
    assert torch.equal(once.latest_samples, usual.latest_samples) and len(once.latest_samples) == 2
    assert [i.tobytes() for i in again.images] == [i.tobytes() for i in shown.images]


@pytest.mark.parametrize("factor", [8, 16])
def test_the_decoder_s_memory_is_of_pixels(host: SimpleNamespace, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with room for three pictures of 512 x 512 at a time, where the host decodes them together."""
    from modules import devices

    from lib_unsampler.webui.host import codec

    need = 512 * 512 * codec.DECODER_BYTES * 2
    monkeypatch.setattr(host.processing, "opt_f", factor)
    monkeypatch.setattr(devices, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(devices, "dtype_vae", torch.float16, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(3.5 * need / 0.7), 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    latents = torch.empty(1, 4, 512 // factor, 512 // factor)
    together, apart = (SimpleNamespace(sd_model=SimpleNamespace(**more)) for more in ({"forge_objects": object()}, {}))
    assert codec.decodable(together, latents) == 3 and codec.decodable(apart, latents) == 1


def reported(host: SimpleNamespace, picture: Image.Image, **fields: Any) -> dict[str, Any]:
    _, processed = host.run(REPORT, init_images=[picture], denoising_strength=1.0, **fields)
    (report,) = [n for n in processed.extra_generation_params["Unsampler images"] if n["kind"] == "report"]
    return report


def blocks(size: tuple[int, int]) -> Image.Image:
    """A picture that the double's codec gives back whole: flat in each block of 8 x 8."""
    colours = np.random.default_rng(2).integers(0, 256, (-(-size[1] // 8), -(-size[0] // 8), 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1)[: size[1], : size[0]])


@pytest.mark.parametrize("size", [(100, 60), (64, 60), (100, 64), (96, 56), (65, 71)], ids=str)
def test_a_size_that_is_no_multiple_of_the_factor_has_a_report(host: SimpleNamespace, size: tuple[int, int]) -> None:
    report = reported(host, blocks(size), width=size[0], height=size[1])
    assert report["latents dB"] > 80 and (report["codec dB"] is None or report["codec dB"] > 50)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "1", "I", "CMYK"])
def test_a_picture_of_any_mode_has_a_report(host: SimpleNamespace, mode: str) -> None:
    report = reported(host, blocks((64, 64)).convert("RGBA" if mode == "PA" else "RGB").convert(mode))
    assert report["latents dB"] > 80


@pytest.mark.parametrize("background", ["#ffffff", "#204060"])
def test_a_transparent_picture_is_compared_on_the_host_s_background(host: SimpleNamespace, background: str) -> None:
    picture = blocks((64, 64)).convert("RGBA")
    picture.putalpha(Image.new("L", (64, 64), 0))
    host.shared.opts.img2img_background_color = background
    report = reported(host, picture)
    host.shared.opts.img2img_background_color = "#ffffff"
    assert report["codec dB"] is None or report["codec dB"] > 50


def test_pictures_of_two_sizes_are_compared_where_both_are() -> None:
    one = blocks((100, 60))
    assert pixel_decibels(one.crop((0, 0, 96, 56)), one) is None
    assert pixel_decibels(one, one.crop((0, 0, 96, 64))) is None
