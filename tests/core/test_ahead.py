"""Draws made ahead are the draws, made while the one before is in use, and no more of them than wanted."""

from __future__ import annotations

from threading import Event, get_ident

import pytest
import torch
from torch import Tensor

from lib_unsampler.core.ahead import MOST, Ahead
from lib_unsampler.core.noising import SeededDraws

SHAPE, CPU = (4, 8, 8), torch.device("cpu")


@pytest.mark.parametrize("asked", [(0, 1, 2, 3, 4), (1, 3, 4), (0, 4), (2, 3)])
def test_they_are_the_draws(asked: tuple[int, ...]) -> None:
    ahead, plain = Ahead(SeededDraws((1, 2), SHAPE), 4, CPU), SeededDraws((1, 2), SHAPE)
    assert all(torch.equal(ahead(j), plain(j)) for j in asked)


def test_the_next_are_made_while_one_is_in_use() -> None:
    made, threads = {j: Event() for j in range(2, 3 + MOST)}, set()

    def draw(j: int) -> Tensor:
        if j in made:
            made[j].set()
            threads.add(get_ident())
        return torch.full((1,), float(j))

    ahead = Ahead(draw, 9, CPU)
    assert ahead(0) == 0 and ahead(1) == 1
    assert made[1 + MOST].wait(10) and not made[2 + MOST].is_set()  # nobody has asked for 2
    assert ahead(2) == 2 and made[2 + MOST].wait(10) and get_ident() not in threads


def test_nothing_is_drawn_behind_the_last_nor_for_who_wants_the_first_alone() -> None:
    drawn: list[int] = []

    def draw(j: int) -> Tensor:
        drawn.append(j)
        return torch.zeros(1)

    ahead = Ahead(draw, 2, CPU)
    ahead(0)
    assert drawn == [0]
    ahead(1), ahead(2)
    assert drawn == [0, 1, 2]


def test_an_error_reaches_who_asks() -> None:
    def draw(j: int) -> Tensor:
        if j == 2:
            raise RuntimeError("out of noise")
        return torch.zeros(1)

    ahead = Ahead(draw, 5, CPU)
    ahead(1)
    with pytest.raises(RuntimeError, match="out of noise"):
        ahead(2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_they_are_the_draws_however_busy_it_is() -> None:
    device = torch.device("cuda")
    ahead, plain = (SeededDraws((1, 2), (4, 128, 128), device) for _ in range(2))
    drawn, work = Ahead(ahead, 9, device), torch.randn(4096, 4096, device=device)
    found = []
    for j in range(10):
        found.append(drawn(j) + 0)
        work = (work @ work).clamp(-1, 1)
    assert all(torch.equal(made, plain(j)) for j, made in enumerate(found))
