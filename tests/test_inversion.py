"""Inversion against closed forms: the Gaussian prior's probability-flow ODE, and states whose noise is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_unsampler.embedded import GaussianPrior, anchor_mixture, make_model
from lib_unsampler.inversion import CALLS, EXACT, KIN, InversionError, Level, invert, kin
from lib_unsampler.sampling import get_sigmas, kd
from lib_unsampler.schedule import Levels, levels
from lib_unsampler.settings import SAMPLERS

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


def test_exact_euler_finds_the_anchors_noise_in_few_calls() -> None:
    model, sigmas, x, y = anchor()
    walk = Levels(sigmas, tuple(range(18, -1, -1)), tuple(range(18, -1, -1)))
    walked = inverted(plain(model), y, walk, "exact", tolerance=1e-7)
    assert rms(walked[-1].z - x).mean() <= 1e-5
    assert torch.stack([level.calls for level in walked]).double().mean() <= 3.5
    assert all(level.converged.all() for level in walked)


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
