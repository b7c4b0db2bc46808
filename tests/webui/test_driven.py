"""Modes invert and replay of a request, in a double of the host whose denoiser has a closed form."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import latents_of, reset_state
from fastapi import HTTPException
from PIL import Image

INVERT = {"mode": "invert", "output": ["init"], "cfg": 7}


def decibels(made: torch.Tensor, source: torch.Tensor) -> float:
    return float(20 * torch.log10(source.std() / (made - source).square().mean().sqrt()))


class Call(SimpleNamespace):
    """One model call as the host's denoiser got it."""


@pytest.fixture
def calls(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every model call of the double's denoiser, in order."""
    from modules import extra_networks, prompt_parser, sd_samplers_cfg_denoiser

    seen: list[Call] = []
    forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward

    def noted(self: Any, x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
        prompts = prompt_parser.reconstruct(args["cond"].batch, self.step)
        seen.append(
            Call(
                **dict(step=self.step, sigma=round(float(sigma[0]), 4), prompts=prompts, scale=args["cond_scale"]),
                **dict(size=len(x), mask=self.mask, networks=tuple(extra_networks.active), dtype=x.dtype),
            )
        )
        return forward(self, x, sigma, **args)

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", noted)
    return seen


def split(calls: list[Call]) -> tuple[list[Call], list[Call]]:
    """The calls of the way back (rising sigma) and those of the sampling after it."""
    top = max(range(len(calls)), key=lambda i: calls[i].sigma)
    last = max(i for i in range(len(calls)) if calls[i].sigma == calls[top].sigma)
    return calls[:last], calls[last:]


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM2"])
@pytest.mark.parametrize("cfg", [1, 7])
def test_an_exact_inversion_sampled_again_is_the_source(host: SimpleNamespace, sampler: str, cfg: float) -> None:
    fields = {"sampler_name": sampler, "denoising_strength": 1.0, "cfg_scale": cfg, "batch_size": 2}
    p, processed = host.run({**INVERT, "cfg": cfg}, **fields)
    assert decibels(p.latest_samples, p.init_latent) > 80
    assert len(processed.images) == 2


def test_reverse_is_nearer_than_noise_and_less_near_than_exact(host: SimpleNamespace) -> None:
    settings = (INVERT, {**INVERT, "solver": "reverse"}, {"output": ["init"]})
    runs = [host.run(one, denoising_strength=1.0, steps=20)[0] for one in settings]
    exact, reverse, noise = (decibels(p.latest_samples, p.init_latent) for p in runs)
    assert exact > reverse > noise


@pytest.mark.parametrize("solver", ["exact", "reverse"])
@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM2"])
def test_every_call_mirrors_the_forward_step_and_its_prompt(
    host: SimpleNamespace, calls: list[Call], sampler: str, solver: str
) -> None:
    host.run({**INVERT, "solver": solver}, sampler_name=sampler, prompt="a [cat:dog:3]", denoising_strength=1.0)
    back, forward = split(calls)
    prompt_at = {(c.sigma, c.step): c.prompts for c in forward}
    assert len({tuple(c.prompts) for c in forward}) == 2
    assert back and all(prompt_at[c.sigma, c.step] == c.prompts for c in back)


def test_the_way_back_has_its_own_prompts_scale_and_networks(host: SimpleNamespace, calls: list[Call]) -> None:
    own = {**INVERT, "cfg": 1, "positive": "a dog <lora:pets:1>", "negative": "blur"}
    p, _ = host.run(own, prompt="a cat <lora:cats:1>", denoising_strength=1.0)
    back, forward = split(calls)
    assert {(*c.prompts, c.scale, c.networks) for c in back} == {("a dog ", 1, ("pets",))}
    assert {(*c.prompts, c.scale, c.networks) for c in forward} == {("a cat ", 7.0, ("cats",))}
    assert p.cfg_scale == 7.0


@pytest.fixture
def edit_model(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host with an edit model, as Neo has Flux.2-Klein: encoded pictures are given to conditions, then to calls."""
    kind, told = host.processing.StableDiffusionProcessingImg2Img, SimpleNamespace(ref_latents=[])
    monkeypatch.setitem(sys.modules, "backend.args", SimpleNamespace(dynamic_args=told))
    init, setup_conds = kind.init, kind.setup_conds
    seen = SimpleNamespace(conditions=[], told=told, model=None)

    def encoding(p: Any, *args: Any) -> None:
        init(p, *args)
        seen.model, p.sd_model.ini_latent = p.sd_model, p.init_latent

    def giving(p: Any) -> None:
        picture, p.sd_model.ini_latent = p.sd_model.ini_latent, None
        told.ref_latents = [] if picture is None else [picture]
        seen.conditions.append(picture)
        setup_conds(p)

    monkeypatch.setattr(kind, "init", encoding)
    monkeypatch.setattr(kind, "setup_conds", giving)
    return seen


@pytest.mark.parametrize("settings", [INVERT, {"mode": "replay", "output": ["init"]}])
def test_an_edit_model_sees_its_picture_under_any_prompt(
    host: SimpleNamespace, edit_model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Prompts for the source make conditions anew: they have the picture, and so have all calls, the sampling's too."""
    from modules import sd_samplers_cfg_denoiser

    forward, shown = sd_samplers_cfg_denoiser.CFGDenoiser.forward, []

    def noted(self: Any, *args: Any, **more: Any) -> torch.Tensor:
        shown.append(list(edit_model.told.ref_latents))
        return forward(self, *args, **more)

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", noted)
    p, _ = host.run(
        {**settings, "positive": "a dog"}, sampler_name="Euler a" if "replay" in settings.values() else "Euler"
    )
    assert len(edit_model.conditions) == 2 and all(given is p.init_latent for given in edit_model.conditions)
    assert shown and all(len(given) == 1 and given[0] is p.init_latent for given in shown)
    assert edit_model.model.ini_latent is None


def test_a_space_is_an_empty_prompt(host: SimpleNamespace, calls: list[Call]) -> None:
    host.run({**INVERT, "positive": " "}, denoising_strength=1.0)
    assert {c.prompts[0].strip() for c in split(calls)[0]} == {""}


def test_the_mask_stays_out_of_the_way_back_and_in_the_sampling(host: SimpleNamespace, calls: list[Call]) -> None:
    nmask = torch.zeros(1, 1, 8, 8)
    nmask[..., :4] = 1
    p, _ = host.run(INVERT, nmask=nmask, mask=1 - nmask, denoising_strength=1.0)
    back, forward = split(calls)
    assert all(c.mask is None for c in back) and all(c.mask is not None for c in forward)
    assert torch.equal(p.latest_samples[..., 4:], p.init_latent[..., 4:])


def test_an_unchanged_request_does_not_invert_twice_and_any_change_does(
    host: SimpleNamespace, calls: list[Call]
) -> None:
    def spent(settings: Any = INVERT, **fields: Any) -> int:
        calls.clear()
        host.run(settings, **{"denoising_strength": 1.0, **fields})
        return len(calls)

    first = spent()
    again = spent()
    assert again == 8 < first
    assert spent(seed=6) == 8 and spent(settings={**INVERT, "output": ["init", "frames"]}) == 8
    other = Image.new("RGB", (64, 64), "blue")
    changes: list[dict[str, Any]] = [
        {"prompt": "a dog"},
        {"init_images": [other]},
        {"steps": 9},
        {"settings": {**INVERT, "cfg": 2}},
        {"settings": {**INVERT, "positive": "a horse"}},
        {"settings": {**INVERT, "tolerance": 1e-3}},
        {"sampler_name": "Heun"},
        {"batch_size": 2},
        {"denoising_strength": 0.5},
    ]
    for change in changes:
        steps = spent(**change)
        assert spent(**change) < steps, change
    spent()
    host.shared.opts.something = 1
    assert spent() == first


@pytest.mark.parametrize(
    ("sampler", "kin"), [("Euler a", "euler"), ("DPM++ 2S a", "dpmpp_2m"), ("DPM++ SDE", "dpmpp_2m")]
)
def test_a_stochastic_sampler_is_mapped_with_a_message(host: SimpleNamespace, sampler: str, kin: str) -> None:
    p, processed = host.run({**INVERT, "solver": "reverse"}, sampler_name=sampler)
    assert any(f"as {kin}" in text for text in p.comments)
    assert any(f"as {kin}" in text for text in processed.extra_generation_params["Unsampler messages"])


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM2"])
def test_churn_is_remarked_as_noise_at_each_step_is(host: SimpleNamespace, sampler: str) -> None:
    """s_churn (Settings) makes these samplers stochastic: the inversion leaves it out and says so each time."""
    fields = {"sampler_name": sampler, "denoising_strength": 1.0, "cfg_scale": 1}
    settings = {"mode": "invert", "output": ["init"], "report": True}
    p, _ = host.run(settings, **fields)
    assert decibels(p.latest_samples, p.init_latent) > 80 and not any("noise" in text for text in p.comments)
    host.shared.opts.s_churn = 2.0
    for _ in range(2):  # the second time what was inverted is taken again
        p, processed = host.run(settings, **fields)
        name = sampler.lower().replace("dpm2", "dpm_2")
        (said,) = [text for text in p.comments if f"{name} with s_churn 2 adds noise at each step" in text]
        assert said in processed.extra_generation_params["Unsampler messages"]
    report = processed.extra_generation_params["Unsampler images"][0]
    assert report["latents dB"] == pytest.approx(decibels(p.latest_samples, p.init_latent), abs=1e-3)
    assert report["latents dB"] < 40


def test_churn_that_never_acts_is_not_remarked(host: SimpleNamespace) -> None:
    host.shared.opts.s_churn, host.shared.opts.s_tmin = 2.0, 20.0
    p, _ = host.run({"mode": "invert", "output": ["init"]}, denoising_strength=1.0, cfg_scale=1)
    assert not p.comments and decibels(p.latest_samples, p.init_latent) > 80


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2S a", "DPM++ SDE", "Heun", "DPM++ 2M"])
def test_a_report_samples_exactly_as_img2img_will(host: SimpleNamespace, sampler: str) -> None:
    """By its own sampler, options, draws and mask: the report's figure is the picture's, and draws nothing from it."""
    nmask = torch.zeros(1, 1, 8, 8)
    nmask[..., :4] = 1
    fields = {"sampler_name": sampler, "denoising_strength": 1.0, "cfg_scale": 1, "eta": 0.7, "batch_size": 2}
    for masked in ({}, {"nmask": nmask, "mask": 1 - nmask}):
        settings = {"mode": "invert", "output": ["init"], "solver": "reverse"}
        alone, _ = host.run(settings, **fields, **masked)
        p, processed = host.run({**settings, "report": True}, **fields, **masked)
        assert torch.equal(p.latest_samples, alone.latest_samples)
        for image, report in enumerate(processed.extra_generation_params["Unsampler images"]):
            figure = decibels(p.latest_samples[image], p.init_latent[image])
            assert report["latents dB"] == pytest.approx(figure, abs=1e-3), (sampler, masked)


def test_a_report_of_a_stochastic_sampler_is_of_its_seed(host: SimpleNamespace) -> None:
    settings = {"mode": "invert", "output": ["frames"], "report": True}
    figures = []
    for seed in (5, 6, 5):
        _, processed = host.run(settings, sampler_name="Euler a", denoising_strength=1.0, seed=seed)
        figures.append(processed.extra_generation_params["Unsampler images"][0]["latents dB"])
    assert figures[0] == figures[2] != figures[1]


def test_a_model_with_two_answers_is_refused_before_anything_is_saved(
    host: SimpleNamespace, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token merging draws its tokens anew at each model call."""
    from modules import sd_samplers_cfg_denoiser

    forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward

    def merging(self: Any, x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
        return forward(self, x, sigma, **args) + 0.02 * sigma.max() * torch.sin(torch.arange(8) * 1.0 * len(calls))

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", merging)
    with pytest.raises(HTTPException, match="model: asked the same twice it gives two answers") as refused:
        host.run({"mode": "replay", "output": ["init", "latents"]}, sampler_name="Euler a", denoising_strength=1.0)
    assert refused.value.status_code == 422 and len(calls) == 2
    assert not host.out.exists() or not any(host.out.iterdir())


@pytest.mark.parametrize("mode", ["invert", "replay"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sampler_name": "DPM fast"}, "dpm_fast"),
        ({"sampler_name": "DDIM"}, "DDIM"),
        ({"refiner_checkpoint": "other.safetensors", "refiner_switch_at": 0.8}, "refiner"),
    ],
)
def test_what_cannot_be_driven_is_refused_by_name(
    host: SimpleNamespace, mode: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(HTTPException, match=named) as refused:
        host.run({"mode": mode, "output": ["frames"]}, **fields)
    assert refused.value.status_code == 422


def test_frames_and_latents_show_what_the_model_walked(host: SimpleNamespace) -> None:
    p, processed = host.run({**INVERT, "output": ["frames", "latents"]})
    saved = latents_of(processed)[0]
    kinds = [note["kind"] for note in processed.extra_generation_params["Unsampler images"]]
    assert kinds == ["frame"] * 9
    assert saved.z.shape == (8, 1, 4, 8, 8)
    from k_diffusion.sampling import sample_euler
    from modules import sd_samplers_kdiffusion as kd

    sampler = kd.KDiffusionSampler("sample_euler", p.sd_model)
    sampler.initialize(p)
    args = {"cond": p.c, "uncond": p.uc, "cond_scale": 7, "s_min_uncond": 0, "image_cond": None}
    again = sample_euler(sampler.model_wrap_cfg, saved.z[-1], saved.schedule, extra_args=args, disable=True)
    assert decibels(again, saved.source) > 80


def test_interrupt_leaves_what_was_reached_and_no_trace(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = host.run(sampler_name="Euler")
    reset_state(host.shared.state)
    p = host.make(({**INVERT, "output": ["frames", "init"]},))
    from lib_unsampler.webui.host.progress import Mirrored

    at = Mirrored.at

    def stop_at_three(self: Any, number: int, text: str) -> None:
        at(self, number, text)
        if number == 3:
            host.shared.state.interrupted = True

    monkeypatch.setattr(Mirrored, "at", stop_at_three)
    host.processing.process_images(p)
    assert not {"init", "sample", "save_samples", "close", "batch_unsampler"} & set(vars(p))
    assert "sample_img2img" not in vars(p.sampler)
    again, _ = host.run(sampler_name="Euler")
    assert torch.equal(again.latest_samples, plain.latest_samples)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2S a", "DPM++ SDE"])
@pytest.mark.parametrize("cfg", [1, 7])
def test_a_replay_is_the_source_at_any_scale(host: SimpleNamespace, sampler: str, cfg: float) -> None:
    settings = {"mode": "replay", "output": ["init"], "cfg": cfg}
    p, _ = host.run(settings, sampler_name=sampler, cfg_scale=cfg, denoising_strength=1.0, batch_size=2)
    assert decibels(p.latest_samples, p.init_latent) >= 180


def test_a_masked_replay_by_a_sampler_that_looks_at_its_model(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forge's ancestral samplers ask ``model.inner_model`` for its prediction type."""
    from modules import sd_samplers

    create = sd_samplers.create_sampler

    def asking(name: str, model: Any) -> Any:
        sampler = create(name, model)
        function = sampler.func

        @functools.wraps(function)
        def sample(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            assert model.inner_model is not None
            return function(model, *args, **kwargs)

        sampler.func = sample
        return sampler

    monkeypatch.setattr(sd_samplers, "create_sampler", asking)
    nmask = torch.zeros(1, 1, 8, 8)
    nmask[..., :4] = 1
    fields = {"sampler_name": "Euler a", "denoising_strength": 1.0, "nmask": nmask, "mask": 1 - nmask}
    settings = {"mode": "replay", "output": ["init"], "cfg": 7}
    same, _ = host.run(settings, **fields)
    assert decibels(same.latest_samples, same.init_latent) >= 180
    edit, _ = host.run({**settings, "positive": "a dog"}, **fields)
    assert torch.equal(edit.latest_samples[..., 4:], edit.init_latent[..., 4:])
    assert decibels(edit.latest_samples[..., :4], edit.init_latent[..., :4]) < 100


@pytest.fixture
def drawing(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws from torch's own generator at every call, as token merging does in Forge and Neo."""
    from modules import sd_samplers_cfg_denoiser

    forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward

    def drawn(self: Any, x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
        return forward(self, x, sigma, **args) + 0.1 * float(sigma[0].clamp(max=1)) * torch.randn(x.shape[1:])

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", drawn)


@pytest.mark.parametrize("mode", ["invert", "replay"])
@pytest.mark.parametrize("cfg", [1, 7])
def test_a_model_that_draws_gives_the_source_all_the_same(
    host: SimpleNamespace, drawing: None, mode: str, cfg: float
) -> None:
    sampler = {"invert": "Euler", "replay": "Euler a"}[mode]
    fields = {"sampler_name": sampler, "denoising_strength": 1.0, "cfg_scale": cfg, "batch_size": 2}
    settings = {"mode": mode, "output": ["init"], "cfg": cfg}
    p, _ = host.run(settings, **fields)
    assert decibels(p.latest_samples, p.init_latent) > 80
    assert not any("misses" in text or "not converged" in text for text in p.comments)


def test_a_replay_that_misses_its_source_says_so(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What acts once for good has acted when the sampling begins."""
    from modules import sd_samplers_cfg_denoiser

    forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward
    acted: list[int] = []

    def once(self: Any, x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
        acted.extend([self.step] if self.step == 3 else [])
        return forward(self, x, sigma, **args) * (1.0 if acted else 0.9)

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", once)
    fields = {"sampler_name": "Euler a", "denoising_strength": 1.0}
    settings = {"mode": "replay", "output": ["init"], "cfg": 7}
    p, _ = host.run(settings, **fields)
    assert decibels(p.latest_samples, p.init_latent) < 40
    assert any(text.startswith("replay: misses the source by") for text in p.comments)
    p, _ = host.run({**settings, "positive": "a dog"}, **fields)
    assert not any("misses" in text for text in p.comments)  # an edit is no miss
    p, _ = host.run(settings, **fields)
    assert not any("misses" in text for text in p.comments)


def test_a_replay_under_another_prompt_is_an_edit(host: SimpleNamespace, calls: list[Call]) -> None:
    settings = {"mode": "replay", "output": ["init"], "cfg": 3, "positive": "a cat"}
    p, _ = host.run(settings, sampler_name="Euler a", cfg_scale=3, prompt="a dog", denoising_strength=1.0)
    assert 0 < decibels(p.latest_samples, p.init_latent) < 100
    assert len(calls) == 17  # as many as the sampler makes, each way, and the first again: the same answer?
    assert [c.prompts[0] for c in calls] == ["a cat"] * 9 + ["a dog"] * 8


def test_nothing_of_a_replay_is_left(host: SimpleNamespace) -> None:
    plain, _ = host.run(sampler_name="Euler a")
    host.run({"mode": "replay", "output": ["init", "frames"], "cfg": 7}, sampler_name="Euler a")
    again, _ = host.run(sampler_name="Euler a")
    assert torch.equal(again.latest_samples, plain.latest_samples)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE"])
def test_skip_keeps_more_and_the_source_stays_exact(host: SimpleNamespace, calls: list[Call], sampler: str) -> None:
    def kept(skip: int, prompt: str) -> float:
        settings = {"mode": "replay", "output": ["init"], "cfg": 3, "positive": "a cat", "skip": skip}
        fields = {"sampler_name": sampler, "cfg_scale": 3, "denoising_strength": 1.0}
        p, _ = host.run(settings, prompt=prompt, **fields)
        return decibels(p.latest_samples, p.init_latent)

    assert all(kept(skip, "a cat") >= 180 for skip in (3, 7, 100))
    assert kept(0, "a dog") < kept(3, "a dog") < kept(6, "a dog")
    calls.clear()
    kept(3, "a dog")
    plain = [c.step for c in calls[-(len(calls) // 2) :]]
    assert plain[0] == (6 if sampler == "DPM++ SDE" else 3)  # where prompt editing is then


def test_a_panel_shows_source_z_and_what_the_model_sees(host: SimpleNamespace, calls: list[Call]) -> None:
    host.run({**INVERT, "output": ["frames"], "step_increment": 4})
    without = len(calls)
    calls.clear()
    _, processed = host.run({**INVERT, "output": ["frames"], "step_increment": 4, "panel": True}, batch_size=2)
    assert {image.size for image in processed.images} == {(192, 64)}
    assert len(processed.images) == 6
    assert sum(c.size for c in calls) == 2 * without + 2 * 2  # one batched call more for each of two kept levels


def test_the_reply_tells_what_the_inversion_cost(host: SimpleNamespace, calls: list[Call]) -> None:
    _, processed = host.run({**INVERT, "output": ["frames"]}, batch_size=2, n_iter=2)
    told = processed.extra_generation_params["Unsampler inversion"]
    assert len(told) == 2 and [level["step"] for level in told[0]] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert all(len(level["residual"]) == len(level["calls"]) == 2 and all(level["converged"]) for level in told[0])
    assert sum(sum(level["calls"]) for level in told[0]) == sum(c.size for c in calls)


def test_what_does_not_converge_is_named(host: SimpleNamespace) -> None:
    p, _ = host.run({**INVERT, "output": ["frames"], "max_calls": 1})
    assert any("not converged" in text and "step" in text for text in p.comments)


def test_a_report_compares_the_way_back_with_the_source(host: SimpleNamespace) -> None:
    settings = {**INVERT, "output": ["frames"], "report": True}
    p, processed = host.run(settings, batch_size=2, steps=20)
    notes = processed.extra_generation_params["Unsampler images"]
    reports = [note for note in notes if note["kind"] == "report"]
    assert [note["image"] for note in reports] == [0, 1]
    assert all(note["latents dB"] > 80 and note["codec dB"] > 10 for note in reports), reports
    assert any("round trip of image 1" in text and "dB" in text for text in p.comments)
    _, alone = host.run({**settings, "output": ["init"]}, steps=20)
    assert [note["kind"] for note in alone.extra_generation_params["Unsampler images"]] == ["report"]
    assert len(alone.images) == 2
    _, rough = host.run({**settings, "solver": "reverse"}, steps=20)
    told = rough.extra_generation_params["Unsampler images"][0]
    assert told["latents dB"] < min(note["latents dB"] for note in reports)


def test_a_later_request_replays_one_picture_s_noises_under_a_batch(host: SimpleNamespace) -> None:
    fields = {"sampler_name": "Euler a", "cfg_scale": 3, "denoising_strength": 1.0}
    p, processed = host.run({"mode": "replay", "output": ["latents"], "cfg": 3, "positive": "a cat"}, **fields)
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    later = {"mode": "replay", "output": ["init", "frames"], "trajectory": name}
    again, made = host.run(later, batch_size=3, seed=77, **fields)
    assert decibels(again.latest_samples, p.init_latent.expand(3, -1, -1, -1)) >= 180
    edited, _ = host.run(later, batch_size=3, prompt="a dog", **fields)
    assert decibels(edited.latest_samples, p.init_latent.expand(3, -1, -1, -1)) < 100
    kinds = [note["kind"] for note in made.extra_generation_params["Unsampler images"]]
    assert kinds == ["frame"] * 27 and len(made.images) == 30


def test_a_file_of_two_pictures_is_not_one_of_three(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["latents"]}, batch_size=2)
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    with pytest.raises(HTTPException, match="2 of 64 x 64, and a batch of this request is 3 of 64 x 64"):
        host.run({"output": ["frames"], "trajectory": name}, batch_size=3)
