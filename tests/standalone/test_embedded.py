r"""Embedded models against independent truths: dense linear algebra, numerical integration, brute-force Bayes.

Nothing here uses the code's own Fourier form: the Gaussian prior's covariance is built as a matrix from
its definition, cosine by cosine, and the posterior mean is that of a linear Gaussian model in float64.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from lib_unsampler.settings import MODELS
from lib_unsampler.standalone.embedded import (
    LABELS,
    GaussianPrior,
    MixturePrior,
    anchor_mixture,
    guided,
    label_picture,
    make_model,
    masked,
    pink_power,
)

VARIANCES = (0.5, 0.06, 0.01)
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
SIZES = [(4, 5), (3, 4), (1, 1)]
LEVELS = {"eps": (14.6, 1.3, 0.4, 0.03), "flow": (1.0, 0.7, 0.4, 0.03)}


def frequencies(n: int) -> list[int]:
    return [k if k <= n // 2 else k - n for k in range(n)]


def dense_covariance(height: int, width: int) -> np.ndarray:
    """Pixels' covariance over (channel, row, column): opponent axes times a sum of cosines over 1 / (1 + f^2)."""
    waves = list(product(frequencies(height), frequencies(width)))
    power = np.array([1 / (1 + v**2 + u**2) for v, u in waves])
    power /= power.mean()
    at = list(product(range(height), range(width)))
    space = np.zeros((len(at), len(at)))
    for (v, u), s in zip(waves, power):
        phase = np.array([2 * np.pi * (v * y / height + u * x / width) for y, x in at])
        space += s * np.cos(phase[:, None] - phase[None, :]) / len(at)
    colour = OPPONENT.T @ np.diag(VARIANCES) @ OPPONENT
    return np.kron(colour, space)


def signal(sigma: float, prediction: str) -> float:
    return 1 - sigma if prediction == "flow" else 1.0


def posterior_mean(z: np.ndarray, sigma: float, mean: np.ndarray, cov: np.ndarray, prediction: str) -> np.ndarray:
    """E[x | z = a x + s n] of x ~ N(mean, cov), by the formula of linear Gaussian models."""
    a = signal(sigma, prediction)
    evidence = a**2 * cov + sigma**2 * np.eye(len(cov))
    return mean + a * cov @ np.linalg.solve(evidence, z - a * mean)


def prior(height: int, width: int, prediction: str) -> GaussianPrior:
    mean, power = label_picture("sunset", height, width), pink_power(height, width)
    return GaussianPrior(mean.double(), power.double(), prediction)


