"""Levels: the hand-off level is always there, thinning counts from it, and any descending schedule does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_unsampler.core.schedule import levels

SIGMAS = st.lists(st.floats(0.0009765625, 160.0, width=32), min_size=1, max_size=40)


def descending(values: list[float], final_zero: bool) -> torch.Tensor:
    return torch.tensor(sorted(values, reverse=True) + [0.0] * final_zero)


@settings(deadline=None)
@given(SIGMAS, st.booleans(), st.integers(0, 60), st.integers(1, 60))
def test_the_walk_of_any_descending_schedule(values: list[float], zero: bool, end: int, increment: int) -> None:
    plan, n = levels(descending(values, zero), end, increment), len(values)
    e = min(end, n - 1)
    assert plan.schedule.tolist() == [*sorted(values, reverse=True), 0.0]
    assert plan.visited == tuple(range(n - 1, e - 1, -1))
    assert plan.kept == tuple(i for i in plan.visited if (i - e) % increment == 0)
    assert plan.kept[-1] == e and plan.sigmas[-1] == plan.schedule[e] > 0
    assert (plan.sigmas.diff() >= 0).all()
    assert [plan.draw_index(i) for i in range(n - 1, -1, -1)] == list(range(n))


def test_whole_walk_is_the_original_nodes() -> None:
    plan = levels(torch.tensor([14.6, 7.0, 2.0, 0.3, 0.0]))
    assert plan.sigmas.tolist() == pytest.approx([0.3, 2.0, 7.0, 14.6])
    assert plan.kept == plan.visited == (3, 2, 1, 0)


def test_increment_counts_down_from_the_noisiest() -> None:
    assert levels(torch.arange(10.0, -1, -1), 2, 3).kept == (8, 5, 2)
    assert levels(torch.arange(10.0, -1, -1), 0, 10000).kept == (0,)


@pytest.mark.parametrize("end", [9, 10, 11, 10000])
def test_end_at_step_is_clamped_so_that_a_noisy_level_remains(end: int) -> None:
    assert levels(torch.arange(10.0, -1, -1), end).kept == (9,)


def test_repeated_sigmas_are_levels_of_their_own() -> None:
    plan = levels(torch.tensor([5.0, 2.0, 2.0, 1.0, 0.0]))
    assert plan.kept == (3, 2, 1, 0) and plan.sigmas.tolist() == [1, 2, 2, 5]


def test_a_repeated_final_zero_is_no_noise_level() -> None:
    plan = levels(torch.tensor([3.0, 1.0, 0.0, 0.0]), 3)
    assert plan.kept == plan.visited == (1,) and plan.draw_index(1) == 1


def test_a_whole_schedule_ends_where_it_ends() -> None:
    """KL Optimal: n + 1 sigmas, the last above 0; nothing is appended."""
    plan = levels(torch.tensor([14.6, 3.0, 0.5, 0.03]), whole=True)
    assert plan.schedule.tolist() == pytest.approx([14.6, 3.0, 0.5, 0.03])
    assert plan.kept == plan.visited == (2, 1, 0) and plan.draw_index(2) == 0
    assert levels(torch.tensor([14.6, 3.0, 0.03, 0.03]), whole=True).visited == (1, 0)
    assert levels(torch.tensor([3.0, 1.0, 0.0]), whole=True).visited == (1, 0)
    for flat in ([1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="schedule: it has no sigma above its end"):
            levels(torch.tensor(flat), whole=True)


def test_flow_starts_at_one_and_other_dtypes_are_read() -> None:
    plan = levels(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert plan.schedule.dtype == torch.float32 and plan.sigmas.tolist() == [0.5, 1.0]
    assert levels([1.0, 0.5]).schedule.tolist() == [1.0, 0.5, 0.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sigmas", "said"),
    [
        ([], "finite"),
        ([math.nan, 0.0], "finite"),
        ([math.inf, 1.0, 0.0], "finite"),
        ([1.0, -1.0], "finite"),
        ([0.0], "no sigma above 0"),
        ([0.0, 0.0], "no sigma above 0"),
        ([1.0, 2.0, 0.0], "does not descend"),
        ([0.0, 1.0], "does not descend"),
    ],
)
def test_bad_schedules_are_named(sigmas: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=f"^schedule: .*{said}"):
        levels(torch.tensor(sigmas))


@pytest.mark.parametrize(("end", "increment"), [(-1, 1), (0, 0), (0, -3)])
def test_bad_walks_are_refused(end: int, increment: int) -> None:
    with pytest.raises(ValueError, match="end_at_step"):
        levels(torch.tensor([1.0, 0.0]), end, increment)
