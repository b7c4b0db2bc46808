"""Equal values have one fingerprint, and any change gives another."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_unsampler.core.fingerprint import fingerprint

Pair = namedtuple("Pair", "a b")
PICTURE = Image.new("RGB", (4, 4), "red")


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (lambda: 1, lambda: 1.0),
        (lambda: 1, lambda: True),
        (lambda: "1", lambda: 1),
        (lambda: None, lambda: 0),
        (lambda: [1, [2]], lambda: [[1], 2]),
        (lambda: ["ab", "c"], lambda: ["a", "bc"]),
        (lambda: {"a": 1, "b": 2}, lambda: {"a": 2, "b": 1}),
        (lambda: torch.arange(4.0), lambda: torch.arange(4.0).reshape(2, 2)),
        (lambda: torch.zeros(2), lambda: torch.zeros(2, dtype=torch.bfloat16)),
        (lambda: torch.ones(2, dtype=torch.bfloat16), lambda: torch.zeros(2, dtype=torch.bfloat16)),
        (lambda: torch.zeros(0, 4), lambda: torch.zeros(0, 5)),
        (lambda: torch.tensor(1.0), lambda: torch.tensor(2.0)),
        (lambda: np.arange(3), lambda: np.arange(3) + 1),
        (lambda: PICTURE.copy(), lambda: PICTURE.transpose(Image.Transpose.ROTATE_90).crop((0, 0, 4, 3))),
        (lambda: SimpleNamespace(x=[torch.ones(1)]), lambda: SimpleNamespace(x=[torch.zeros(1)])),
        (lambda: Pair(1, torch.ones(2)), lambda: Pair(1, torch.zeros(2))),
        (lambda: {"b", "a"}, lambda: {"a"}),
    ],
)
def test_equal_values_and_only_they_are_equal(make: Any, other: Any) -> None:
    assert fingerprint(make()) == fingerprint(make())
    assert fingerprint(make()) != fingerprint(other())


def test_order_of_a_mapping_does_not_matter() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_one_changed_pixel_or_number_is_seen() -> None:
    changed = PICTURE.copy()
    changed.putpixel((3, 3), (254, 0, 0))
    assert fingerprint(PICTURE) != fingerprint(changed)
    x = torch.zeros(3, 5)
    y = x.clone()
    y[2, 4] = 1e-30
    assert fingerprint(x) != fingerprint(y) and fingerprint(x.t()) != fingerprint(x)


def test_what_cannot_be_looked_into_never_equals_anything() -> None:
    hidden = object()
    assert fingerprint(hidden) != fingerprint(hidden)
    loop: list[Any] = []
    loop.append(loop)
    assert fingerprint(loop) != fingerprint(loop)
    assert fingerprint(fingerprint) == fingerprint(fingerprint) != fingerprint(pytest.raises)
