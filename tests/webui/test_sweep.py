"""The strength sweep in the doubled host: each picture is plain img2img's at the strength that starts at its level."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
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
@pytest.mark.one_of(4)
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


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("Euler", None),
        ("Heun", None),
        ("DPM2", None),
        ("DPM++ 2M", "dpmpp_2m looks back over its steps and starts without its history"),
        ("LMS", "lms looks back over its steps and starts without its history"),
        ("Euler a", "euler_ancestral adds noise at each step"),
        ("DPM++ 2M SDE", "dpmpp_2m_sde adds noise at each step"),
    ],
)
def test_a_sampler_that_need_not_come_back_from_every_level_is_named(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, sampler: str, said: str | None
) -> None:
    """Once, with two batches too, and from a saved file; and never where the noise was drawn."""
    monkeypatch.setattr(host.shared.opts, "outdir_samples", str(host.out))

    def remarks(settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        told = host.run({**SWEEP, **settings}, sampler_name=sampler, n_iter=2)[1].extra_generation_params
        return [m for m in told.get("Unsampler messages", []) if m.startswith("strength sweep: ")], told

    inverted, told = remarks({"mode": "invert", "output": ["strength sweep", "latents"]})
    from_file, _ = remarks({"trajectory": told["Unsampler latents names"][0]})
    for found in (inverted, from_file):
        found = [m for m in found if "alone" not in m]  # k-diffusion's SDE fails at a single step
        assert len(found) == (said is not None) and all(str(said) in m for m in found)
    assert [m for m in remarks({})[0] if "alone" not in m] == []


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM2"])
def test_single_steps_lead_back_from_every_level_of_an_inversion(host: SimpleNamespace, sampler: str) -> None:
    """Within the reported residual, in pixels; the multistep sampler does not, which is why it is named."""

    def off(name: str) -> float:
        p, processed = host.run({**SWEEP, "mode": "invert", "cfg": 1}, cfg_scale=1.0, sampler_name=name)
        source = host.processing.decode_latent_batch(p.sd_model, p.init_latent)[0]
        expected = (255.0 * ((source + 1) / 2).clamp(0, 1)).round().permute(1, 2, 0)
        arrays = [torch.from_numpy(np.array(picture)).float() for _, picture, _ in swept(processed)]
        return max(float((array - expected).abs().max()) for array in arrays)

    assert off(sampler) <= 1 < off("DPM++ 2M")


def test_independent_noise_starts_from_its_own_levels(host: SimpleNamespace) -> None:
    shared = [p.tobytes() for _, p, _ in swept(host.run(SWEEP)[1])]
    own = [p.tobytes() for _, p, _ in swept(host.run({**SWEEP, "noise": "independent"})[1])]
    assert len(own) == len(shared) and own[1] != shared[1]


def test_hooks_of_other_extensions_run_as_often_as_without(host: SimpleNamespace) -> None:
    """Each of the host's hooks once for a request, a batch or a picture; the one before every sampling before each."""
    seen: list[str] = []

    class Neighbour:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return lambda *_, **__: seen.append(name) if "process" in name else None

    def hooks(settings: dict[str, Any] | None) -> list[str]:
        seen.clear()
        p = host.make(() if settings is None else (settings,), batch_size=2)
        p.scripts.others.append(Neighbour())
        try:
            host.processing.process_images(p)
        finally:
            p.scripts.others.clear()
        return list(seen)

    without = hooks(None)
    assert "postprocess_image" in without and "postprocess" in without
    assert hooks(SWEEP) == without


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
