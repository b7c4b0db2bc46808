"""Guide, map and film in the doubled host: img2img's own sampling, drawn towards the levels or watched."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from doubled import latents_of, pixels
from fastapi import HTTPException
from PIL import Image
from torch import Tensor

STEPPING = ("Euler", "Euler a", "Heun", "DPM2", "DPM2 a", "LMS", "DPM++ 2S a", "DPM++ SDE", "DPM++ 2M", "DPM++ 2M SDE")
MAPPED = ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE")
GUIDE = {"output": ["guide"]}
MAP = {"output": ["guide"], "guide_weight": "map"}
SIDE = 8
Seen = list[tuple[float, Tensor]]


def samples(host: SimpleNamespace, settings: Any = None, **fields: Any) -> Tensor:
    """The latents that a request hands to the host's decoder."""
    return host.run(settings, **fields)[0].latest_samples


def masked(weights: Tensor) -> dict[str, Tensor]:
    """A request's fields for a mask, as the host makes them of a picture."""
    whole = weights.expand(4, SIDE, SIDE)
    return {"nmask": whole, "mask": 1 - whole}


@pytest.fixture
def calls(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every model call as (sigma, x), in order."""
    from modules import sd_samplers_cfg_denoiser

    seen: Seen = []
    forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward

    def noted(self: Any, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        seen.append((float(sigma[0]), x.clone()))
        return forward(self, x, sigma, **args)

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", noted)
    return seen


def levels_of(host: SimpleNamespace, **fields: Any) -> dict[float, Tensor]:
    """z of every level by its sigma, as a latents file of the same request has it."""
    (saved,) = latents_of(host.run({"output": ["latents"]}, **fields)[1])
    return {round(float(sigma), 5): z for sigma, z in zip(saved.sigmas, saved.z)}


@pytest.mark.parametrize("sampler", STEPPING)
def test_strength_zero_is_plain_img2img_bit_for_bit(host: SimpleNamespace, sampler: str) -> None:
    fields = {"sampler_name": sampler, "batch_size": 2}
    plain = samples(host, **fields)
    assert torch.equal(samples(host, {**GUIDE, "guide_strength": 0}, **fields), plain)
    assert not torch.equal(samples(host, GUIDE, **fields), plain)


def test_whole_weight_under_euler_ends_with_the_least_noisy_level(host: SimpleNamespace, calls: Seen) -> None:
    """alpha 0: every step begins at z, so the model's last answer, and so the result, is that to the last z."""
    made = samples(host, {**GUIDE, "guide_alpha": 0})
    seen = list(calls)
    assert len(seen) == 5
    expected = levels_of(host)
    for sigma, x in seen:
        assert torch.equal(x, expected[round(sigma, 5)])
    sigma, z = seen[-1]
    from modules.sd_samplers_cfg_denoiser import mean_of

    mean = 7 * mean_of(["a cat"], z)  # the negative prompt is empty: mean 0
    assert (made - (mean + (z - mean) / (1 + sigma**2))).abs().max() < 1e-6


@pytest.mark.parametrize("sampler", STEPPING)
def test_a_step_is_mixed_once_before_its_first_call(host: SimpleNamespace, calls: Seen, sampler: str) -> None:
    """As many model calls as without, and with whole weight the model sees z once for each step."""
    fields = {"sampler_name": sampler}
    host.run({"output": ["init"]}, **fields)
    plain = len(calls)
    calls.clear()
    host.run({**GUIDE, "guide_alpha": 0}, **fields)
    seen, expected = list(calls), list(levels_of(host, **fields).values())
    assert len(seen) == plain
    assert sum(any(torch.equal(x, z) for z in expected) for _, x in seen) == 5


def test_the_weight_falls_with_the_timestep(host: SimpleNamespace, calls: Seen) -> None:
    """The double counts no timesteps: sigma stands for t / 1000 there, so the recursion can be written out."""
    from modules.sd_samplers_cfg_denoiser import mean_of

    made = samples(host, {**GUIDE, "guide_strength": 0.8, "guide_alpha": 2, "guide_until": 0.5})
    seen, levels = [sigma for sigma, _ in calls], levels_of(host)
    sigmas = [*seen, 0.0]
    x = levels[round(seen[0], 5)]
    for i, sigma in enumerate(seen):
        t = min(1000.0, 1000 * sigma)
        c = 0.8 * ((1 + np.cos(np.pi * (1000 - t) / 1000)) / 2) ** 2 if i / len(seen) <= 0.5 else 0
        x = c * levels[round(sigma, 5)] + (1 - c) * x
        mean = 7 * mean_of(["a cat"], x)
        denoised = mean + (x - mean) / (1 + sigma**2)
        x = x + (sigmas[i + 1] - sigma) * (x - denoised) / sigma
    assert (made - x).abs().max() < 1e-5


def test_from_an_inversion_it_is_drawn_to_the_inverted_levels(host: SimpleNamespace, calls: Seen) -> None:
    wanted = {"mode": "invert", "cfg": 1}
    (saved,) = latents_of(host.run({**wanted, "output": ["latents", "init"]})[1])
    calls.clear()
    host.run({**wanted, "output": ["guide"], "guide_alpha": 0})
    for (sigma, x), z in zip(calls[-5:], reversed(saved.z)):
        assert torch.equal(x, z), sigma


def test_init_and_guide_are_one_sampling(host: SimpleNamespace, calls: Seen) -> None:
    host.run({"output": ["init", "guide"], "mode": "invert"})
    alone = len(calls)
    calls.clear()
    host.run({"output": ["guide"], "mode": "invert"})
    assert len(calls) <= alone  # the inversion is remembered; no second sampling


@pytest.mark.parametrize("sampler", ["DPM fast", "DPM adaptive"])
def test_a_sampler_that_chooses_its_steps_is_refused_before_work(
    host: SimpleNamespace, calls: Seen, sampler: str
) -> None:
    with pytest.raises(HTTPException, match="sampler"):
        host.run(GUIDE, sampler_name=sampler)
    assert calls == []


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"noise": "path"}, "noise: 'path'"),
        ({"noise": "independent"}, "noise: 'independent'"),
        ({"mode": "replay"}, "output: guide"),
        ({"steps": 5}, "steps: 5"),
        ({"guide_from": 0.6, "guide_until": 0.5}, "guide_from: 0.6"),
        ({"guide_weight": "map"}, "guide_weight: 'map' needs an inpaint mask"),
        ({"end_at_sigma": 2, "end_at_step": 3}, "end_at_sigma: 2"),
    ],
)
def test_what_does_not_go_with_guide_is_refused_by_name(
    host: SimpleNamespace, settings: dict[str, Any], names: str
) -> None:
    with pytest.raises(HTTPException) as refused:
        host.run({**GUIDE, **settings})
    assert names in str(refused.value.detail)


