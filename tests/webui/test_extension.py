"""One img2img request through the Script, in a double of the host: what comes out, what is left behind."""

from __future__ import annotations

import base64
import copy
import io
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import ROOT, forget_host, latents_of, load_script, pixels, record_start, reset_state
from fastapi import HTTPException
from k_diffusion import sampling
from PIL import Image


def test_frames_come_in_order_with_the_animation_first(host: SimpleNamespace) -> None:
    _, processed = host.run({}, batch_size=2)
    notes = processed.extra_generation_params["Unsampler images"]
    assert [n["kind"] for n in notes] == ["animation"] * 2 + ["frame"] * 18
    assert len(processed.images) == len(processed.infotexts) == len(notes)
    frames = notes[2:]
    assert [n["image"] for n in frames] == [0, 1] * 9
    assert [n["step"] for n in frames[::2]] == [None, 7, 6, 5, 4, 3, 2, 1, 0]
    sigmas = [n["sigma"] for n in frames[::2]]
    assert sigmas == sorted(sigmas) and sigmas[0] == 0
    expected = sampling.get_sigmas_karras(8, 0.0291675, 14.614642)[:-1].flip(0)
    assert torch.equal(torch.tensor(sigmas[1:]), expected)
    assert host.runner.swallowed == []


def test_frames_show_the_noise_that_img2img_would_use(host: SimpleNamespace) -> None:
    p, processed = host.run({"output": ["frames"]})
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    for picture, note in zip(processed.images, processed.extra_generation_params["Unsampler images"]):
        sigma = note["sigma"]
        z = (p.init_latent + noise * sigma) / (1 + sigma**2) ** 0.5
        decoded = host.processing.decode_latent_batch(None, z)[0]
        expected = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
        shown = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(64, 64, 3).float()
        assert (shown - expected).abs().max() <= 0.51


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2S a", "DPM fast", "LMS"])
def test_init_with_shared_noise_is_plain_img2img(host: SimpleNamespace, sampler: str) -> None:
    plain = host.run(sampler_name=sampler)[0].latest_samples
    ours, processed = host.run({"output": ["init", "frames", "latents"]}, sampler_name=sampler)
    assert torch.equal(ours.latest_samples, plain)
    assert len(processed.images) == len(latents_of(processed)[0].z) + 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise": "independent"},
        {"noise": "path"},
        {"normalize": True},
        {"end_at_step": 1},
        {"noise": "path", "end_at_step": 7, "step_increment": 3},
    ],
)
@pytest.mark.parametrize(
    "request_fields",
    [
        {},
        {"initial_noise_multiplier": 1.07, "subseed_strength": 0.3},
        {"batch_size": 2, "n_iter": 2, "sampler_name": "Euler a"},
    ],
)
def test_sampling_starts_from_the_saved_z_bit_for_bit(
    host: SimpleNamespace, settings: dict[str, Any], request_fields: dict[str, Any]
) -> None:
    seen: list[torch.Tensor] = []
    restore = record_start(host, seen)
    _, processed = host.run({"output": ["init", "latents"], **settings}, **request_fields)
    restore()
    saved = latents_of(processed)
    assert len(saved) == len(seen) == request_fields.get("n_iter", 1)
    for trajectory, x in zip(saved, seen):
        assert torch.equal(trajectory.latent, x)


def test_extra_noise_does_not_move_a_start_of_our_own(host: SimpleNamespace) -> None:
    host.shared.opts.img2img_extra_noise = 0.5
    seen: list[torch.Tensor] = []
    restore = record_start(host, seen)
    _, processed = host.run({"output": ["init", "latents"], "noise": "independent"})
    restore()
    host.shared.opts.img2img_extra_noise = 0.0
    assert torch.equal(latents_of(processed)[0].latent, seen[0])


@pytest.mark.parametrize("fix_steps", [False, True])
@pytest.mark.parametrize("end", [0, 3, 6])
def test_end_at_step_overrides_the_strength_for_this_run_only(host: SimpleNamespace, end: int, fix_steps: bool) -> None:
    host.shared.opts.img2img_fix_steps = fix_steps
    p, processed = host.run({"output": ["init", "latents"], "end_at_step": end})
    host.shared.opts.img2img_fix_steps = False
    assert p.denoising_strength == 0.6
    saved = latents_of(processed)[0]
    assert saved.start == end
    assert saved.sigmas[-1] == saved.schedule[end]
    own_start = 13 - 8 if fix_steps else 8 - int(0.6 * 8) - 1
    assert any("overrides the denoising strength" in c for c in p.comments) == (end != own_start)


