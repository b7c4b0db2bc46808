"""The real k-diffusion on the embedded models: every sampler runs, deterministic ones converge to the
closed-form solution at their order, stochastic ones are right in distribution and seeded per image."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lib_unsampler.core.noising import SeededDraws, walk
from lib_unsampler.core.schedule import levels
from lib_unsampler.settings import SAMPLERS, SCHEDULERS, parse
from lib_unsampler.standalone import sampling
from lib_unsampler.standalone.embedded import GaussianPrior, make_model
from lib_unsampler.standalone.onward import first_draw
from lib_unsampler.standalone.sampling import STOCHASTIC, check_sampler, get_sigmas, kd, sample

PREDICTIONS = ("eps", "flow")
MODEL = {"eps": "gaussian", "flow": "gaussian-flow"}
DETERMINISTIC = tuple(s for s in SAMPLERS if s not in STOCHASTIC)
FIXED_STEP = tuple(s for s in DETERMINISTIC if s != "dpm_adaptive")
ALLOWED = [(p, s) for p, s in product(PREDICTIONS, SAMPLERS) if p == "eps" or s not in STOCHASTIC]
ORDER = {"euler": 1, "heun": 2, "dpm_2": 2, "lms": 2, "dpm_fast": 2, "dpmpp_2m": 2}
SEEDS = (5, 6, 7)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def model_of(prediction: str, height: int = 6, width: int = 8) -> GaussianPrior:
    model = make_model(MODEL[prediction], "sunset", height, width)
    assert isinstance(model, GaussianPrior)
    return model


def start(sigma: Tensor, *shape: int) -> Tensor:
    """Pure noise at a level, in its dtype."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise.to(sigma.dtype) * sigma


def test_the_names_are_k_diffusions() -> None:
    there = {n.removeprefix("sample_") for n in dir(kd) if n.startswith("sample_")}
    assert there == set(SAMPLERS)
    adding = {n for n in SAMPLERS if "eta=1" in str(sampling.inspect.signature(getattr(kd, f"sample_{n}")))}
    assert adding == set(STOCHASTIC)


@pytest.mark.parametrize(("prediction", "sampler"), ALLOWED)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.one_of(3)
def test_every_sampler_runs_from_every_level(prediction: str, sampler: str, steps: int) -> None:
    """Finite, repeatable by seed, one image's result whatever the batch, and without a warning."""
    sigmas = get_sigmas("karras", 20, prediction)[-steps - 1 :]
    z, model = start(sigmas[0], 3, 3, 6, 8), model_of(prediction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = sample(model, z, sigmas, sampler, SEEDS)
    assert together.shape == z.shape and torch.isfinite(together).all()
    assert torch.equal(together, sample(model, z, sigmas, sampler, SEEDS))
    alone = torch.cat([sample(model, z[i : i + 1], sigmas, sampler, SEEDS[i : i + 1]) for i in range(3)])
    if sampler == "dpm_adaptive":  # k-diffusion chooses its steps by the whole batch's error
        torch.testing.assert_close(together, alone, rtol=0, atol=0.05)
    else:
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_follow_the_seed_of_each_image(sampler: str) -> None:
    sigmas = get_sigmas("karras", 8, "eps")
    z, model = start(sigmas[0], 1, 3, 6, 8).repeat(3, 1, 1, 1), model_of("eps")
    one, other, same = sample(model, z, sigmas, sampler, (5, 6, 5))
    assert torch.equal(one, same) and (one - other).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [s for s in STOCHASTIC if "sde" not in s])
def test_stochastic_samplers_do_not_use_the_draw_that_made_z_again(sampler: str) -> None:
    """With draw 0 as z, the first added noise would be z itself: the two must be uncorrelated (six standard errors)."""
    sigmas, seen = torch.tensor([10.0, 1.0, 0.0]), []
    shape = (3, 64, 64)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(9))[None]
    sample(lambda x, s: seen.append(x) or torch.zeros_like(x), z * 10, sigmas, sampler, (9,))
    added = seen[-1] - seen[-1].mean()
    down = kd.get_ancestral_step(sigmas[0], sigmas[1])[0]
    rest = added - down * z  # what is left after the deterministic part of the step, D = 0
    correlation = (rest * z).mean() / rest.square().mean().sqrt()
    assert abs(correlation) < 6 / z.numel() ** 0.5


