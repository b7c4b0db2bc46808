"""Work on threads: results in order, bounded, errors raised, nothing running on."""

from __future__ import annotations

import threading
import time

import pytest

from lib_unsampler.background import HELD, Background


def test_results_come_in_order_in_the_asking_thread() -> None:
    found: list[tuple[int, bool]] = []
    main = threading.current_thread()
    with Background(3) as background:
        for i in range(40):
            work = lambda i=i: (time.sleep(0.002 * (i % 3)), i)[1]  # noqa: E731
            background.submit(1, lambda i: found.append((i, threading.current_thread() is main)), work)
        background.finish()
    assert found == [(i, True) for i in range(40)]


@pytest.mark.parametrize(("size", "most"), [(1, 4), (HELD // 2, 2), (HELD + 1, 1)])
def test_only_so_much_waits(size: int, most: int) -> None:
    asked, done, ahead = 0, 0, []

    def then(_: object) -> None:
        nonlocal done
        done += 1

    with Background(2) as background:
        for _ in range(20):
            asked += 1
            background.submit(size, then, int)
            ahead.append(asked - done)
        background.finish()
    assert max(ahead) == most and done == 20


def test_two_pieces_run_at_once() -> None:
    meeting = threading.Barrier(2, timeout=10)  # broken unless both are there
    with Background(2) as background:
        for _ in range(2):
            background.submit(1, lambda _: None, meeting.wait)
        background.finish()


def test_an_error_is_raised_and_the_rest_is_dropped() -> None:
    ran = []
    with pytest.raises(ZeroDivisionError), Background(1) as background:
        background.submit(1, lambda _: None, lambda: 1 / 0)
        for i in range(9):
            background.submit(1, lambda _: None, ran.append, i)
        background.finish()
    assert len(ran) < 9 and not [t for t in threading.enumerate() if t.name.startswith("unsampler")]
