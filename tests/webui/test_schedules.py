"""Schedules of their own length or end: what is made of them comes back, or is refused by name before work."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import latents_of
from fastapi import HTTPException
from k_diffusion import external, sampling

OWN = [("KL Optimal", 8), ("KL Optimal", 20), ("DDIM", 28), ("DDIM", 30), ("DDIM", 35), ("Karras", 8)]
schedules = pytest.mark.parametrize(("scheduler", "steps"), OWN)
LOW, HIGH = 0.0291675, 14.614642


def rms(made: torch.Tensor, source: torch.Tensor) -> float:
    return float((made - source).square().mean().sqrt())


def host_schedule(host: SimpleNamespace, scheduler: str, steps: int) -> torch.Tensor:
    from modules import sd_samplers

    p = host.make(scheduler=scheduler)
    return sd_samplers.create_sampler("Euler", p.sd_model).get_sigmas(p, steps)


@schedules
@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M"])
@pytest.mark.one_of(2)
def test_an_inversion_comes_back(host: SimpleNamespace, scheduler: str, steps: int, sampler: str) -> None:
    fields = {"sampler_name": sampler, "denoising_strength": 1.0, "cfg_scale": 1}
    settings = {"mode": "invert", "output": ["init", "latents"]}
    p, processed = host.run(settings, scheduler=scheduler, steps=steps, **fields)
    assert rms(p.latest_samples, p.init_latent) < 1e-5
    assert sampler == "DPM++ 2M" or not any("converged" in text for text in p.comments)
    saved, wanted = latents_of(processed)[0], host_schedule(host, scheduler, steps)
    assert torch.equal(saved.schedule, wanted)  # the host's own length and end
    assert saved.z.shape[0] == len(wanted) - 1


@schedules
@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2S a", "DPM++ SDE"])
@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.one_of(5)
def test_a_replay_comes_back(host: SimpleNamespace, scheduler: str, steps: int, sampler: str, skip: int) -> None:
    fields = {"sampler_name": sampler, "denoising_strength": 1.0, "cfg_scale": 3, "scheduler": scheduler}
    settings = {"mode": "replay", "output": ["init", "latents"], "skip": skip, "cfg": 3}
    p, processed = host.run(settings, steps=steps, **fields)
    assert rms(p.latest_samples, p.init_latent) < 1e-6
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    again, _ = host.run({"mode": "replay", "output": ["init"], "skip": skip, "trajectory": name}, steps=steps, **fields)
    assert rms(again.latest_samples, p.init_latent) < 1e-6


@schedules
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("sampler", ["Euler", "Euler a"])
@pytest.mark.one_of(3)
def test_init_is_plain_img2img_and_its_file_gives_it_again(
    host: SimpleNamespace, scheduler: str, steps: int, strength: float, sampler: str
) -> None:
    fields = {"scheduler": scheduler, "steps": steps, "denoising_strength": strength, "sampler_name": sampler}
    plain, _ = host.run(**fields)
    made, processed = host.run({"output": ["init", "latents"]}, **fields)
    assert torch.equal(made.latest_samples, plain.latest_samples)
    assert not made.comments or "latents" in made.comments[0]
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    again, _ = host.run({"output": ["init"], "trajectory": name}, **fields)
    assert torch.equal(again.latest_samples, plain.latest_samples)


@pytest.fixture
def no_work(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every model call and every decoding say that it was begun."""
    from modules import processing, sd_samplers_cfg_denoiser

    def begun(*_: Any, **__: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(sd_samplers_cfg_denoiser.CFGDenoiser, "forward", begun)
    monkeypatch.setattr(processing, "decode_latent_batch", begun)


@schedules
def test_frames_count_the_host_s_own_levels(host: SimpleNamespace, scheduler: str, steps: int) -> None:
    count = len(host_schedule(host, scheduler, steps)) - 1
    _, processed = host.run({"output": ["frames"]}, scheduler=scheduler, steps=steps)
    assert len(processed.images) == count + 1


@schedules
def test_limits_count_the_host_s_own_levels(host: SimpleNamespace, no_work: None, scheduler: str, steps: int) -> None:
    count = len(host_schedule(host, scheduler, steps)) - 1
    host.shared.opts.batch_unsampler_megapixels = 1
    most = int(1e6 / 64 / (count + 1))  # of 8 x 8 pixels
    for width, said in (
        (8 * most, None),
        (8 * most + 8, f"steps: {steps} give {count + 1} frames of 1 x {8 * most + 8}"),
    ):
        p = host.make(({"output": ["frames"]},), scheduler=scheduler, steps=steps, width=width, height=8)
        with pytest.raises(InterruptedError if said is None else HTTPException, match=said):
            host.processing.process_images(p)


def test_an_end_that_only_the_schedule_has_is_clamped_to_img2img_s(host: SimpleNamespace) -> None:
    """DDIM gives 31 levels for 30 steps; img2img's arithmetic can start at the first 30."""
    settings = {"output": ["init", "latents"], "end_at_step": 1000}
    p, processed = host.run(settings, scheduler="DDIM", steps=30)
    assert latents_of(processed)[0].start == 29 and any("starts at step 29 of 30" in text for text in p.comments)
    _, processed = host.run({**settings, "output": ["latents"]}, scheduler="KL Optimal", steps=8)
    assert latents_of(processed)[0].start == 7


@pytest.mark.parametrize("sigmas", [[1.0, 2.0, 0.0], [3.0, float("nan"), 0.0], [2.0, 2.0], []])
def test_no_schedule_is_refused_by_name_before_work(
    host: SimpleNamespace, no_work: None, monkeypatch: pytest.MonkeyPatch, sigmas: list[float]
) -> None:
    from modules import sd_schedulers

    monkeypatch.setitem(sd_schedulers.schedulers_map, "Odd", lambda *_: torch.tensor(sigmas))
    for settings in ({"output": ["frames"]}, {"output": ["init"]}, {"mode": "invert", "output": ["init"]}):
        p = host.make((settings,), scheduler="Odd")
        with pytest.raises(HTTPException, match="scheduler: 'Odd' with 8 steps cannot be walked: schedule:"):
            host.processing.process_images(p)


class Linker(external.DiscreteSchedule):
    """What the hosts' schedulers ask of their model: its table of sigmas, and the way to and from timesteps."""

    def __init__(self, alphas: torch.Tensor) -> None:
        super().__init__(((1 - alphas) / alphas).sqrt(), quantize=True)
        table = SimpleNamespace(sigma=lambda t: self.sigmas[t], shift=1.0)
        unet = SimpleNamespace(model=SimpleNamespace(predictor=table))
        self.inner_model = SimpleNamespace(forge_objects=SimpleNamespace(unet=unet))


def real_schedulers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A host's own list of schedulers, its file run with doubles of the modules it imports."""
    names = ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    opts = SimpleNamespace(beta_dist_alpha=0.6, beta_dist_beta=0.6, hide_schedulers=[], stochastic_sampling=False)
    vars(opts).update(dict.fromkeys(names, False))
    modules = ModuleType("modules")
    modules.shared = SimpleNamespace(opts=opts, sd_model=SimpleNamespace(is_sdxl=False))  # type: ignore[attr-defined]
    path, to_d = folder / "modules/sd_schedulers.py", sampling.to_d
    loaded = ModuleType("sd_schedulers")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "modules", modules)
        patched.setitem(sys.modules, "sd_schedulers", loaded)
        loaded.__dict__["__name__"] = "sd_schedulers"
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(loaded))
    sampling.to_d = to_d
    return [scheduler for scheduler in loaded.schedulers if scheduler.function is not None]