def test_levels_of_init_are_img2img_s_own(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["init", "latents"]}, denoising_strength=0.5)
    saved = latents_of(processed)[0]
    assert (saved.start, len(saved.z), len(saved.schedule)) == (3, 5, 9)


@pytest.mark.parametrize("noise", ["shared", "independent", "path"])
def test_a_batch_is_its_single_runs(host: SimpleNamespace, noise: str) -> None:
    settings = {"output": ["latents"], "noise": noise}
    _, batch = host.run(settings, batch_size=2, n_iter=2, subseed_strength=0.2)
    together = torch.cat([t.z for t in latents_of(batch)], 1)
    for i in range(4):
        _, single = host.run(settings, seed=5 + i, subseed=9 + i, subseed_strength=0.2)
        assert torch.equal(latents_of(single)[0].z[:, 0], together[:, i])


def test_draws_continue_the_seed_s_stream_with_ensd_and_multiplier(host: SimpleNamespace) -> None:
    host.shared.opts.eta_noise_seed_delta = 31337
    settings = {"output": ["latents"], "noise": "independent"}
    _, processed = host.run(settings, initial_noise_multiplier=1.07)
    host.shared.opts.eta_noise_seed_delta = 0
    saved = latents_of(processed)[0]
    later = torch.Generator().manual_seed(5 + 31337)
    first = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(5))
    draws = [first, *(torch.randn((4, 8, 8), generator=later) for _ in range(7))]
    for z, sigma, noise in zip(saved.z, saved.sigmas, draws):
        assert torch.equal(z[0], saved.source[0] + noise * 1.07 * sigma)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": -3, "bogus": 1, "noise": "x"}, ["steps: -3", "bogus: unknown", "noise: 'x'"]),
        ({"output": ["init"], "steps": 5}, ["steps: 5"]),
        ({"output": []}, ["output: []"]),
        ({"enabled": "yes"}, ["enabled: 'yes'"]),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    host: SimpleNamespace, settings: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(Exception) as caught:
        host.run(settings)
    assert caught.value.status_code == 422
    assert all(name in str(caught.value) for name in named)
    assert not host.out.exists()


def test_init_is_refused_by_name_where_there_are_no_sigmas(host: SimpleNamespace) -> None:
    with pytest.raises(Exception, match="init needs.*'DDIM'") as caught:
        host.run({"output": ["init"]}, sampler_name="DDIM")
    assert caught.value.status_code == 422


def test_timestep_samplers_show_their_own_noise_levels(host: SimpleNamespace) -> None:
    p, processed = host.run({"output": ["frames"]}, sampler_name="DDIM")
    alpha = host.processing.Model().alphas_cumprod[torch.arange(0, 1000, 125) + 1].double()
    expected = ((1 - alpha) / alpha).sqrt()
    shown = processed.extra_generation_params["Unsampler sigmas"]
    assert torch.allclose(torch.tensor(shown, dtype=torch.float64), expected, rtol=1e-6)
    assert any("DDIM" in c for c in p.comments)


FAILURES: dict[str, dict[str, Any]] = {
    "success": {"output": ["init", "frames", "animation", "latents"], "noise": "path", "end_at_step": 1},
    "refused": {"noise": "pink"},
    "broken decode": {"output": ["init", "frames"]},
    "broken sampler": {"output": ["init"], "noise": "independent"},
    "interrupt": {"output": ["init", "frames"], "noise": "independent"},
}


