"""Anderson's iteration on systems whose answer is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_unsampler.core.fixedpoint import Sample, Solver, inner_products
from lib_unsampler.core.pairs import MEMORY, turned, weights


@pytest.mark.parametrize("size", [1, 4])
def test_as_many_pairs_as_dimensions_solve_a_linear_system(size: int) -> None:
    """F(x) = A x - b: MEMORY + 1 evaluations give MEMORY pairs, which span the space, so the next x has no F."""
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(size, MEMORY, MEMORY, generator=generator).double()
    a = torch.eye(MEMORY).double() + 0.3 * (a + a.mT) / 2
    b = torch.randn(size, MEMORY, generator=generator).double()
    evaluations = 0

    def evaluate(x: Tensor, force: Tensor, images: list[int]) -> tuple[Tensor, int]:
        nonlocal evaluations
        evaluations += 1
        force.copy_((a[images] @ x[..., None])[..., 0] - b[images])
        return x.clone(), 1

    solver = Solver(torch.zeros(size, MEMORY).double(), 1e-9, 40)
    solved = solver.solve(evaluate, Tensor.zero_, 2.0, 1.0, 1.0)
    assert evaluations <= MEMORY + 2 and (solved.residual <= 1e-9).all()
    torch.testing.assert_close(solved.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-7)


@given(
    variance=st.floats(1e-3, 1e3), sigma=st.floats(1e-2, 1e2), to_sigma=st.floats(1e-2, 1e2), third=st.floats(1e-2, 1e2)
)
def test_a_jacobian_turns_as_a_gaussian_prior_s(variance: float, sigma: float, to_sigma: float, third: float) -> None:
    """By v / (v + t^2) over v / (v + s^2), and by two turns as by one."""
    slope, there = (variance / (variance + s**2) for s in (sigma, to_sigma))
    assert slope * turned(slope, sigma, to_sigma) == pytest.approx(there, rel=1e-6)
    by_two = turned(slope, sigma, to_sigma) * turned(there, to_sigma, third)
    assert by_two == pytest.approx(turned(slope, sigma, third), rel=1e-6)
    assert turned(1.0, sigma, to_sigma) == 1 and turned(0.0, sigma, to_sigma) == pytest.approx((sigma / to_sigma) ** 2)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5), nothing=st.integers(0, 31))
def test_the_weights_are_those_of_least_squares(seed: int, count: int, nothing: int) -> None:
    """Of some vectors, and of others that are nothing, which take no part."""
    random = np.random.default_rng(seed)
    y, f = random.normal(size=(count, 8)), random.normal(size=8)
    known = np.array([not nothing >> k & 1 for k in range(count)])
    y[~known] = 0
    found = np.array(weights((y @ y.T).tolist(), (y @ f).tolist(), 1 + 1e-14))
    assert (found[~known] == 0).all()
    np.testing.assert_allclose(found[known], np.linalg.lstsq(y[known].T, f, rcond=None)[0], rtol=1e-6, atol=1e-6)


def test_vectors_that_are_one_share_its_weight() -> None:
    """The ridge makes it so; without one the first has it all."""
    alike = [[4.0] * 3] * 3
    assert weights(alike, [2.0] * 3, 1 + 1e-9) == pytest.approx([0.5 / 3] * 3, rel=1e-5)
    assert weights(alike, [2.0] * 3, 1.0) == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("values", [1, 63, 64, 105, 8192, 20000, 65536])
def test_a_sample_is_of_the_vector_and_its_parts_add_up(values: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(3 * 2 * values, dtype=torch.float64, device=device).view(3, 2, values) / values
    sample = Sample(values, 4096)
    taken = sample.of(x)
    assert taken.shape == (3, 2, *sample.shape) and math.prod(sample.shape) == sample.size <= 2 * 4096
    assert torch.isin(taken[1, 1].flatten(), x[1, 1]).all() and taken[1, 1].unique().numel() == sample.size
    flat = taken.flatten(2).transpose(0, 1)
    torch.testing.assert_close(inner_products(taken.flatten(2), taken.flatten(2)[:2]), flat @ flat[:, :2].mT)