def noisy(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["eps", "flow"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gaussian_denoiser_is_the_posterior_mean(size: tuple[int, int], prediction: str) -> None:
    model, z, cov = prior(*size, prediction), noisy(*size), dense_covariance(*size)
    mean = model.mean.numpy().ravel()
    for s in LEVELS[prediction]:
        got = model(z, torch.full((2,), s, dtype=torch.float64))
        truth = [posterior_mean(image.numpy().ravel(), s, mean, cov, prediction) for image in z]
        np.testing.assert_allclose(got.numpy().reshape(2, -1), truth, rtol=0, atol=2e-6)  # pink_power is float32


def test_the_priors_pixels_have_the_asked_variances() -> None:
    cov = np.kron(OPPONENT, np.eye(20)) @ dense_covariance(4, 5) @ np.kron(OPPONENT, np.eye(20)).T
    np.testing.assert_allclose(np.diag(cov).reshape(3, 20), np.repeat(np.array([VARIANCES]).T, 20, 1), rtol=1e-12)
    power = pink_power(64, 48)
    full = torch.fft.fft2(torch.fft.irfft2(power, s=(64, 48))).real  # the half spectrum, whole again
    torch.testing.assert_close(full.mean((1, 2)), torch.tensor(VARIANCES), rtol=1e-5, atol=0)


def test_a_sigma_per_image() -> None:
    model, z = prior(4, 5, "eps"), noisy(4, 5)
    both = model(z, torch.tensor([3.0, 0.2]))
    for i, s in enumerate((3.0, 0.2)):
        torch.testing.assert_close(both[i : i + 1], model(z[i : i + 1], torch.tensor([s])))


@pytest.mark.parametrize("prediction", ["eps", "flow"])
@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
def test_solve_is_the_ode_integrated_numerically(prediction: str, up: bool) -> None:
    """dz / ds = (z - D(z; s)) / s with the dense posterior mean (on flow the velocity n - x is the same thing)."""
    size = (3, 4)
    model, cov = prior(*size, prediction), dense_covariance(*size)
    mean = model.mean.numpy().ravel()
    start, end = (LEVELS[prediction][0], LEVELS[prediction][-1])[:: -1 if up else 1]
    z = noisy(*size, count=1) * start

    def slope(s: float, state: np.ndarray) -> np.ndarray:
        return (state - posterior_mean(state, s, mean, cov, prediction)) / s

    truth = solve_ivp(slope, (start, end), z.numpy().ravel(), "DOP853", rtol=1e-9, atol=1e-10).y[:, -1]
    got = model.solve(z, *torch.tensor([start, end], dtype=torch.float64))
    np.testing.assert_allclose(got.numpy().ravel(), truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_solve_composes_and_goes_back(prediction: str) -> None:
    model, z = prior(4, 5, prediction), noisy(4, 5)
    high, middle, low, _ = (torch.tensor(s, dtype=torch.float64) for s in LEVELS[prediction])
    there = model.solve(z, high, low)
    torch.testing.assert_close(model.solve(model.solve(z, high, middle), middle, low), there, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.solve(there, low, high), z, rtol=0, atol=1e-5)


def test_solve_to_clean_makes_samples_of_the_prior() -> None:
    """Pure noise on flow, carried to sigma 0, has the prior's mean and covariance (six standard errors)."""
    size, count = (3, 4), 20_000
    model, cov = prior(*size, "flow"), dense_covariance(*size)
    x = model.solve(noisy(*size, count), torch.ones(()).double(), torch.zeros(()).double()).flatten(1).numpy()
    spread = np.sqrt(np.diag(cov))
    assert (np.abs(x.mean(0) - model.mean.numpy().ravel()) < 6 * spread / count**0.5).all()
    error = np.sqrt((cov**2 + np.outer(spread, spread) ** 2) / count)
    assert (np.abs(np.cov(x.T) - cov) < 6 * error).all()


def test_mixture_is_brute_force_bayes() -> None:
    """E[x | z] by quadrature over x on a fine grid, in one dimension."""
    means, variance = torch.tensor([[-2.0], [0.3], [1.1]], dtype=torch.float64), 0.2
    model, x = MixturePrior(means, variance), np.linspace(-12, 12, 40_001)
    density = sum(np.exp(-((x - m) ** 2) / (2 * variance)) for m in means.numpy().ravel())
    for s in (0.05, 0.5, 3.0, 15.0):
        for z in (-3.0, -0.8, 0.7, 4.0):
            weight = density * np.exp(-((z - x) ** 2) / (2 * s**2))
            got = model(torch.full((1, 1), z, dtype=torch.float64), torch.full((1,), s, dtype=torch.float64)).item()
            assert got == pytest.approx((x * weight).sum() / weight.sum(), abs=1e-9)


@pytest.mark.parametrize("sigma", [0.03, 0.5, 14.6])
def test_anchor_mixture_obeys_tweedies_formula(sigma: float) -> None:
    r""":math:`D = z + s^2 \nabla \log p(z; s)`, p from torch.distributions, for DESIGN 4's mixture."""
    means = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 16)))
    z = (torch.from_numpy(np.random.default_rng(1).normal(size=(5, 16))) * (1 + sigma)).requires_grad_()
    total = torch.full((6, 16), 0.35**2 + sigma**2, dtype=torch.float64).sqrt()
    parts = torch.distributions.Independent(torch.distributions.Normal(means, total), 1)
    even = torch.distributions.Categorical(torch.ones(6, dtype=torch.float64))
    log_p = torch.distributions.MixtureSameFamily(even, parts).log_prob(z).sum()
    truth = z + sigma**2 * torch.autograd.grad(log_p, z)[0]
    got = anchor_mixture()(z.detach(), torch.full((5,), sigma, dtype=torch.float64))
    torch.testing.assert_close(got, truth.detach(), rtol=1e-9, atol=1e-9)