@pytest.mark.parametrize("checkout", ["A1111_DIR", "FORGE_DIR", "NEO_DIR"])
@pytest.mark.parametrize("steps", [20, 30])
def test_every_scheduler_that_a_host_lists(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, checkout: str, steps: int
) -> None:
    folder = os.environ.get(checkout)
    if not folder:
        pytest.skip(f"{checkout} names no checkout of the WebUI")
    pytest.importorskip("scipy")
    from modules import processing, sd_schedulers

    linker = Linker(processing.Model().alphas_cumprod)
    for one in real_schedulers(Path(folder), monkeypatch):

        def sigmas(n: int, low: float, high: float, table: torch.Tensor, one: Any = one) -> torch.Tensor:
            more = {"inner_model": linker} if one.need_inner_model else {}
            more |= {"width": 64, "height": 64} if one.label == "Flux2" else {}
            return one.function(n=n, sigma_min=low, sigma_max=high, device=torch.device("cpu"), **more).cpu()

        if one.label in ("KL Optimal", "DDIM"):  # the double's are the host's
            own = sd_schedulers.schedulers_map[one.label](steps, LOW, HIGH, linker.sigmas)
            torch.testing.assert_close(own, sigmas(steps, LOW, HIGH, linker.sigmas), rtol=1e-6, atol=0)
        if one.label == "FlowMatchEulerDiscrete" and importlib.util.find_spec("diffusers") is None:
            continue
        monkeypatch.setitem(sd_schedulers.schedulers_map, one.label, sigmas)
        assert_comes_back(host, one.label, steps)


