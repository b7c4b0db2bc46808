"""The NV noise source: the paper's vectors, an independent reference, the real host, the normal law."""

from __future__ import annotations

import importlib.util
import os
from math import erf, log, pi, sin, sqrt
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lib_unsampler.core.philox import WORD, PhiloxDraws, box_muller, philox

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
devices = pytest.mark.parametrize("device", DEVICES)

# Known answers for philox4x32-10 published with the paper (Random123, tests/kat_vectors).
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 of one block in Python integers, written from the paper (its L, R pairs)."""
    l0, r0, l1, r1 = counter[1], counter[0], counter[3], counter[2]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * r0, 0xCD9E8D57 * r1
        r0, l0, r1, l1 = p1 // 2**32 ^ k0 ^ l0, p1 % 2**32, p0 // 2**32 ^ k1 ^ l1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [r0, l0, r1, l1]


def reference_normal(seed: int, draw: int, element: int) -> float:
    x, y = reference_philox([draw, 0, element, 0], [seed % 2**32, seed >> 32])[:2]
    return sqrt(-2 * log((x + 0.5) / 2**32)) * sin(2 * pi * (y + 0.5) / 2**32)


@pytest.mark.parametrize(("counter", "key", "answer"), VECTORS)
@devices
def test_known_answers(counter: str, key: str, answer: str, device: str) -> None:
    assert reference_philox(words(counter), words(key)) == words(answer)
    blocks = [torch.tensor([word, 7], device=device) for word in words(counter)]
    found = philox(blocks, tuple(words(key)))
    assert [int(word[0]) for word in found] == words(answer)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 1234567890123, 2**64 - 1])
@pytest.mark.parametrize("draw", [0, 1, 19, 9999, WORD])
@devices
def test_draws_equal_an_independent_reference(seed: int, draw: int, device: str) -> None:
    found = PhiloxDraws((seed,), (2, 3, 4), device)(draw)
    expected = torch.tensor([reference_normal(seed, draw, e) for e in range(24)]).reshape(1, 2, 3, 4)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("x", [0, 1, 2**31 - 1, 2**31, 2**32 - 2**25, WORD - 1, WORD])
@pytest.mark.parametrize("y", [0, 2**30, 2**31 - 1, 2**31, 3 * 2**30, WORD])
@devices
def test_the_extremes_of_the_integer_range(x: int, y: int, device: str) -> None:
    found = box_muller(torch.tensor(x, device=device), torch.tensor(y, device=device))
    expected = sqrt(-2 * log((x + 0.5) / 2**32)) * sin(2 * pi * (y + 0.5) / 2**32)
    assert abs(float(found) - expected) <= 3e-6
    assert torch.isfinite(found)


def host_module() -> ModuleType:
    root = os.environ.get("A1111_DIR")
    if root is None:
        pytest.skip("A1111_DIR does not name a WebUI checkout")
    spec = importlib.util.spec_from_file_location("rng_philox", Path(root, "modules/rng_philox.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 1234567890123, 2**64 - 1])
def test_draws_are_the_hosts_bit_for_bit(seed: int) -> None:
    generator = host_module().Generator(seed)
    draws = PhiloxDraws((seed,), (4, 32, 48))
    for draw in range(5):
        assert np.array_equal(draws(draw)[0].numpy(), generator.randn((4, 32, 48)))


def test_the_hosts_transform_at_the_extremes() -> None:
    host = host_module()
    ends = np.array([0, 1, 2**31 - 1, 2**31, WORD - 1, WORD], dtype=np.uint32)
    x, y = (part.ravel() for part in np.meshgrid(ends, ends))
    found = box_muller(torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64)))
    np.testing.assert_allclose(found.numpy(), host.box_muller(x, y), rtol=0, atol=1e-6)


@devices
def test_the_draws_of_a_batch_are_those_of_single_runs(device: str) -> None:
    batch = PhiloxDraws((5, 2**40 + 5, 6), (3, 5, 7), device)(3)
    for image, seed in zip(batch, (5, 2**40 + 5, 6)):
        assert torch.equal(image, PhiloxDraws((seed,), (3, 5, 7), device)(3)[0])


@devices
def test_any_draw_can_be_asked_for_in_any_order(device: str) -> None:
    draws = PhiloxDraws((1,), (4, 8, 8), device)
    later, earlier = draws(7), draws(2)
    assert torch.equal(draws(7), later) and torch.equal(draws(2), earlier)
    assert not torch.equal(later, earlier)


def test_video_latents_and_negative_seeds() -> None:
    draws = PhiloxDraws((-1,), (2, 3, 4, 5))
    assert draws(0).shape == (1, 2, 3, 4, 5)
    assert torch.equal(draws(0), PhiloxDraws((2**64 - 1,), (2, 3, 4, 5))(0))


def kolmogorov(sample: torch.Tensor) -> float:
    """sqrt(N) times the largest distance from the normal distribution function."""
    values = sample.flatten().double().sort().values
    law = 0.5 * (1 + torch.erf(values / sqrt(2)))
    rank = torch.arange(1, len(values) + 1, device=values.device) / len(values)
    return float((rank - law).abs().max()) * sqrt(len(values))


def check_normal(sample: torch.Tensor) -> None:
    """Moments, tails and the whole law of N numbers, each within 5 standard errors."""
    values, count = sample.flatten().double(), sample.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 5 * sqrt(variance / count)
    for bound in (1.0, 2.0, 3.0, 4.0):
        p = 1 - erf(bound / sqrt(2))
        assert abs(float((values.abs() > bound).double().mean()) - p) < 5 * sqrt(p / count)
    assert kolmogorov(sample) < 2.2  # exceeded once in 8,000 samples


def check_independent(a: torch.Tensor, b: torch.Tensor) -> None:
    assert abs(float((a.double() * b.double()).mean())) < 5 / sqrt(a.numel())


@devices
def test_the_noise_is_standard_normal_and_independent(device: str) -> None:
    draws = PhiloxDraws((11, 12), (4, 128, 128), device)
    first, second = draws(0), draws(1)
    check_normal(torch.stack([first, second]))
    check_independent(first, second)
    check_independent(first[0], first[1])
    check_independent(first[..., 1:], first[..., :-1])
    check_independent(first[0] ** 2 - 1, second[0] ** 2 - 1)
