"""Inversion against closed forms: the Gaussian prior's probability-flow ODE, and states whose noise is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_unsampler.bench._pixels import pixel_denoiser
from lib_unsampler.bench.inversion import photographs
from lib_unsampler.core.fixedpoint import Sample
from lib_unsampler.core.inversion import CALLS, EXACT, KIN, InversionError, Level, Unnumbered, invert, kin, unconverged
from lib_unsampler.core.precise import KINDS
from lib_unsampler.core.schedule import Levels, levels
from lib_unsampler.settings import SAMPLERS
from lib_unsampler.standalone.embedded import MixturePrior, anchor_mixture, guided, make_model
from lib_unsampler.standalone.sampling import get_sigmas, kd

SIZE = (12, 16)


def function(sampler: str) -> Any:
    return getattr(kd, f"sample_{sampler}")


def plain(model: Any) -> Any:
    return lambda x, sigma, call, images=None: model(x, sigma)


def inverted(
    model: Any, x: Tensor, plan: Levels, solver: str, sampler: str = "euler", prediction: str = "eps", **options: Any
) -> list[Level]:
    """Every level of an inversion."""
    walked: list[Level] = []
    z = invert(model, x, plan, solver, function(sampler), prediction, walked.append, **options)
    assert [level.index for level in walked] == list(plan.visited)
    assert torch.equal(z, walked[-1].z)
    return walked


def rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt()


def anchor(seeds: int = 5) -> tuple[Any, Tensor, Tensor, Tensor]:
    """DESIGN 4's task: the mixture, its schedule, the noises, and the states that Euler brings to s[19]."""
    sigmas = kd.get_sigmas_karras(20, 0.0292, 14.6146).double()
    noise = torch.stack([torch.from_numpy(np.random.default_rng(seed).normal(size=16)) for seed in range(seeds)])
    x = sigmas[0] * noise
    model = anchor_mixture()
    return model, sigmas, x, kd.sample_euler(model, x, sigmas[:20], disable=True)


def below(sigmas: Tensor) -> Levels:
    """The levels above s[19], which holds the anchor's state."""
    return Levels(sigmas, tuple(range(18, -1, -1)), tuple(range(18, -1, -1)))


def calls_of(walked: list[Level]) -> Tensor:
    return torch.stack([level.calls for level in walked]).double()


def test_exact_euler_finds_the_anchors_noise_in_few_calls() -> None:
    model, sigmas, x, y = anchor()
    walked = inverted(plain(model), y, below(sigmas), "exact", tolerance=2e-7)
    assert rms(walked[-1].z - x).mean() <= 1e-5
    assert calls_of(walked).mean() <= 3  # Anderson: 4.2, plain fixed point: 8.4
    assert all(level.converged.all() for level in walked)


@pytest.mark.parametrize("scale", [3, 7])
def test_guidance_costs_few_calls_more(scale: float) -> None:
    whole = anchor_mixture()
    model = guided(MixturePrior(whole.means[:3], whole.variance), whole, scale)
    _, sigmas, x, _ = anchor()
    y = kd.sample_euler(model, x, sigmas[:20], disable=True)
    walked = inverted(plain(model), y, below(sigmas), "exact", tolerance=1e-7)
    assert rms(walked[-1].z - x).mean() <= 1e-5
    assert calls_of(walked).mean() <= 3.8


@pytest.mark.parametrize("sampler", EXACT)
@pytest.mark.parametrize("name", ["gaussian", "gaussian-flow"])
def test_sampling_again_from_an_exact_inversion_gives_the_source(name: str, sampler: str) -> None:
    model = guided(*(make_model(name, word, *SIZE) for word in ("sea", "night")), 3)
    prediction = "flow" if name.endswith("flow") else "eps"
    source = 0.3 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    plan = levels(get_sigmas("karras", 20, prediction))
    walked = inverted(plain(model), source, plan, "exact", sampler, prediction)
    assert walked[-1].z.dtype == torch.float32
    back = function(sampler)(model, walked[-1].z, plan.schedule, disable=True)
    assert 20 * torch.log10(source.std() / (back - source).square().mean().sqrt()) >= 80


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
def test_the_residual_is_how_far_the_samplers_step_misses(sampler: str) -> None:
    model, sigmas, x, _ = anchor()
    y = function(sampler)(model, x, sigmas, disable=True)
    plan = Levels(sigmas, tuple(range(19, -1, -1)), tuple(range(19, -1, -1)))
    for tolerance in (1e-3, 1e-5, 1e-7):
        below_it = y
        for level in inverted(plain(model), y, plan, "exact", sampler, tolerance=tolerance):
            reached = function(sampler)(model, level.z, sigmas[level.index : level.index + 2], disable=True)
            missed = rms(reached - below_it) / max(1.0, level.sigma)
            assert (missed <= 1.5 * tolerance).all()
            assert (level.residual <= tolerance).all() and level.converged.all()
            below_it = level.z