def assert_comes_back(host: SimpleNamespace, scheduler: str, steps: int) -> None:
    """Plain init is img2img; invert and replay give the source, but for what is said of the inversion's last step."""
    fields = {"denoising_strength": 1.0, "cfg_scale": 1, "scheduler": scheduler, "steps": steps}
    plain, _ = host.run(**fields)
    made, _ = host.run({"output": ["init"]}, **fields)
    assert torch.equal(made.latest_samples, plain.latest_samples), scheduler
    p, _ = host.run({"mode": "invert", "output": ["init"]}, **fields)
    assert rms(p.latest_samples, p.init_latent) < 1e-5 or any("not converged" in text for text in p.comments), scheduler
    p, _ = host.run({"mode": "replay", "output": ["init"]}, sampler_name="Euler a", **fields)
    assert rms(p.latest_samples, p.init_latent) < 1e-6, scheduler


@pytest.fixture
def shifting(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As Neo's engines with use_shift: the request's own shift is set on the model at the start of ``p.sample``.

    Zero terminal SNR is set on the model at that place too, in every host.
    """
    kind, sampler = host.processing.StableDiffusionProcessingImg2Img, sys.modules["modules.sd_samplers_kdiffusion"]
    sample, get_sigmas = kind.sample, sampler.KDiffusionSampler.get_sigmas

    def sample_shifted(p: Any, *args: Any, **kwargs: Any) -> Any:
        p.sd_model.shift = p.cfg_scale
        return sample(p, *args, **kwargs)

    def shifted_sigmas(self: Any, p: Any, steps: int) -> torch.Tensor:
        return get_sigmas(self, p, steps) * getattr(p.sd_model, "shift", 1.0)

    monkeypatch.setattr(kind, "sample", sample_shifted)
    monkeypatch.setattr(sampler.KDiffusionSampler, "get_sigmas", shifted_sigmas)
    return host


@pytest.mark.parametrize("settings", [{}, {"mode": "replay"}])
def test_a_file_is_held_to_the_schedule_of_its_own_request(shifting: SimpleNamespace, settings: dict[str, Any]) -> None:
    fields = {"sampler_name": "Euler a", "denoising_strength": 1.0}
    first, processed = shifting.run({"output": ["init", "latents"], **settings}, cfg_scale=3, **fields)
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    again = {"output": ["init"], "trajectory": name, **settings}
    for _ in range(2):  # after a request with the same shift, and after one with another
        p, _ = shifting.run(again, cfg_scale=3, **fields)
        assert torch.equal(p.latest_samples, first.latest_samples)
        shifting.run(cfg_scale=1, **fields)


def test_a_file_of_another_shift_is_refused_before_any_model_call(
    shifting: SimpleNamespace, request: pytest.FixtureRequest
) -> None:
    fields = {"sampler_name": "Euler", "denoising_strength": 1.0}
    _, processed = shifting.run({"output": ["init", "latents"]}, cfg_scale=3, **fields)
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    request.getfixturevalue("no_work")
    with pytest.raises(HTTPException, match="trajectory: .* made on another schedule") as caught:
        shifting.run({"output": ["init"], "trajectory": name}, cfg_scale=1, **fields)  # the model's is 3 until then
    assert caught.value.status_code == 422
    with pytest.raises(InterruptedError):
        shifting.run(cfg_scale=1, **fields)


def test_what_the_schedule_decides_is_said_of_its_own_request(shifting: SimpleNamespace) -> None:
    """``end_at_sigma`` and the limit of megapixels: both count levels."""
    shifting.run(cfg_scale=1)
    settings = {"output": ["frames"], "end_at_sigma": 14.7, "include_clean": False}
    frames = {cfg: len(shifting.run(settings, cfg_scale=cfg, steps=8)[1].images) for cfg in (3, 1, 3)}
    assert frames[1] == 8 > frames[3]
    shifting.shared.opts.batch_unsampler_megapixels = 1  # 244 frames
    shifting.run(cfg_scale=1)
    assert 150 < len(shifting.run(settings, cfg_scale=3, steps=300)[1].images) < 244
    with pytest.raises(HTTPException, match="steps: 300 give 300 frames .* megapixels"):
        shifting.run(settings, cfg_scale=1, steps=300)


def test_a_host_without_schedulers_of_their_own(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forge Classic: the sampler's name says the scheduler, and a request has none."""
    from modules.sd_samplers_kdiffusion import KDiffusionSampler

    get_sigmas = KDiffusionSampler.get_sigmas

    def own_sigmas(self: Any, p: Any, steps: int) -> torch.Tensor:
        return get_sigmas(self, SimpleNamespace(**{**vars(p), "scheduler": "Karras"}), steps)

    p = host.make(({"output": ["init", "latents"]},))
    del p.scheduler
    monkeypatch.delattr(type(p), "scheduler")
    monkeypatch.setattr(KDiffusionSampler, "get_sigmas", own_sigmas)
    (saved,) = latents_of(host.processing.process_images(p))
    assert saved.info["scheduler"] == "Automatic"
