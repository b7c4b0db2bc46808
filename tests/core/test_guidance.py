"""Guidance: the paper's weight, the state that is mixed, and what a run of real k-diffusion makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_unsampler.core.guidance import GuidanceError, active, first_calls, mix, sample_guided, skip_weight
from lib_unsampler.core.noising import add_noise
from lib_unsampler.standalone.embedded import make_model
from lib_unsampler.standalone.sampling import get_sigmas, kd

STEPPING = ("euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde")
STEPPING += ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")
STEPS = 6
SIZE = (8, 8)


def run_options(name: str, x: Tensor, sigmas: Tensor) -> dict[str, Any]:
    """Fresh noise of one seed, as a sampler of this name takes it."""
    generator = torch.Generator().manual_seed(3)
    draws = {"noise_sampler": lambda *_: torch.randn(x.shape, generator=generator)}
    adds = name.endswith(("ancestral", "sde"))
    return {"disable": True, **(draws if adds else {})}


@pytest.fixture
def scene(latent: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(source, noise, schedule, model): the Gaussian prior under a prompt."""
    source = latent(2, 3, *SIZE) / 3
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(1))
    return source, noise, get_sigmas("karras", STEPS, "eps"), make_model("gaussian", "sea", *SIZE)


@given(t=st.floats(1, 1000), alpha=st.floats(0, 10), strength=st.floats(0, 1))
def test_the_weight_is_the_paper_s(t: float, alpha: float, strength: float) -> None:
    """Written as cos^2(alpha') by the half-angle formula: (1 + cos 2y) / 2 = cos^2 y."""
    half = math.cos(math.pi * (1000 - t) / 2000)
    assert skip_weight(t, alpha, strength) == pytest.approx(strength * (half * half) ** alpha, abs=1e-9)


def test_the_weight_is_whole_at_the_noisiest_and_nothing_at_the_clean_end() -> None:
    assert skip_weight(1000, 3) == 1 and skip_weight(0, 3) == 0
    assert skip_weight(0, 0, 0.5) == 0.5  # alpha 0: everywhere
    falling = [skip_weight(t, 3) for t in range(1000, -1, -50)]
    assert falling == sorted(falling, reverse=True)


def test_shares_of_the_executed_steps() -> None:
    assert [active(i, 4, 0.25, 0.5) for i in range(4)] == [False, True, True, False]
    assert all(active(i, 4, 0, 1) for i in range(4))


