"""Times of frames: nothing drifts, log sigma is proportional, the order is a film's."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_unsampler.pictures.timing import SHORTEST, Ticks, Timing, even, log_sigma


def ticks(durations: list[float], per_second: int) -> list[int]:
    made = Ticks(per_second)
    return [made.next(seconds) for seconds in durations]


@pytest.mark.parametrize("per_second", [100, 1000])
@given(durations=st.lists(st.floats(0.03, 60), max_size=200))
def test_ticks_never_drift(per_second: int, durations: list[float]) -> None:
    """Every frame starts within half a tick of its true time."""
    ends = list(accumulate(ticks(durations, per_second)))
    assert all(abs(end - per_second * true) <= 0.5 + 1e-6 for end, true in zip(ends, accumulate(durations)))
    assert len(ends) == len(durations)


def test_thirtieths_of_a_second_alternate() -> None:
    assert ticks([1 / 30] * 6, 100) == [3, 4, 3, 3, 4, 3] and sum(ticks([1 / 30] * 900, 100)) == 3000


def test_no_frame_is_shorter_than_browsers_play() -> None:
    assert ticks([0.001, 0.0, 0.02], 100) == [2, 2, 2]
    assert Timing([0.001, 5.0]).shown(2) == [(0, SHORTEST), (1, 5.0)]


def test_equal_ratios_of_sigma_take_equal_times() -> None:
    assert log_sigma([0.0, *(0.1 * 2**i for i in range(8))], 0.2) == pytest.approx([0.2] * 9)


def test_times_are_the_steps_in_log_sigma() -> None:
    sigmas = [1.0, math.e, math.e**4]  # steps 1 and 3: shares 1, 2, 3
    assert log_sigma(sigmas, 0.5) == pytest.approx([0.25, 0.5, 0.75])
    assert log_sigma([0.0, *sigmas], 0.5) == pytest.approx([0.5, 0.25, 0.5, 0.75])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50), st.booleans(), st.floats(0.02, 60))
def test_log_sigma_keeps_the_whole_time(sigmas: list[float], clean: bool, duration: float) -> None:
    rising = [0.0] * clean + sorted(sigmas)
    times = log_sigma(rising, duration)
    assert len(times) == len(rising) and all(t >= 0 for t in times)
    assert sum(times) == pytest.approx(sum(even(rising, duration)))


@given(st.lists(st.floats(0.02, 9), min_size=1, max_size=20), st.booleans(), st.booleans(), st.data())
def test_shown_frames(durations: list[float], reverse: bool, ping_pong: bool, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(durations)))
    shown = Timing(durations, 1.5, 2.5, reverse, ping_pong).shown(count)
    there = shown[:count]
    assert [frame for frame, _ in there] == list(range(count))[:: -1 if reverse else 1]
    assert sum(s for _, s in there) == pytest.approx(sum(durations[:count]) + 4)
    assert max(s for _, s in shown) <= Timing(durations, 1.5, 2.5).longest()
    assert shown[count:] == (there[-2:0:-1] if ping_pong else [])


@pytest.mark.parametrize("count", [0, 3])
def test_no_frames_or_too_many_have_no_times(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} frames for 2 durations"):
        Timing([0.1, 0.1]).shown(count)