def test_the_levels_of_dpmpp_2m_are_the_states_of_its_own_run() -> None:
    """All of them, of every image, as they would be by itself; its step looks back, so one alone says little."""
    model, sigmas, x, _ = anchor(3)
    y = kd.sample_dpmpp_2m(model, x, sigmas, disable=True)
    plan = Levels(sigmas, tuple(range(19, -1, -1)), tuple(range(19, -1, -1)))
    walked = inverted(plain(model), y, plan, "exact", "dpmpp_2m", tolerance=1e-6)
    states: list[Tensor] = []
    back = kd.sample_dpmpp_2m(model, walked[-1].z, sigmas, disable=True, callback=lambda at: states.append(at["x"]))
    assert 20 * torch.log10(y.std() / (back - y).square().mean().sqrt()) >= 100
    for level in walked:
        assert (rms(states[level.index] - level.z) <= 1e-5 * max(1.0, level.sigma)).all()
        assert (level.residual <= 1e-6).all() and level.converged.all()
        truth = model(level.z, torch.full((3,), level.sigma).double())
        torch.testing.assert_close(level.denoised, truth, rtol=0, atol=1e-4)
    alone = inverted(plain(model), y[1:2], plan, "exact", "dpmpp_2m", tolerance=1e-6)
    torch.testing.assert_close(alone[-1].z[0], walked[-1].z[1], rtol=0, atol=1e-3)
    assert [int(level.calls) for level in alone] == [int(level.calls[1]) for level in walked]
    assert calls_of(walked).mean() <= 5


def test_dpmpp_2m_finds_a_known_noise_from_a_noisy_state_too() -> None:
    model, sigmas, x, _ = anchor()
    y = kd.sample_dpmpp_2m(model, x, sigmas[:20], disable=True)
    walked = inverted(plain(model), y, below(sigmas), "exact", "dpmpp_2m", tolerance=1e-7)
    assert rms(walked[-1].z - x).mean() <= 1e-4


def test_dpmpp_2m_under_strong_guidance_tells_which_images_come_back() -> None:
    """The mixture's answers switch sharply at cfg 7: some images converge, the others are named, none pretends."""
    whole = anchor_mixture()
    model = guided(MixturePrior(whole.means[:3], whole.variance), whole, 7)
    _, sigmas, x, _ = anchor(6)
    y = kd.sample_dpmpp_2m(model, x, sigmas, disable=True)
    walked = inverted(plain(model), y, levels(sigmas), "exact", "dpmpp_2m", tolerance=1e-6)
    back = kd.sample_dpmpp_2m(model, walked[-1].z, levels(sigmas).schedule.double(), disable=True)
    converged = torch.stack([level.converged for level in walked]).all(0)
    near = rms(back - y) < 1e-4
    assert converged.any() and torch.equal(near, converged)
    assert bool(unconverged(walked)) == bool((~converged).any())


@pytest.mark.parametrize(("scale", "most"), [(1, 5), (3, 5.5), (7, 6.5)])
@pytest.mark.parametrize("end", [19, 20])
def test_dpmpp_2m_converges_for_every_image_at_any_guidance(scale: float, most: float, end: int) -> None:
    """The mixture's answers switch sharply at cfg 7. The noise found is that which the sampler started from."""
    whole = anchor_mixture()
    model = guided(MixturePrior(whole.means[:3], whole.variance), whole, scale)
    _, sigmas, x, _ = anchor(10)
    y = kd.sample_dpmpp_2m(model, x, sigmas[: end + 1], disable=True)
    plan = below(sigmas) if end == 19 else levels(sigmas)
    walked = inverted(plain(model), y, plan, "exact", "dpmpp_2m", tolerance=1e-6)
    assert all(level.converged.all() and (level.residual <= 1e-6).all() for level in walked)
    assert calls_of(walked).mean() <= most
    assert rms(walked[-1].z - x).mean() <= 1e-4
    assert not unconverged(walked)