@pytest.mark.parametrize("sampler", MAPPED)
@pytest.mark.parametrize("value", [1.0, 0.5])
def test_a_one_valued_map_is_img2img_at_that_strength(
    host: SimpleNamespace, calls: Seen, sampler: str, value: float
) -> None:
    plain = samples(host, sampler_name=sampler, denoising_strength=0.8 * value)
    count = len(calls)
    calls.clear()
    made = samples(host, MAP, sampler_name=sampler, denoising_strength=0.8, **masked(torch.full((SIDE, SIDE), value)))
    assert torch.equal(made, plain)
    assert len(calls) == count


def test_a_black_map_gives_the_source_without_a_call(host: SimpleNamespace, calls: Seen) -> None:
    p, _ = host.run(MAP, **masked(torch.zeros(SIDE, SIDE)))
    assert torch.equal(p.latest_samples, p.init_latent)
    assert calls == []


@pytest.mark.parametrize("sampler", MAPPED)
def test_a_place_is_its_level_until_it_begins(host: SimpleNamespace, calls: Seen, sampler: str) -> None:
    """Columns of rising strength: above a place's own level the model sees z there, and black ends as the source."""
    ramp = torch.linspace(0, 1, SIDE).expand(SIDE, SIDE)
    fields = {"sampler_name": sampler, "denoising_strength": 1.0, "steps": 10}
    p, _ = host.run(MAP, **fields, **masked(ramp))
    seen, expected = list(calls), levels_of(host, **fields)
    assert torch.equal(p.latest_samples[..., 0], p.init_latent[..., 0])
    assert not torch.equal(p.latest_samples[..., -1], p.init_latent[..., -1])
    firsts = [(sigma, x) for sigma, x in seen if round(sigma, 5) in expected]
    for step, (_, x) in enumerate(firsts):
        z = list(expected.values())[::-1][step]
        for column in range(SIDE):
            begins = 10 if column == 0 else 10 - int(min(float(ramp[0, column]), 0.999) * 10) - 1
            if step < begins or step == 0:
                assert torch.equal(x[..., column], z[..., column]), (step, column)