@pytest.mark.parametrize("name", STEPPING)
def test_the_first_call_of_each_step_is_found(name: str, scene: Any) -> None:
    """Checked against what the callback of a real run says: x of step i is what the model saw at that call."""
    source, noise, sigmas, model = scene
    shown: list[Tensor] = []
    stepped: list[Tensor] = []

    def noted(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        shown.append(x.clone())
        return model(x, sigma, **extra)

    function = getattr(kd, f"sample_{name}")
    options = run_options(name, source, sigmas)
    calls = first_calls(function, model, source, sigmas, **options)
    x = add_noise(source, noise, sigmas[0], "eps")
    function(noted, x, sigmas=sigmas, callback=lambda info: stepped.append(info["x"].clone()), **options)
    assert len(calls) == len(shown)
    firsts = [x for x, step in zip(shown, calls) if step is not None]
    assert [step for step in calls if step is not None] == list(range(STEPS))
    assert all(torch.equal(a, b) for a, b in zip(firsts, stepped, strict=True))


@pytest.mark.parametrize("name", STEPPING)
def test_weight_zero_is_the_sampler_alone_bit_for_bit(name: str, scene: Any) -> None:
    source, noise, sigmas, model = scene
    function, x = getattr(kd, f"sample_{name}"), add_noise(source, noise, sigmas[0], "eps")
    calls = first_calls(function, model, x, sigmas, **run_options(name, x, sigmas))
    plain = function(model, x, sigmas=sigmas, **run_options(name, x, sigmas))
    for weights in ({}, dict.fromkeys(range(STEPS), 0.0)):
        options = run_options(name, x, sigmas)
        made = sample_guided(function, model, x, sigmas, weights, lambda _: torch.full_like(x, 9.0), calls, **options)
        assert torch.equal(made, plain)


def test_whole_weight_under_euler_is_d_of_the_least_noisy_level(scene: Any) -> None:
    """x <- z at every step: Euler's last step maps z at s[n-1] to D(z), whatever went before."""
    source, noise, sigmas, model = scene
    x = torch.randn_like(source)

    def level(step: int) -> Tensor:
        return add_noise(source, noise, sigmas[step], "eps")

    calls = first_calls(kd.sample_euler, model, x, sigmas)
    weights = dict.fromkeys(range(STEPS), 1.0)
    made = sample_guided(kd.sample_euler, model, x, sigmas, weights, level, calls, disable=True)
    expected = model(level(STEPS - 1), sigmas[STEPS - 1].expand(2))
    assert (made - expected).abs().max() < 1e-6


def test_euler_s_update_uses_the_mixed_state(scene: Any) -> None:
    """The recursion written out: x <- c z + (1-c) x, then x + (s' - s) (x - D(x, s)) / s."""
    source, noise, sigmas, model = scene
    x = add_noise(source, noise, sigmas[0], "eps") + 1
    weights = {i: skip_weight(1000 * (1 - i / STEPS), 3, 0.8) for i in range(STEPS)}

    def level(step: int) -> Tensor:
        return add_noise(source, noise, sigmas[step], "eps")

    expected = x
    for i in range(STEPS):
        expected = weights[i] * level(i) + (1 - weights[i]) * expected
        slope = (expected - model(expected, sigmas[i].expand(2))) / sigmas[i]
        expected = expected + (sigmas[i + 1] - sigmas[i]) * slope
    calls = first_calls(kd.sample_euler, model, x, sigmas)
    start = x.clone()
    made = sample_guided(kd.sample_euler, model, x, sigmas, weights, level, calls, disable=True)
    assert (made - expected).abs().max() < 1e-5
    assert torch.equal(x, start)  # the caller's own tensor is left alone


@pytest.mark.parametrize("name", STEPPING)
def test_nothing_is_mixed_within_a_step_nor_at_the_end(name: str, scene: Any) -> None:
    """With whole weight the model sees z itself at each first call, and never between: as many as there are steps."""
    source, noise, sigmas, model = scene
    function, x = getattr(kd, f"sample_{name}"), torch.randn_like(source)
    asked: list[int] = []
    seen: list[bool] = []

    def level(step: int) -> Tensor:
        asked.append(step)
        return add_noise(source, noise, sigmas[step], "eps")

    def noted(x: Tensor, sigma: Tensor) -> Tensor:
        same = [torch.equal(x, add_noise(source, noise, s, "eps")) for s in sigmas[:-1]]
        seen.append(any(same))
        return model(x, sigma)

    options = run_options(name, x, sigmas)
    calls = first_calls(function, model, x, sigmas, **options)
    sample_guided(function, noted, x, sigmas, dict.fromkeys(range(STEPS), 1.0), level, calls, **options)
    assert asked == list(range(STEPS))
    assert seen == [step is not None for step in calls]


def test_a_sampler_that_chooses_its_own_steps_is_refused(scene: Any) -> None:
    source, _, sigmas, model = scene
    for name in ("dpm_fast", "dpm_adaptive"):
        with pytest.raises(GuidanceError, match=f"sampler: '{name}'"):
            first_calls(getattr(kd, f"sample_{name}"), model, source, sigmas)


def test_churn_is_refused(scene: Any) -> None:
    source, _, sigmas, model = scene
    with pytest.raises(GuidanceError, match="s_churn"):
        first_calls(kd.sample_euler, model, source, sigmas, s_churn=5.0)


def test_a_sampler_that_shows_its_model_a_copy_is_refused(scene: Any) -> None:
    source, _, sigmas, model = scene

    def sample_copying(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None, **_: Any) -> Tensor:
        for i in range(len(sigmas) - 1):
            denoised = model(x.clone(), sigmas[i].expand(len(x)))
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
            x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
        return x

    with pytest.raises(GuidanceError, match="copying"):
        first_calls(sample_copying, model, source, sigmas)


def test_a_sampler_that_goes_on_from_the_answer_alone_is_guided(scene: Any) -> None:
    """LCM: x' is D(x) and noise; what is mixed is what D is asked of."""
    source, noise, sigmas, model = scene

    def sample_answer(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None, **_: Any) -> Tensor:
        for i in range(len(sigmas) - 1):
            x = model(x, sigmas[i].expand(len(x)))
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": x})
        return x

    calls = first_calls(sample_answer, model, source, sigmas)
    last = add_noise(source, noise, sigmas[STEPS - 1], "eps")
    weights = {STEPS - 1: 1.0}
    made = sample_guided(sample_answer, model, source, sigmas, weights, lambda _: last, calls)
    assert torch.equal(made, model(last, sigmas[STEPS - 1].expand(2)))


def test_a_sampler_that_asks_for_the_guided_models_parts_is_guided(scene: Any) -> None:
    """CFG++ as ComfyUI and Neo write it: x' = D(x) + s' (x - D(x without prompt)) / s, told by a function hung in."""
    source, noise, sigmas, model = scene
    plain = make_model("gaussian", "", *SIZE)

    def two_fold(x: Tensor, sigma: Tensor, model_options: Any) -> Tensor:
        denoised = model(x, sigma)
        for told in model_options["sampler_post_cfg_function"]:
            denoised = told({"denoised": denoised, "uncond_denoised": plain(x, sigma)})
        return denoised

    def sample_cfg_pp(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        extra_args, heard = {} if extra_args is None else extra_args, []
        told = [lambda parts: heard.append(parts["uncond_denoised"]) or parts["denoised"]]
        extra_args["model_options"] = {"sampler_post_cfg_function": told}
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
            x = denoised + sigmas[i + 1] * (x - heard[-1]) / sigmas[i]
        return x

    def level(step: int) -> Tensor:
        return add_noise(source, noise, sigmas[step], "eps")

    weights = {1: 0.4, 2: 0.3}
    calls = first_calls(sample_cfg_pp, two_fold, source, sigmas, extra_args={"cond": 1})
    assert calls == list(range(STEPS))
    made = sample_guided(sample_cfg_pp, two_fold, level(0), sigmas, weights, level, calls, disable=True)
    x = level(0)
    for i, (s, below) in enumerate(zip(sigmas, sigmas[1:])):
        c = weights.get(i, 0.0)
        x = c * level(i) + (1 - c) * x
        x = model(x, s.expand(2)) + below * (x - plain(x, s.expand(2))) / s
    assert (made - x).abs().max() < 1e-5


def test_what_a_sampler_tells_its_callback_does_not_matter(scene: Any) -> None:
    """Forge's IPNDM and DEIS tell the state that they began with; they are guided like any other."""
    source, noise, sigmas, model = scene

    def sample_telling(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None, **_: Any) -> Tensor:
        state = x
        for i in range(len(sigmas) - 1):
            denoised = model(state, sigmas[i].expand(len(x)))
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
            state = state + (sigmas[i + 1] - sigmas[i]) * (state - denoised) / sigmas[i]
        return state

    def level(step: int) -> Tensor:
        return add_noise(source, noise, sigmas[step], "eps")

    made = []
    for function in (sample_telling, kd.sample_euler):
        calls = first_calls(function, model, source, sigmas)
        made.append(sample_guided(function, model, level(0), sigmas, {1: 0.4, 2: 0.3}, level, calls, disable=True))
    assert (made[0] - made[1]).abs().max() < 1e-5


@given(number=st.integers(0, 2**31))
def test_places_of_a_map_are_exactly_theirs(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    x, z = (torch.randn(2, 3, 7, 5, generator=generator) * 20 for _ in range(2))
    weight = torch.randint(0, 2, (7, 5), generator=generator).float()
    made = x.clone()
    mix(made, z, weight)
    assert torch.equal(made, torch.where(weight == 1, z, x))


def test_what_a_sampler_sets_on_its_model_reaches_the_model(scene: Any) -> None:
    source, _, sigmas, model = scene

    def sample_setting(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None, **_: Any) -> Tensor:
        model.wanted = True
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i].expand(len(x)))
            if callback is not None:
                callback({"x": x, "i": i})
            x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
        return x

    calls = first_calls(sample_setting, model, source, sigmas)
    assert not hasattr(model, "wanted")  # trying it out leaves the model alone
    sample_guided(sample_setting, model, source, sigmas, {0: 0.5}, lambda _: source + 1, calls)
    assert model.wanted is True
