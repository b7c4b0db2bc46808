"""Work on threads: results in order, bounded, errors raised, nothing running on."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from lib_unsampler.pictures.background import HELD, Background


def test_results_are_handed_on_in_order_and_one_at_a_time() -> None:
    found: list[int] = []
    alone = threading.Lock()

    def then(i: int) -> None:
        assert alone.acquire(blocking=False)
        time.sleep(0.001)
        found.append(i)
        alone.release()

    with Background(3) as background:
        for i in range(40):
            background.submit(1, then, lambda i=i: (time.sleep(0.002 * (i % 3)), i)[1])
        background.finish()
        assert found == list(range(40))


@pytest.mark.parametrize(("size", "most"), [(1, 4), (HELD // 2, 2), (HELD + 1, 1)])
def test_only_so_much_waits(size: int, most: int) -> None:
    gate, asked = threading.Event(), []

    with Background(2) as background:

        def ask() -> None:
            for i in range(20):
                background.submit(size, lambda _: None, gate.wait)
                asked.append(i)

        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 10
        while len(asked) < most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(asked) == most
        gate.set()
        asking.join(10)
        background.finish()
    assert len(asked) == 20


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


def test_an_error_while_handing_on_is_raised_too() -> None:
    found = []

    def then(i: int) -> None:
        found.append(i)
        if i == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Background(2) as background:
        for i in range(9):
            background.submit(1, then, lambda i=i: i)
        background.finish()
    assert found == [0, 1, 2]


def test_after_an_error_nothing_is_handed_on() -> None:
    gate, found = threading.Event(), []
    with pytest.raises(ZeroDivisionError), Background(2) as background:
        background.submit(1, found.append, gate.wait)
        try:
            background.submit(1, found.append, lambda: 1 / 0)
            background.finish()
        finally:
            gate.set()
    assert found == []


class Held:
    """Something that a failing call has at hand."""


def test_an_error_is_raised_once_and_what_it_held_is_free() -> None:
    """Its traceback leads to every call's objects: kept, they would wait for a collection of cycles."""
    seen: list[weakref.ref[Held]] = []

    def fail() -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise ZeroDivisionError

    def run() -> None:
        with Background(2) as background:
            try:
                background.submit(1, print, fail)
                background.finish()
            finally:
                with pytest.raises(RuntimeError, match="earlier work has failed"):
                    background.finish()

    gc.collect()
    gc.disable()
    try:
        try:
            run()
        except ZeroDivisionError:
            assert seen[0]() is not None
        assert seen[0]() is None
    finally:
        gc.enable()