def test_while_a_map_guides_the_host_inpaints_nothing(host: SimpleNamespace) -> None:
    """The mask is back afterwards, its rounding too, and no overlay covers the result."""
    fields = masked(torch.linspace(0, 1, SIDE).expand(SIDE, SIDE))
    p, processed = host.run(MAP, overlay_images=[Image.new("RGBA", (64, 64), "red")], **fields)
    assert torch.equal(p.mask, fields["mask"]) and torch.equal(p.nmask, fields["nmask"]) and p.mask_round is True
    assert p.denoising_strength == 0.6
    assert pixels(processed) != [Image.new("RGB", (64, 64), "red").tobytes()]


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [("inpainting_fill", 2, "masked content"), ("inpaint_full_res", True, "only masked")],
)
def test_what_does_not_go_with_a_map_is_refused_by_name(
    host: SimpleNamespace, field: str, value: Any, names: str
) -> None:
    with pytest.raises(HTTPException) as refused:
        host.run(MAP, image_mask=Image.new("L", (64, 64), 128), **{field: value}, **masked(torch.ones(SIDE, SIDE)))
    assert names in str(refused.value.detail)


def test_an_inpainting_checkpoint_s_map_is_refused_by_name(host: SimpleNamespace, monkeypatch: Any) -> None:
    """A1111 tells it by the model's conditioning key, Forge by its own attribute."""
    p = host.make(
        ({**MAP, "enabled": True},), image_mask=Image.new("L", (64, 64), 128), **masked(torch.ones(SIDE, SIDE))
    )
    monkeypatch.setattr(p.sd_model, "is_inpaint", True, raising=False)
    with pytest.raises(HTTPException) as refused:
        host.processing.process_images(p)
    assert "inpainting checkpoint" in str(refused.value.detail)


@pytest.mark.parametrize("film", ["sampling", "both"])
def test_an_interrupted_film_keeps_what_it_has(host: SimpleNamespace, monkeypatch: Any, film: str) -> None:
    """The steps that were sampled are shown, and the animation is whole."""
    from modules import sd_samplers_cfg_denoiser

    forward, count = sd_samplers_cfg_denoiser.CFGDenoiser.forward, itertools.count(1)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        host.shared.state.interrupted = next(count) >= 3
        return made

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", stopping)
    p = host.make(({"output": ["init", "frames", "animation"], "film": film},), is_api=True)
    processed = host.processing.process_images(p)
    notes = processed.extra_generation_params["Unsampler images"]
    steps = [note["step"] for note in notes if note.get("part") == "sampling"]
    assert len(steps) >= 2 and steps == sorted(steps) and "animation" in [note["kind"] for note in notes]


@pytest.mark.parametrize("sampler", STEPPING)
@pytest.mark.parametrize("film", ["sampling", "both"])
@pytest.mark.one_of(3)
def test_a_film_changes_nothing_and_calls_nothing(host: SimpleNamespace, calls: Seen, sampler: str, film: str) -> None:
    plain = samples(host, sampler_name=sampler)
    count = len(calls)
    calls.clear()
    p, processed = host.run({"output": ["init", "frames", "animation"], "film": film}, sampler_name=sampler)
    assert torch.equal(p.latest_samples, plain)
    assert len(calls) == count
    notes = processed.extra_generation_params["Unsampler images"]
    parts = [note.get("part", "noising") for note in notes if note["kind"] == "frame"]
    noising = ["noising"] * 6 if film == "both" else []
    assert parts == [*noising, *["sampling"] * 5, "result"]


def test_a_film_shows_the_states_and_ends_with_the_host_s_picture(host: SimpleNamespace, calls: Seen) -> None:
    """Frames are the variance-preserving view of what the model was shown; the last is the host's own picture."""
    _, processed = host.run({"output": ["init", "frames"], "film": "sampling"})
    *states, result, own = processed.images
    assert result.convert("RGB").tobytes() == own.convert("RGB").tobytes()
    for picture, (sigma, x) in zip(states, calls):
        small = (x / (1 + sigma**2) ** 0.5)[0, :3]
        shown = ((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(picture.convert("RGB"))[4::8, 4::8], shown)


def test_estimates_are_what_the_model_sees(host: SimpleNamespace) -> None:
    """Under Euler the last estimate is the result."""
    settings = {"output": ["init", "frames"], "film": "sampling", "film_view": "estimate"}
    *_, last, result, _ = host.run(settings)[1].images
    difference = np.asarray(last.convert("RGB")).astype(int) - np.asarray(result.convert("RGB"))
    assert np.abs(difference).max() <= 1  # the host cuts where we round


def test_thinning_serves_both_halves(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["init", "frames"], "film": "both", "step_increment": 2})
    notes = [n for n in processed.extra_generation_params["Unsampler images"] if n["kind"] == "frame"]
    there = [n["step"] for n in notes if "part" not in n and n["step"] is not None]
    back = [n["step"] for n in notes if n.get("part") == "sampling"]
    assert there == [7, 5, 3] and back == [3, 5, 7]


