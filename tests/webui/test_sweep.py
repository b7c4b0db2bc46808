"""The strength sweep in the doubled host: each picture is plain img2img's at the strength that starts at its level."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import pixels
from fastapi import HTTPException
from PIL import Image

SWEEP = {"output": ["strength sweep"]}
SAMPLERS = ("Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ SDE")


def swept(processed: Any) -> list[tuple[dict[str, Any], Image.Image, str]]:
    """(note, picture, parameters) of every picture of the sweep."""
    notes = processed.extra_generation_params["Unsampler images"]
    every = zip(notes, processed.images, processed.infotexts)
    return [(note, picture, text) for note, picture, text in every if note["kind"] == "sweep"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 2},
        {"nmask": torch.linspace(0, 1, 8).expand(4, 8, 8), "mask": 1 - torch.linspace(0, 1, 8).expand(4, 8, 8)},
        {"subseed_strength": 0.3, "initial_noise_multiplier": 0.9},
    ],
    ids=["batch", "mask", "subseed"],
)
def test_each_picture_is_plain_img2img_s_bit_for_bit(
    host: SimpleNamespace, sampler: str, fields: dict[str, Any]
) -> None:
    fields = {"sampler_name": sampler, "denoising_strength": 0.8, **fields}
    plain_own = pixels(host.run(**fields)[1])
    _, processed = host.run(SWEEP, **fields)
    made = swept(processed)
    images = fields.get("batch_size", 1)
    assert len(made) == (6 - (sampler == "DPM++ 2M SDE")) * images  # that one fails at a single step, plain too
    assert [picture.tobytes() for picture in processed.images[-images:]] == plain_own
    for note, picture, text in made:
        plain = host.run(**{**fields, "denoising_strength": note["strength"]})[1]
        assert picture.tobytes() == plain.images[note["image"]].tobytes(), note
        assert "Unsampler" not in text
        assert f"Denoising strength: {note['strength']:g}" in text


def test_extra_noise_is_the_host_s_own(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.shared.opts, "img2img_extra_noise", 0.2)
    for note, picture, _ in swept(host.run(SWEEP)[1]):
        assert picture.tobytes() == host.run(denoising_strength=note["strength"])[1].images[0].tobytes()


def test_no_more_calls_than_plain_img2img_makes(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import sd_samplers_cfg_denoiser

    calls: list[int] = []
    forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward
    monkeypatch.setattr(
        sd_samplers_cfg_denoiser.CFGDenoiser, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    made = swept(host.run(SWEEP)[1])
    swept_calls = len(calls)
    calls.clear()
    for strength in [*(note["strength"] for note, *_ in made), 0.6]:
        host.run(denoising_strength=strength)
    assert swept_calls == len(calls)


def test_strengths_have_as_few_decimals_as_can_be(host: SimpleNamespace) -> None:
    strengths = [note["strength"] for note, *_ in swept(host.run(SWEEP, steps=10, denoising_strength=1.0)[1])]
    assert strengths == sorted(strengths) and all(round(s, 2) == s for s in strengths)


def test_the_animation_ends_with_the_request_s_own_picture(host: SimpleNamespace) -> None:
    _, processed = host.run(SWEEP, is_api=True)
    notes = processed.extra_generation_params["Unsampler images"]
    assert [note["kind"] for note in notes] == ["sweep animation", *["sweep"] * 4]
    film = Image.open(io.BytesIO(base64.b64decode(processed.images[0])))
    assert film.n_frames == 5


def test_from_an_inversion_every_picture_is_the_source(host: SimpleNamespace) -> None:
    """cfg 1 and the prompt it was inverted under: every level leads back."""
    settings = {**SWEEP, "mode": "invert", "cfg": 1}
    p, processed = host.run(settings, cfg_scale=1.0)
    source = host.processing.decode_latent_batch(p.sd_model, p.init_latent)[0]
    expected = (255.0 * ((source + 1) / 2).clamp(0, 1)).round()
    for note, picture, _ in swept(processed):
        array = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(64, 64, 3).permute(2, 0, 1)
        assert (array.float() - expected).abs().max() <= 1, note


def test_independent_noise_starts_from_its_own_levels(host: SimpleNamespace) -> None:
    shared = [p.tobytes() for _, p, _ in swept(host.run(SWEEP)[1])]
    own = [p.tobytes() for _, p, _ in swept(host.run({**SWEEP, "noise": "independent"})[1])]
    assert len(own) == len(shared) and own[1] != shared[1]


def test_an_interrupt_keeps_what_is_done(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import sd_samplers_cfg_denoiser

    state, count = host.shared.state, [0]
    forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward

    def stopping(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 5:  # 1 + 2 calls are two pictures; the third is on its way
            state.interrupted = True
        return forward(*args, **kwargs)

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", stopping)
    made = swept(host.run(SWEEP)[1])
    assert [note["step"] for note, *_ in made] == [7, 6]


@pytest.mark.parametrize("with_", [{"output": ["strength sweep", "guide"]}, {"film": "both"}, {"mode": "replay"}])
def test_what_does_not_go_with_it_is_refused(host: SimpleNamespace, with_: dict[str, Any]) -> None:
    with pytest.raises(HTTPException, match="strength sweep"):
        host.run({**SWEEP, **with_})