def test_picture_mixture_finds_the_component_and_mixes_all() -> None:
    model = make_model("mixture", "", 6, 5)
    names = [k for k in LABELS if k]
    pictures = torch.stack([label_picture(k, 6, 5) for k in names])
    near = model(pictures, torch.full((len(names),), 0.01))
    torch.testing.assert_close(near, pictures, rtol=0, atol=0.01)
    far = model(pictures, torch.full((len(names),), 1e4))
    torch.testing.assert_close(far, pictures.mean(0).expand_as(far), rtol=0, atol=1e-3)
    only = make_model("mixture", "sea", 6, 5)(pictures, torch.full((len(names),), 1e4))
    torch.testing.assert_close(only, label_picture("sea", 6, 5).expand_as(only), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 100.0])
def test_guidance_has_its_closed_form(scale: float) -> None:
    r"""Two Gaussian priors that differ in mean: :math:`D = D_- + c (1 - g)(\mu_+ - \mu_-)`, g the posterior gain."""
    sea, snow = (make_model("gaussian", p, 4, 5) for p in ("sea", "snow"))
    z, sigma = noisy(4, 5).float(), torch.tensor([2.0, 0.3])
    got = guided(sea, snow, scale)(z, sigma).double()
    cov = dense_covariance(4, 5)
    for i, s in enumerate(sigma.double().tolist()):
        image = z[i].double().numpy().ravel()
        ends = [posterior_mean(image, s, m.mean.double().numpy().ravel(), cov, "eps") for m in (snow, sea)]
        truth = ends[0] + scale * (ends[1] - ends[0])
        np.testing.assert_allclose(got[i].numpy().ravel(), truth, rtol=1e-5, atol=1e-5 * (1 + scale))


def test_guidance_at_one_never_calls_the_negative() -> None:
    sea = make_model("gaussian", "sea", 4, 5)
    assert guided(sea, lambda z, s: pytest.fail("called"), 1.0) is sea


def test_masked_denoiser_is_the_source_outside() -> None:
    sea, z, source = make_model("gaussian", "sea", 4, 5), noisy(4, 5).float(), torch.rand(2, 3, 4, 5)
    mask, sigma = (torch.arange(20).reshape(1, 1, 4, 5) % 2).float(), torch.ones(2)
    got, inside = masked(sea, source, mask)(z, sigma), mask.bool().expand_as(z)
    assert torch.equal(got[~inside], source[~inside]) and torch.equal(got[inside], sea(z, sigma)[inside])


@pytest.mark.parametrize("label", list(LABELS))
def test_prompts_are_gradients_between_their_two_colours(label: str) -> None:
    top, bottom = (torch.tensor(c) for c in LABELS[label])
    picture = label_picture(f" {label.upper()} ", 7, 3)
    assert picture.shape == (3, 7, 3) and picture.abs().max() <= 1
    torch.testing.assert_close(picture[:, 0, 1], top)
    torch.testing.assert_close(picture[:, -1, 2], bottom)
    torch.testing.assert_close(picture[:, 3, 0], (top + bottom) / 2)


@pytest.mark.parametrize("model", MODELS)
def test_unknown_prompts_are_named_with_the_known_ones(model: str) -> None:
    with pytest.raises(ValueError, match="'zebra' is not a prompt of the embedded models .*'sea'.*'snow'"):
        make_model(model, "zebra", 4, 4)