def test_a_film_of_a_replay_and_of_an_inversion(host: SimpleNamespace) -> None:
    for settings, sampler in (({"mode": "replay"}, "Euler a"), ({"mode": "invert"}, "Euler")):
        wanted = {"output": ["init", "frames"], "film": "both", **settings}
        notes = host.run(wanted, sampler_name=sampler)[1].extra_generation_params["Unsampler images"]
        assert [n.get("part") for n in notes if n["kind"] == "frame"][-6:] == ["sampling"] * 5 + ["result"]


def test_every_image_of_every_batch_has_its_own_film(host: SimpleNamespace) -> None:
    settings = {"output": ["init", "frames", "animation"], "film": "both"}
    _, processed = host.run(settings, batch_size=2, n_iter=2)
    notes = processed.extra_generation_params["Unsampler images"]
    assert [n["image"] for n in notes if n["kind"] == "animation"] == [0, 1, 2, 3]
    results = [i for i, n in enumerate(notes) if n.get("part") == "result"]
    own = processed.images[len(notes) :]
    assert [notes[i]["image"] for i in results] == [0, 1, 2, 3]
    for place, picture in zip(results, own, strict=True):
        assert processed.images[place].convert("RGB").tobytes() == picture.convert("RGB").tobytes()


def test_end_at_sigma_is_the_noisiest_level_at_or_below_it(host: SimpleNamespace) -> None:
    every = levels_of(host)
    for sigma in (5.0, max(every), 0.5):
        (saved,) = latents_of(host.run({"output": ["latents"], "end_at_sigma": sigma})[1])
        assert float(saved.sigmas[-1]) == pytest.approx(max(s for s in every if s <= sigma + 1e-5), rel=1e-5)


def test_end_at_sigma_below_the_lowest_is_that_one_and_said(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["latents"], "end_at_sigma": 0.001})
    (saved,) = latents_of(processed)
    assert len(saved.z) == 1
    assert any("end_at_sigma" in text for text in processed.extra_generation_params["Unsampler messages"])


def test_the_comfyui_file_is_our_levels_frame_by_frame(host: SimpleNamespace) -> None:
    from safetensors.torch import load_file

    host.make().sd_model.scale_factor = 0.18215
    p, processed = host.run({"output": ["comfyui", "latents"]}, batch_size=2)
    (saved,) = latents_of(processed)
    (path,) = processed.extra_generation_params["Unsampler comfyui"]
    held = load_file(path)["latent_tensor"]
    assert (held * 0.18215 - saved.z.flatten(0, 1)).abs().max() < 1e-5
    assert p.sd_model.scale_factor == 0.18215


def test_a_latent_format_that_is_not_known_is_refused(host: SimpleNamespace) -> None:
    host.make().sd_model.scale_factor = 0.4
    with pytest.raises(HTTPException) as refused:
        host.run({"output": ["comfyui"]})
    assert "scale 0.4" in str(refused.value.detail)


def saved_name(processed: Any) -> str:
    return processed.extra_generation_params["Unsampler latents names"][0]


def test_a_file_guides_as_the_request_that_made_it(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thinned too: what is missing of shared noise is made again from source and noise."""
    monkeypatch.setattr(host.shared.opts, "outdir_samples", str(host.out))
    direct = samples(host, {"output": ["guide"], "guide_alpha": 0})
    for thinning in (1, 3):
        kept = {"output": ["latents", "init"], "step_increment": thinning}
        name = saved_name(host.run(kept)[1])
        made = samples(host, {"output": ["guide"], "guide_alpha": 0, "trajectory": name})
        assert (made - direct).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kept", "names"),
    [
        ({"noise": "path"}, "noise 'path'"),
        ({"mode": "invert", "step_increment": 2}, "lacks 2 of the levels"),
    ],
)
def test_a_file_whose_levels_cannot_guide_is_refused_by_name(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kept: dict[str, Any], names: str
) -> None:
    monkeypatch.setattr(host.shared.opts, "outdir_samples", str(host.out))
    name = saved_name(host.run({"output": ["latents", "init"], **kept})[1])
    with pytest.raises(HTTPException) as refused:
        host.run({"output": ["guide"], "trajectory": name})
    assert names in str(refused.value.detail)