@pytest.mark.parametrize("scale", [1, 7])
@pytest.mark.parametrize("seed", range(3))
def test_dpmpp_2m_converges_on_mixtures_it_has_not_seen(scale: float, seed: int) -> None:
    means = torch.from_numpy(np.random.default_rng(100 + seed).normal(size=(6, 16)))
    model = guided(MixturePrior(means[:3], 0.35**2), MixturePrior(means, 0.35**2), scale)
    _, sigmas, x, _ = anchor(4)
    y = kd.sample_dpmpp_2m(model, x, sigmas, disable=True)
    walked = inverted(plain(model), y, levels(sigmas), "exact", "dpmpp_2m")
    assert all(level.converged.all() for level in walked) and calls_of(walked).mean() <= 9


def test_dpmpp_2m_comes_back_under_strong_guidance_on_pictures() -> None:
    model = guided(*(make_model("gaussian", word, *SIZE) for word in ("sea", "night")), 7)
    source = 0.3 * torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()
    plan = levels(get_sigmas("karras", 20, "eps"))
    walked = inverted(plain(model), source, plan, "exact", "dpmpp_2m")
    assert all(level.converged.all() for level in walked) and calls_of(walked).mean() <= 11
    back = kd.sample_dpmpp_2m(model, walked[-1].z, plan.schedule.double(), disable=True)
    assert 20 * torch.log10(source.std() / (back - source).square().mean().sqrt()) >= 90


class Cramped(Unnumbered):
    """A model whose memory holds few states."""

    def __init__(self, denoiser: Any, holds: int) -> None:
        super().__init__(denoiser)
        self.holds = holds
        self.batches: list[int] = []

    def stacked(self, x: Tensor, sigma: Tensor, calls: Tensor, images: Tensor) -> Tensor:
        assert len(x) == len(sigma) == len(calls) == len(images)
        self.batches.append(len(x))
        if len(x) > self.holds:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().stacked(x, sigma, calls, images)


def test_a_model_that_takes_levels_together_gets_as_many_as_its_memory_holds() -> None:
    model, sigmas, _, y = anchor(3)
    alone = inverted(plain(model), y, below(sigmas), "exact", "dpmpp_2m")
    for holds in (1, 4, 1000):
        cramped = Cramped(model, holds)
        together = inverted(cramped, y, below(sigmas), "exact", "dpmpp_2m")
        for one, other in zip(alone, together):
            torch.testing.assert_close(other.z, one.z, rtol=0, atol=1e-4)
        refused = [size for size in cramped.batches if size > holds]
        assert len(refused) <= 5 and refused == sorted(refused, reverse=True)  # halved, and remembered
        assert sum(cramped.batches) - sum(refused) == calls_of(together).sum()
        assert holds < 1000 or cramped.calls < 30  # a batch a round
    with pytest.raises(torch.cuda.OutOfMemoryError):
        inverted(Cramped(model, 0), y, below(sigmas), "exact", "dpmpp_2m")


def test_dpmpp_2m_of_a_half_precision_model_stops_where_it_gets_no_nearer() -> None:
    model = make_model("gaussian", "sea", *SIZE)

    def coarse(x: Tensor, sigma: Tensor, call: int = 0, images: Tensor | None = None) -> Tensor:
        return x - (x - model(x, sigma)).half().float()  # as a network's eps is rounded

    source = 0.3 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    plan = levels(get_sigmas("karras", 20, "eps"))
    walked = inverted(coarse, source, plan, "exact", "dpmpp_2m")
    assert max(float(level.residual.max()) for level in walked) < 1e-3
    assert calls_of(walked).mean() <= 14
    back = kd.sample_dpmpp_2m(coarse, walked[-1].z, plan.schedule, disable=True)
    assert 20 * torch.log10(source.std() / (back - source).square().mean().sqrt()) > 50