@pytest.mark.parametrize("kind", FAILURES)
def test_nothing_is_left_behind(host: SimpleNamespace, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, before = host.run(sampler_name="Euler a")
    p = host.make((FAILURES[kind],), sampler_name="Euler a")
    reset_state(host.shared.state)
    attributes = set(vars(p))
    with monkeypatch.context() as broken:
        if kind == "broken decode":
            broken.setattr(host.processing, "decode_latent_batch", raising(RuntimeError("no memory")))
        if kind == "broken sampler":
            broken.setattr(host.sd_samplers.sd_samplers_kdiffusion.CFGDenoiser, "forward", raising(KeyError("x")))
        if kind == "interrupt":
            host.shared.state.interrupted = False
            broken.setattr(host.shared.state, "nextjob", lambda: setattr(host.shared.state, "interrupted", True))
        expected = {"refused": HTTPException, "broken decode": RuntimeError, "broken sampler": KeyError}.get(kind)
        with pytest.raises(expected) if expected else nullcontext():
            host.processing.process_images(p)
    assert not {"init", "sample", "save_samples", "close", "batch_unsampler"} & set(vars(p))
    if hasattr(p, "sampler"):
        assert not {"sample_img2img", "get_sigmas"} & set(vars(p.sampler))
        assert p.sampler.func is sampling.sample_euler_ancestral
    assert set(vars(p)) - attributes <= set(vars(plain))
    again, after = host.run(sampler_name="Euler a")
    assert torch.equal(again.latest_samples, plain.latest_samples)
    assert pixels(after) == pixels(before)
    assert host.runner.swallowed == []


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_what_fails_while_decoding_is_raised_not_swallowed(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.processing, "decode_latent_batch", raising(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        host.run({})


def test_global_generators_are_left_as_found(host: SimpleNamespace) -> None:
    from modules import rng

    from lib_unsampler.webui.host.draws import HostDraws

    p = host.make()
    p.seeds, p.subseeds = [5], [9]
    torch.manual_seed(77)
    rng.nv_rng = marker = object()
    state = torch.get_rng_state()
    draws = HostDraws(p, torch.zeros(1, 4, 8, 8))
    draws(0), draws(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert rng.nv_rng is marker


@pytest.mark.parametrize("noise", ["shared", "independent", "path"])
def test_the_sampler_s_own_draws_are_those_behind_z(host: SimpleNamespace, noise: str) -> None:
    """Shared noise is img2img's own first draw; of the other kinds each level has one, and those come before."""
    plain = host.run(sampler_name="Euler a")[0]
    ours, processed = host.run({"output": ["init", "frames"], "noise": noise}, sampler_name="Euler a")
    if noise != "shared":
        for _ in processed.extra_generation_params["Unsampler sigmas"][1:]:
            plain.rng.next()
    states = [p.rng.generators[0].get_state() for p in (plain, ours)]
    assert torch.equal(*states)
    assert torch.equal(ours.latest_samples, plain.latest_samples) == (noise == "shared")


def test_interrupt_keeps_what_was_done(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, decoded = host.processing.decode_latent_batch, []

    def interrupting(*args: Any, **more: Any) -> Any:
        decoded.append(True)
        host.shared.state.interrupted = len(decoded) >= 3
        return decode(*args, **more)

    monkeypatch.setattr(host.processing, "decode_latent_batch", interrupting)
    p = host.make(({},), is_api=True)
    processed = host.processing.process_images(p)
    kinds = [n["kind"] for n in processed.extra_generation_params["Unsampler images"]]
    assert kinds == ["animation"] + ["frame"] * 3
    assert Image.open(io.BytesIO(base64.b64decode(processed.images[0]))).n_frames == 3
    assert not any(host.out.iterdir())  # the host's setting: incomplete images are not saved


@pytest.mark.parametrize("output", [["frames"], ["init", "frames"]])
def test_between_frames_a_page_that_asks_sees_no_preview_of_the_sampling(
    host: SimpleNamespace, output: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host answers a page with the sampling's last latent, if there is one, whenever steps have gone by."""
    state = host.shared.state

    def assign_and_ask(image: Image.Image) -> None:
        state.previews.append(image)
        state.set_current_image()

    monkeypatch.setattr(state, "assign_current_image", assign_and_ask, raising=False)
    count = len(host.processing.process_images(host.make(({"output": output, "end_at_step": 3},))).images)
    assert len(state.previews) == count - ("init" in output) == 6
    assert all(isinstance(shown, Image.Image) for shown in state.previews)


def test_files_are_the_host_s_and_carry_the_parameters(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["frames", "animation", "contact sheet", "latents"], "reverse": True})
    names = sorted(path.name for path in host.out.iterdir())
    assert [Path(n).suffix for n in names].count(".png") == 10
    assert [Path(n).suffix for n in names].count(".gif") == 1
    assert [Path(n).suffix for n in names].count(".safetensors") == 1
    frame = next(path for path in host.out.iterdir() if "-z003" in path.name)
    text = Image.open(frame).info["parameters"]
    assert "Unsampler frame step: 5" in text and "Unsampler reverse: True" in text
    gif = Image.open(next(host.out.glob("*.gif")))
    assert "Unsampler version" in gif.info["comment"].decode() and gif.n_frames == 9
    assert Path(processed.images[0].already_saved_as).suffix == ".gif"


def test_nothing_is_saved_that_the_request_does_not_save(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["frames", "animation"]}, do_not_save_samples=True)
    assert not host.out.exists()
    shown = Path(processed.images[0].already_saved_as)
    assert shown.suffix == ".gif" and Image.open(shown).n_frames == 9


def test_the_api_gets_the_animation_as_base64(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["animation"], "duration": 0.25, "include_clean": False}, is_api=True)
    gif = Image.open(io.BytesIO(base64.b64decode(processed.images[0])))
    assert (gif.n_frames, gif.info["duration"]) == (8, 250)


def test_progress_counts_frames_and_shows_them(host: SimpleNamespace) -> None:
    host.run({"output": ["init", "frames"]})
    state = host.shared.state
    assert state.job_no == state.job_count == 2
    assert len(state.previews) == 6 and state.textinfo is None


def test_masked_frames_keep_the_source_outside(host: SimpleNamespace) -> None:
    mask = torch.zeros(4, 8, 8)
    mask[..., 4:] = 1
    overlay = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    settings = {"output": ["frames", "latents"]}
    _, processed = host.run(settings, nmask=mask, mask=1 - mask, overlay_images=[overlay])
    saved = latents_of(processed)[0]
    assert torch.equal(saved.mask, mask) and not torch.equal(saved.latent[..., :4], saved.source[..., :4])
    whole = latents_of(host.run(settings)[1])[0]
    assert torch.equal(saved.z, whole.z)  # a file holds what a sampler can go on from
    left = [image.crop((0, 0, 32, 64)).tobytes() for image in processed.images]
    assert len(set(left)) == 1


@pytest.mark.parametrize("view", ["raw", "variance preserving"])
def test_only_masked_frames_are_put_back_into_the_whole_picture(host: SimpleNamespace, view: str) -> None:
    photo = Image.effect_noise((160, 120), 60).convert("RGB")
    hole = (40, 32, 104, 96)
    overlay = photo.convert("RGBA")
    overlay.paste((0, 0, 0, 0), hole)
    fields = dict(paste_to=(40, 32, 64, 64), overlay_images=[overlay] * 2, batch_size=2, n_iter=2)
    _, processed = host.run({"output": ["frames"], "view": view}, init_images=[photo.crop(hole)], **fields)
    assert len(processed.images) == 9 * 4
    for picture in processed.images:
        assert picture.size == (160, 120)
        inside = picture.crop(hole)
        picture.paste(photo.crop(hole), hole)
        assert picture.tobytes() == photo.tobytes() and inside.tobytes() != photo.crop(hole).tobytes()
    host.shared.opts.overlay_inpaint = False
    _, bare = host.run({"output": ["frames"], "view": view}, init_images=[photo.crop(hole)], **fields)
    host.shared.opts.overlay_inpaint = True
    assert {picture.size for picture in bare.images} == {(64, 64)}


def test_a_soft_mask_mixes_and_leaves_init_alone(host: SimpleNamespace) -> None:
    mask = torch.linspace(0, 1, 8).expand(4, 8, 8)
    seen: list[torch.Tensor] = []
    restore = record_start(host, seen)
    settings = {"output": ["init", "latents"], "noise": "path"}
    _, processed = host.run(settings, nmask=mask, mask=1 - mask)
    restore()
    saved = latents_of(processed)[0]
    assert torch.equal(saved.latent, seen[0]) and torch.equal(saved.z[-1], seen[0])
    assert torch.equal(saved.mask, mask)
    plain = host.run(nmask=mask, mask=1 - mask)[0]
    shared = host.run({"output": ["init", "frames"]}, nmask=mask, mask=1 - mask)[0]
    assert torch.equal(shared.latest_samples, plain.latest_samples)


def test_several_sources_are_one_batch(host: SimpleNamespace) -> None:
    photos = [Image.effect_noise((64, 64), 60 + 20 * i).convert("RGB") for i in range(2)]
    settings = {"output": ["frames", "latents"], "noise": "path"}
    p, processed = host.run(settings, init_images=photos, batch_size=3, n_iter=2)
    assert p.batch_size == 2
    notes = processed.extra_generation_params["Unsampler images"]
    assert [n["image"] for n in notes] == [0, 1] * 9 + [2, 3] * 9
    assert [f"Seed: {5 + n['image']}" in t for n, t in zip(notes, processed.infotexts)] == [True] * len(notes)
    for n, saved in enumerate(latents_of(processed)):
        for i, photo in enumerate(photos):
            _, single = host.run(settings, init_images=[photo], seed=5 + 2 * n + i)
            assert torch.equal(latents_of(single)[0].z[:, 0], saved.z[:, i])
    with pytest.raises(RuntimeError, match="bad number of images"):
        host.run(settings, init_images=photos, batch_size=1)


def test_file_names_know_which_image_they_are_of(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import images

    save, seen = images.save_image, []

    def noted(image: Image.Image, *args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs.get("suffix"), args[2], kwargs["p"].batch_index))
        return save(image, *args, **kwargs)

    monkeypatch.setattr(images, "save_image", noted)
    outputs = ["frames", "animation", "contact sheet"]
    host.run({"output": outputs, "step_increment": 4}, batch_size=2, n_iter=2)
    assert {suffix for suffix, *_ in seen} == {"-unsampling", "-unsampling-sheet", "-z000", "-z001", "-z002"}
    assert all(index == (seed - 5) % 2 for _, seed, index in seen)


@pytest.mark.parametrize("choices", [("Replace", "Add number suffix"), ("Override", "Number Suffix")])
@pytest.mark.parametrize("replaces", [True, False])
def test_files_replace_others_only_where_the_host_s_do(
    host: SimpleNamespace, choices: tuple[str, str], replaces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1111's and Forge's words for it, and Neo's."""
    from modules import images

    def always_the_same_name(image: Image.Image, path: str, *args: Any, **kwargs: Any) -> Any:
        stem = kwargs.get("forced_filename") or "cat"
        name, number = Path(path) / f"{stem}.png", 0
        name.parent.mkdir(exist_ok=True)
        while name.exists() and host.shared.opts.save_images_replace_action != choices[0]:
            number += 1
            name = name.with_name(f"{stem}-{number}.png")
        image.save(name)
        return str(name), None

    monkeypatch.setattr(images, "save_image", always_the_same_name)
    monkeypatch.setattr(host.shared.opts, "save_images_replace_action", choices[0 if replaces else 1])
    for _ in range(3):
        host.run({"output": ["animation"]})
    names = {path.name for path in host.out.iterdir()}
    assert names == ({"cat.gif"} if replaces else {"cat.gif", "cat-1.gif", "cat-2.gif"})


class Loopback:
    """The host's loopback script, as far as it goes: each round's first picture is the next one's source."""

    def __init__(self, host: SimpleNamespace) -> None:
        self.host = host
        self.rounds: list[Any] = []

    def title(self) -> str:
        return "Loopback"

    def run(self, p: Any) -> Any:
        for _ in range(3):
            reset_state(self.host.shared.state)
            processed = self.host.processing.process_images(p)
            self.rounds.append(processed)
            p.seed += 1
            p.init_images = [processed.images[0]]
        return processed


@pytest.mark.parametrize("is_api", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_selected_script_gets_img2img_s_own_pictures(host: SimpleNamespace, is_api: bool, batch_size: int) -> None:
    host.runner.selectable_scripts = [Loopback(host)]
    everything = {"output": ["init", "frames", "animation", "contact sheet"]}
    rounds = {}
    for name, args in (("plain", (False,)), ("ours", (everything,))):
        p = host.make(args, selected=1, is_api=is_api, batch_size=batch_size)
        host.runner.run(p, *p.script_args)
        rounds[name] = host.runner.selectable_scripts[0].rounds[-3:]
    assert [pixels(r) for r in rounds["ours"]] == [pixels(r) for r in rounds["plain"]]
    assert all(len(r.images) == len(r.infotexts) == batch_size for r in rounds["ours"])
    assert any("Loopback gets one picture for each image" in c for c in p.comments)
    assert len(list(host.out.glob("*-z00?.png"))) == 3 * 6 * batch_size
    assert len(list(host.out.glob("*.gif"))) == 3 * batch_size


@pytest.mark.parametrize("output", [["frames"], ["animation", "contact sheet"], ["latents"]])
@pytest.mark.parametrize("is_api", [False, True])
def test_without_init_a_selected_script_gets_the_noisiest_frames(
    host: SimpleNamespace, output: list[str], is_api: bool
) -> None:
    host.runner.selectable_scripts = [Loopback(host)]
    alone = host.run({"output": ["frames"]}, batch_size=2)[1].images[-2:]
    p = host.make(({"output": output},), selected=1, is_api=is_api, batch_size=2)
    host.runner.run(p, *p.script_args)
    first, second, _ = host.runner.selectable_scripts[0].rounds
    assert pixels(first) == [image.tobytes() for image in alone]
    assert [n["step"] for n in first.extra_generation_params["Unsampler images"]] == [0, 0]
    assert [f"Seed: {seed}" in text for seed, text in zip((6, 7), second.infotexts)] == [True, True]


def test_a_script_that_samples_past_img2img_is_refused_by_name(host: SimpleNamespace) -> None:
    alternative = Loopback(host)
    alternative.title = lambda: "img2img alternative test"
    host.runner.selectable_scripts = [alternative]
    p = host.make(({"output": ["init", "frames"]},), selected=1)

    def own_sample(*_: Any, **__: Any) -> torch.Tensor:
        return p.init_latent

    p.sample = own_sample
    with pytest.raises(HTTPException, match="img2img alternative test samples in its own way") as caught:
        host.runner.run(p, *p.script_args)
    assert caught.value.status_code == 422
    assert p.sample is own_sample


class EPS:
    """ComfyUI's classes, as reForge and Classic have them."""


class V_PREDICTION(EPS):
    pass


class CONST:
    pass


@pytest.mark.parametrize(
    ("inner", "parameterization", "expected"),
    [
        ({"predictor": SimpleNamespace(prediction_type="epsilon")}, None, "eps"),
        ({"predictor": SimpleNamespace(prediction_type="v_prediction")}, None, "v"),
        ({"predictor": SimpleNamespace(prediction_type="const")}, None, "flow"),
        ({"model_sampling": type("ModelSampling", (EPS,), {})}, "eps", "eps"),
        ({"model_sampling": type("ModelSampling", (V_PREDICTION,), {})}, None, "v"),
        ({"model_sampling": type("ModelSampling", (CONST,), {})}, "eps", "flow"),
        (None, "v", "v"),
        (None, None, "eps"),
    ],
)
def test_each_host_s_prediction_type(
    host: SimpleNamespace, inner: dict[str, Any] | None, parameterization: str | None, expected: str
) -> None:
    from lib_unsampler.webui.host.schedule import prediction_type

    model = SimpleNamespace()
    if parameterization:
        model.parameterization = parameterization
    if inner is not None:
        made = {name: value() if isinstance(value, type) else value for name, value in inner.items()}
        model.forge_objects = SimpleNamespace(unet=SimpleNamespace(model=SimpleNamespace(**made)))
    assert prediction_type(model) == expected


def test_neo_tells_save_samples_about_videos(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, asked = host.processing.StableDiffusionProcessingImg2Img, []
    own = cls.save_samples
    monkeypatch.setattr(cls, "save_samples", lambda self, *, is_video=False: asked.append(is_video) or own(self))
    p = host.make(({"output": ["frames"]},))
    attached = host.script.process
    host.script.process = lambda p, *args: (attached(p, *args), wrap(p))

    def wrap(p: Any) -> None:
        ours = p.save_samples
        p.save_samples = lambda: ours(is_video=False)

    host.processing.process_images(p)
    assert set(asked) == {False}


@pytest.mark.parametrize("times", [1, 3])
def test_a_time_axis_of_one_is_a_picture_and_longer_is_refused(
    host: SimpleNamespace, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, decode = host.processing.encode, host.processing.decode_latent_batch
    monkeypatch.setattr(host.processing, "encode", lambda p: encode(p)[:, :, None].expand(-1, -1, times, -1, -1))

    def decoded(model: Any, batch: torch.Tensor, **more: Any) -> list[torch.Tensor]:
        return [torch.stack(decode(model, z.movedim(1, 0), **more)) for z in batch]

    monkeypatch.setattr(host.processing, "decode_latent_batch", decoded)
    if times > 1:
        with pytest.raises(HTTPException, match="videos are not supported"):
            host.run({"output": ["frames"]})
        return
    _, processed = host.run({"output": ["frames", "latents"]})
    assert len(processed.images) == 9 and latents_of(processed)[0].z.shape == (8, 1, 4, 1, 8, 8)


def test_a_refiner_that_ends_the_sampling_does_not_change_the_levels(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = host.sd_samplers.sd_samplers_kdiffusion.CFGDenoiser
    forward = denoiser.forward
    p = host.make(({"output": ["init", "latents"]},))

    def refined(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        p.sd_model = host.processing.Model()
        p.sd_model.add_noise_to_latent = None  # a flow model
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", refined)
    saved = latents_of(host.processing.process_images(p))[0]
    expected = latents_of(host.run({"output": ["init", "latents"]})[1])[0]
    assert saved.prediction == "eps" and torch.equal(saved.z, expected.z)


def test_loops_and_cells_reuse_a_request(host: SimpleNamespace) -> None:
    p = host.make(({"output": ["frames"]},))
    first = host.processing.process_images(p)
    again = host.processing.process_images(p)
    cell = copy.copy(p)
    third = host.processing.process_images(cell)
    assert pixels(first) == pixels(again) == pixels(third)


def test_unticked_or_positional(host: SimpleNamespace) -> None:
    plain = host.run()[1]
    p = host.make((False, ["frames"], "nonsense"))
    assert pixels(host.processing.process_images(p)) == pixels(plain)
    assert not any(key.startswith("Unsampler") for key in p.extra_generation_params)
    p = host.make((True, ["frames"], 0, -1, 2))
    assert len(host.processing.process_images(p).images) == 5


def test_the_accordion_is_made_of_the_settings(host: SimpleNamespace) -> None:
    import gradio as gr

    from lib_unsampler.settings import Settings, help_on, parse_args, surface_fields

    with gr.Blocks():
        controls = host.script.ui(True)
    known = surface_fields("host")
    assert len(controls) == len(known) + 1
    for control, f in zip(controls[1:], known):
        assert control.elem_id == f"batch_unsampler_{f.name}"
        assert control.label == f.metadata["label"] and control.info == help_on(f, "host")
        assert getattr(control, "minimum", None) == f.metadata["minimum"]
        assert getattr(control, "maximum", None) == f.metadata["maximum"]
    assert len({control.elem_id for control in controls}) == len(controls)
    values = [True, *(control.value for control in controls[1:])]
    assert parse_args(values, "host") == (True, Settings())
    assert {f.name for f in fields(Settings)} >= {f.name for f in known}


def test_pasted_parameters_set_every_control(host: SimpleNamespace) -> None:
    import gradio as gr

    with gr.Blocks():
        controls = host.script.ui(True)
    wanted = {"output": ["animation", "init"], "end_at_step": 3, "noise": "path", "normalize": True, "duration": 0.25}
    _, processed = host.run({**wanted, "include_clean": False})
    pairs = processed.infotexts[0].splitlines()[1].replace("animation, init", "animation; init").split(", ")
    params = {k: v.replace(";", ",") for k, v in (pair.split(": ", 1) for pair in pairs)}
    read = {control.elem_id: function(params) for control, function in host.script.infotext_fields}
    assert read.pop("batch_unsampler-checkbox") is True
    assert [c.elem_id for c, _ in host.script.infotext_fields] == [c.elem_id for c in controls]
    for name, value in {**wanted, "include_clean": False, "steps": 0, "reverse": False}.items():
        assert read[f"batch_unsampler_{name}"] == value
    plain = {control.elem_id: function({"Steps": "8"}) for control, function in host.script.infotext_fields}
    assert plain.pop("batch_unsampler-checkbox") is False and set(plain.values()) == {None}


@pytest.mark.parametrize("lacking", ["rng", "sd_samplers_kdiffusion", "sd_samplers_common", "ui_components"])
def test_a_host_without_what_we_need_gets_one_line(
    lacking: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SD.Next lacks ``modules.rng``; the others stand for a host older or newer than any we know."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/webui/host_double"))
    monkeypatch.setitem(sys.modules, f"modules.{lacking}", None)
    module = load_script()
    assert not hasattr(module, "BatchUnsampler")
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and "not active" in said[0] and lacking in said[0]
    monkeypatch.undo()
    forget_host()