@predictions
@pytest.mark.parametrize("sampler", FIXED_STEP)
def test_deterministic_samplers_converge_to_the_closed_form(sampler: str, prediction: str) -> None:
    """Twice the steps, 2^order less error (within a quarter of an order), down the whole range in float64."""
    model, errors = model_of(prediction), []
    for steps in (40, 80, 160):
        sigmas = get_sigmas("karras", steps, prediction).double()[:-1]  # to the last level, where the ODE ends
        z = start(sigmas[0], 2, 3, 6, 8)
        truth = model.solve(z, sigmas[0], sigmas[-1])
        errors.append((sample(model, z, sigmas, sampler, SEEDS[:2]) - truth).square().mean().sqrt().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert min(orders) > ORDER[sampler] - 0.25
    assert errors[-1] < (0.01 if ORDER[sampler] == 1 else 2e-4)


@predictions
def test_dpm_adaptive_converges_with_its_tolerance(prediction: str) -> None:
    """It takes no steps but a tolerance; ours is k-diffusion's default, 0.0078 absolute and 5 % relative."""
    model, sigmas = model_of(prediction), get_sigmas("karras", 20, prediction).double()[:-1]
    z = start(sigmas[0], 2, 3, 6, 8)
    truth, span = model.solve(z, sigmas[0], sigmas[-1]), (sigmas[-1].item(), sigmas[0].item())
    errors = [
        (kd.sample_dpm_adaptive(model, z, *span, rtol=t, atol=t, disable=True) - truth).abs().max().item()
        for t in (1e-2, 1e-3, 1e-4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3
    assert (sample(model, z, sigmas, "dpm_adaptive", SEEDS[:2]) - truth).square().mean().sqrt() < 0.05


SCHEDULES = [case for case in product(SCHEDULERS, PREDICTIONS) if case != ("vp", "flow")]


@pytest.mark.parametrize(("scheduler", "prediction"), SCHEDULES)
def test_every_schedule_leads_to_the_closed_form(scheduler: str, prediction: str) -> None:
    model, errors = model_of(prediction), []
    for steps in (40, 80, 160):
        sigmas = get_sigmas(scheduler, steps, prediction).double()[:-1]
        z = start(sigmas[0], 1, 3, 6, 8)
        truth = model.solve(z, sigmas[0], sigmas[-1])
        errors.append((sample(model, z, sigmas, "heun", SEEDS[:1]) - truth).abs().max().item())
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2 and errors[2] < 0.01


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_sample_the_prior(sampler: str) -> None:
    """Power over frequency against S, in octaves: six standard errors, plus 10 % for the finite steps."""
    count, side, steps = 8, 32, 160 if sampler == "euler_ancestral" else 40  # the one of first order
    model, sigmas = model_of("eps", side, side), get_sigmas("karras", steps, "eps")
    x = sample(model, start(sigmas[0], count, 3, side, side), sigmas, sampler, tuple(range(count)))
    axes = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]) / torch.tensor([[3.0], [2], [6]]).sqrt()
    waves = torch.fft.rfft2(torch.einsum("ij,bjhw->bihw", axes, x - model.mean), norm="ortho")
    ratio = (waves.abs().square() / model.power).mean((0, 1))
    f = (torch.fft.fftfreq(side, 1 / side)[:, None].square() + torch.arange(side // 2 + 1).square()).sqrt()
    for low in (0, 2, 4, 8):
        band = ratio[(f >= low) & (f < 2 * max(low, 1))]
        assert abs(band.mean() - 1) < 6 * (2 / (3 * count * len(band))) ** 0.5 + 0.1


def test_schedules_are_k_diffusions_and_end_in_zero() -> None:
    for prediction, scheduler in product(PREDICTIONS, ("karras", "exponential", "polyexponential")):
        low, high = sampling.SIGMA_RANGE[prediction]
        sigmas = get_sigmas(scheduler, 13, prediction)
        assert torch.equal(sigmas, getattr(kd, f"get_sigmas_{scheduler}")(13, low, high))
        assert len(sigmas) == 14 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        assert sigmas[0] == pytest.approx(high) and sigmas[-2] == pytest.approx(low)
    assert torch.equal(get_sigmas("vp", 13, "eps"), kd.get_sigmas_vp(13))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 10000])
def test_the_longest_and_shortest_schedules_descend_strictly(scheduler: str, steps: int) -> None:
    for prediction in PREDICTIONS if scheduler != "vp" else ("eps",):
        sigmas = get_sigmas(scheduler, steps, prediction)
        assert len(sigmas) == steps + 1 and (sigmas.diff() < 0).all() and sigmas[0] > 0


def test_vp_is_refused_on_flow() -> None:
    with pytest.raises(ValueError, match="^scheduler: 'vp'"):
        get_sigmas("vp", 20, "flow")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stochastic_samplers_are_refused_on_flow_only(sampler: str) -> None:
    check_sampler(sampler, "eps")
    if sampler not in STOCHASTIC:
        check_sampler(sampler, "flow")
        return
    with pytest.raises(ValueError, match=f"^sampler: '{sampler}' adds noise"):
        check_sampler(sampler, "flow")


# What is sampled behind the noise


def correlations(sampler: str, kind: str, end: int = 0) -> float:
    """The largest correlation between the noises that made z and those that sampling from it adds."""
    shape, steps, seed = (3, 48, 48), 8, 9
    plan = levels(get_sigmas("karras", steps, "eps"), end)
    made: list[Tensor] = []
    draws = SeededDraws((seed,), shape)
    *_, (_, z) = walk(torch.zeros(1, *shape), plan, lambda j: made.append(draws(j)) or made[-1], kind, "eps")
    settings = parse({"noise": kind, "sampler": sampler, "steps": steps, "end_at_step": end}, "cli")
    added: list[Tensor] = []
    own = sampling.function(sampler)

    def watched(*args: object, noise_sampler: Callable[..., Tensor], **options: object) -> Tensor:
        return own(*args, noise_sampler=lambda *at: added.append(noise_sampler(*at)) or added[-1], **options)

    watched.__signature__ = inspect.signature(own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "function", lambda _: watched)
        first = first_draw(settings, plan.schedule, plan.kept[-1])
        sample(lambda x, s: 0 * x, z, plan.schedule[end:], sampler, (seed,), first)
    assert len(made) == (1 if kind == "shared" else steps - end) and len(added) >= steps - end - 1
    unit = [torch.stack([t.flatten() / t.norm() for t in ts]) for ts in (made, added)]
    return float((unit[0] @ unit[1].T).abs().max())


@pytest.mark.parametrize("end", [0, 3])
@pytest.mark.parametrize("kind", ["shared", "independent", "path"])
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_sampling_uses_no_noise_that_made_z(sampler: str, kind: str, end: int) -> None:
    """Six standard errors of a correlation; the draws themselves would have 1."""
    assert correlations(sampler, kind, end) < 6 / (3 * 48 * 48) ** 0.5