def test_large_latents_are_solved_from_a_sample_of_their_values_as_well() -> None:
    model = make_model("gaussian", "sea", 96, 128)
    sources = 0.3 * torch.randn(4, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    plan = levels(get_sigmas("karras", 12, "eps"))
    assert Sample(sources[0].numel()).size < sources[0].numel()
    walked = inverted(plain(model), sources, plan, "exact")
    assert all(level.converged.all() for level in walked)
    assert calls_of(walked).mean() <= 6.2  # one image's mean is 5.9 to 6.3, as its rounding falls


def test_a_batch_converges_as_single_images_do_and_a_finished_image_costs_no_call() -> None:
    model, sigmas, _, y = anchor()
    asked: list[tuple[int, list[int]]] = []

    def counted(z: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        assert len(z) == len(sigma) == (len(y) if images is None else len(images))
        asked.append((call, list(range(len(y))) if images is None else images.tolist()))
        return model(z, sigma)

    together = inverted(counted, y, below(sigmas), "exact", tolerance=1e-8)
    for image in range(len(y)):
        alone = inverted(plain(model), y[image : image + 1], below(sigmas), "exact", tolerance=1e-8)
        for a, b in zip(alone, together):
            torch.testing.assert_close(a.z[0], b.z[image], rtol=0, atol=1e-7 * max(1.0, a.sigma))
            assert a.calls[0] == b.calls[image]
        for level in together:
            mine = [number for number, images in asked if number == level.index and image in images]
            assert len(mine) == level.calls[image]
    assert len({tuple(level.calls.tolist()) for level in together}) > 1  # some finish before others
    assert len(asked) < calls_of(together).sum()


def test_every_call_mirrors_one_of_the_forward_run() -> None:
    model = make_model("gaussian", "sea", *SIZE)
    source = torch.zeros(1, 3, *SIZE)
    plan = levels(get_sigmas("karras", 8, "eps"), 2, 3)
    for sampler in CALLS:
        forward: list[float] = []

        def noted(z: Tensor, sigma: Tensor, forward: list[float] = forward) -> Tensor:
            forward.append(float(sigma[0]))
            return model(z, sigma)

        function(sampler)(noted, source, plan.schedule[2:], disable=True)
        for solver in ("reverse", "exact") if sampler in EXACT else ("reverse",):
            seen: list[tuple[float, int]] = []

            def numbered(
                z: Tensor, sigma: Tensor, call: int, images: Tensor | None = None, seen: list[tuple[float, int]] = seen
            ) -> Tensor:
                seen.append((float(sigma[0]), call))
                return model(z, sigma)

            inverted(numbered, source, plan, solver, sampler)
            assert all(sigma == pytest.approx(forward[call], rel=1e-5) for sigma, call in seen)
            assert {call for _, call in seen} <= set(range(len(forward)))


def test_a_source_without_a_preimage_keeps_a_plausible_latent_and_says_so() -> None:
    model = MixturePrior(torch.zeros(1, 3, *SIZE).double(), 1e-6)  # every answer is nearly black
    source = 0.5 * torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()
    plan = levels(get_sigmas("karras", 10, "eps"))
    walked = inverted(plain(model), source, plan, "exact", max_calls=12)
    assert not walked[0].converged and walked[0].calls <= 12
    (message, *_) = unconverged(walked)
    assert "step 9 " in message and f"{float(walked[0].residual):.2g}" in message
    noise = (walked[0].z - source) / walked[0].sigma
    assert noise.square().mean().sqrt() <= 3.01


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_level_takes_more_calls_than_the_cap(most: int, sampler: str) -> None:
    model, sigmas, _, y = anchor()
    plan = levels(sigmas)
    walked = inverted(plain(model), y, plan, "exact", sampler, tolerance=1e-12, max_calls=most)
    assert calls_of(walked).max() == most


def test_a_half_precision_model_is_left_where_it_gets_no_nearer() -> None:
    model = make_model("gaussian", "sea", *SIZE)

    def coarse(x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        return x - (x - model(x, sigma)).half().float()  # as a network's eps is rounded

    source = 0.3 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    plan = levels(get_sigmas("karras", 20, "eps"))
    walked = inverted(coarse, source, plan, "exact")
    assert max(float(level.residual.max()) for level in walked) < 1e-3
    assert calls_of(walked).mean() < 8
    back = kd.sample_euler(lambda x, sigma: coarse(x, sigma, 0), walked[-1].z, plan.schedule, disable=True)
    assert 20 * torch.log10(source.std() / (back - source).square().mean().sqrt()) > 50


@pytest.mark.parametrize("solver", ["reverse", "exact"])
def test_the_estimate_that_comes_with_a_level_is_the_models(solver: str) -> None:
    model = make_model("gaussian", "sea", *SIZE)
    source = 0.3 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    for level in inverted(plain(model), source, levels(get_sigmas("karras", 10, "eps")), solver):
        if level.denoised is None:
            assert solver == "reverse" and level.index == 0
            continue
        truth = model(level.z, torch.full((2,), level.sigma))
        torch.testing.assert_close(level.denoised, truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", ["reverse", "exact"])
def test_a_repeated_level_repeats_its_state(solver: str) -> None:
    model = make_model("gaussian", "sea", *SIZE)
    source = 0.3 * torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    sigmas = get_sigmas("karras", 6, "eps")
    once = inverted(plain(model), source, levels(sigmas), solver)
    repeated = levels(torch.cat([sigmas[:3], sigmas[2:4], sigmas[3:]]))
    twice: list[Level] = []
    z = invert(plain(model), source, repeated, solver, kd.sample_euler, "eps", twice.append)
    assert [level.index for level in twice] == list(repeated.visited)
    torch.testing.assert_close(z, once[-1].z, rtol=0, atol=1e-6)
    assert sum(int(level.calls) for level in twice) == sum(int(level.calls) for level in once)


def test_reverse_begins_with_an_euler_step_at_the_first_noisy_level() -> None:
    model = make_model("gaussian", "sea", *SIZE)
    source = 0.3 * torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    sigmas = get_sigmas("karras", 6, "eps")
    first = inverted(plain(model), source, levels(sigmas), "reverse")[0]
    torch.testing.assert_close(first.z, 2 * source - model(source, sigmas[5:6]))


def test_an_interrupt_passes_and_what_was_handed_over_stays() -> None:
    model, sigmas, _, y = anchor()
    walked: list[Level] = []

    class Stop(BaseException):
        pass

    def stopped(z: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        if call < 10:
            raise Stop
        return model(z, sigma)

    with pytest.raises(Stop):
        invert(stopped, y, below(sigmas), "exact", kd.sample_euler, "eps", walked.append)
    assert [level.index for level in walked] == list(range(18, 9, -1))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpm_fast", "dpm_adaptive"])
def test_a_sampler_that_is_not_served_is_refused_by_name(sampler: str) -> None:
    with pytest.raises(InversionError, match=repr(sampler)):
        inverted(plain(anchor_mixture()), torch.zeros(1, 16), levels(get_sigmas("karras", 5, "eps")), "exact", sampler)


@pytest.mark.parametrize("sampler", list(CALLS))
@pytest.mark.parametrize("name", ["gaussian", "gaussian-flow"])
def test_reverse_follows_the_probability_flow_ode_ever_closer(name: str, sampler: str) -> None:
    model = make_model(name, "sea", *SIZE)
    errors = []
    source = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double() * 0.3
    for steps in (160, 320) if sampler == "lms" else (40, 80):  # its first steps are of lower order
        plan = levels(get_sigmas("karras", steps, model.prediction).double())
        walked = inverted(plain(model), source, plan, "reverse", sampler, model.prediction)
        begun, z = walked[0], walked[-1].z
        truth = model.solve(begun.z, plan.schedule[begun.index].double(), plan.schedule[0].double())
        errors.append(float(rms(z - truth).max()))
    assert errors[0] / errors[1] > 0.9 * 2 ** (1 if sampler == "euler" else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize(("solver", "sampler"), [*(("reverse", s) for s in CALLS), *(("exact", s) for s in EXACT)])
def test_on_a_gpu_the_states_stay_there_and_are_those_of_the_cpu(solver: str, sampler: str) -> None:
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    plan = levels(kd.get_sigmas_karras(12, 0.0292, 14.6146))

    def model(z: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        assert z.device == sigma.device
        return 0.49 * z / (0.49 + sigma[:, None, None, None] ** 2)

    here, there = (inverted(model, x.to(device), plan, solver, sampler) for device in ("cpu", "cuda"))
    for one, other in zip(here, there):
        assert other.z.is_cuda and other.z.dtype == torch.float32
        torch.testing.assert_close(other.z.cpu(), one.z, rtol=1e-5, atol=1e-5 * one.sigma)


ALLOWING = [
    "high",  # TensorFloat-32 on a GPU, as A1111 does
    "medium",  # bfloat16 on a processor that has it
]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("precision", ALLOWING)
@pytest.mark.parametrize("kinds", [KINDS, ()], ids=["newer names", "older name"])
def test_what_precision_a_host_allows_its_model_is_not_the_solver_s(
    kinds: tuple[Any, ...], precision: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_unsampler.core.precise.KINDS", kinds)
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    x = x.to("cuda" if torch.cuda.is_available() else "cpu")
    plan = levels(kd.get_sigmas_karras(12, 0.0292, 14.6146))
    seen: set[str] = set()

    def model(z: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        seen.add(torch.get_float32_matmul_precision())
        return 0.49 * z / (0.49 + sigma[:, None, None, None] ** 2)

    before = torch.get_float32_matmul_precision()
    strict = inverted(model, x, plan, "exact", sampler)
    seen.clear()
    torch.set_float32_matmul_precision(precision)
    try:
        allowed = inverted(model, x, plan, "exact", sampler)
        assert seen == {precision} == {torch.get_float32_matmul_precision()}
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(strict, allowed):
        assert torch.equal(one.z, other.z) and torch.equal(one.calls, other.calls)
    assert all(level.converged.all() for level in allowed)


def test_every_sampler_of_the_settings_is_served_mapped_or_refused() -> None:
    refused = set()
    for sampler in SAMPLERS:
        try:
            name, message = kin(sampler, "reverse")
        except InversionError as error:
            refused.add(sampler)
            assert repr(sampler) in str(error)
            continue
        assert name in CALLS and (message is None) == (name == sampler)
        assert message is None or (sampler in message and name in message)
        assert kin(sampler, "exact")[0] in EXACT
    assert refused == {"dpm_fast", "dpm_adaptive"}
    assert set(KIN) <= set(SAMPLERS)


def test_a_schedule_up_to_zero_terminal_snr_comes_back() -> None:
    model = make_model("gaussian", "sea", *SIZE)
    source = 0.3 * torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    plan = levels(kd.get_sigmas_karras(20, 0.0292, 4518.0))
    walked = inverted(plain(model), source, plan, "exact")
    assert all(level.converged.all() for level in walked)
    back = kd.sample_euler(model, walked[-1].z, plan.schedule, disable=True)
    assert 20 * torch.log10(source.std() / (back - source).square().mean().sqrt()) >= 60  # float32 at 4518: 5e-4


@pytest.mark.parametrize(("sampler", "most"), [("euler", 6), ("heun", 11), ("dpmpp_2m", 9)])
def test_photographs_come_back_through_a_trained_network(sampler: str, most: float) -> None:
    source, network = photographs(2), pixel_denoiser()
    plan = levels(get_sigmas("karras", 20, "eps"))
    with torch.inference_mode():
        walked = inverted(plain(network), source, plan, "exact", sampler)
        back = function(sampler)(network, walked[-1].z, plan.schedule, disable=True)
    assert all(level.converged.all() for level in walked)
    assert calls_of(walked).mean() <= most
    assert 20 * torch.log10(source.std() / (back - source).square().mean().sqrt()) >= 70


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m"])
def test_a_schedule_that_ends_above_zero_comes_back(sampler: str) -> None:
    """KL Optimal's: the source is the state at the last sigma, where the sampler stops."""
    model = make_model("gaussian", "sea", *SIZE)
    sigmas = kd.get_sigmas_karras(13, 0.0292, 14.6146)[:-1]
    source = model.mean.expand(2, -1, -1, -1).float() + 0.2 * torch.randn(2, 3, *SIZE, generator=torch.manual_seed(3))
    walked = inverted(plain(model), source, levels(sigmas, whole=True), "exact", sampler)
    assert len(walked) == 12 and not unconverged(walked)
    back = function(sampler)(model, walked[-1].z.double(), sigmas.double(), disable=True)
    assert rms(back - source).max() < 1e-5


def test_reverse_ends_its_way_where_the_schedule_does() -> None:
    """Its first step is Euler's from the end, with D one level up: the shorter, the nearer to nothing."""
    model, source = anchor_mixture(), torch.linspace(-1, 1, 16).reshape(1, 16)
    for end in (0.0, 0.5, 0.9):
        sigmas = torch.tensor([2.0, 1.0, end])
        first = inverted(plain(model), source, levels(sigmas, whole=True), "reverse", "euler")[0]
        wanted = source + (1 - end) * (source - model(source.double(), torch.ones(1).double()).float())
        torch.testing.assert_close(first.z, wanted, rtol=1e-5, atol=1e-5)
