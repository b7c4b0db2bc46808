r"""The WebUI's "NV" noise, with random access by draw number.

The counter-based generator Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) maps a 128-bit counter and a 64-bit key to four 32-bit words. One round, with
:math:`M_0 c_0` and :math:`M_1 c_2` as 64-bit products:

.. math::
    c' = (hi(M_1 c_2) \oplus c_1 \oplus k_0,\; lo(M_1 c_2),\; hi(M_0 c_0) \oplus c_3 \oplus k_1,\; lo(M_0 c_0))

and after each round :math:`k \leftarrow k + (W_0, W_1)` modulo :math:`2^{32}`. The WebUI's
``randn_source = NV`` spends one block per number: the key is the image's seed, counter word 0 the
draw's number, word 2 the element's index, the others 0. The first two words (x, y) become a normal
number by Box and Muller's transform,

.. math:: n = \sqrt{-2 \ln u}\, \sin(v), \quad u = 2^{-32} x + 2^{-33}, \quad v = (2^{-32} y + 2^{-33})\, 2 \pi,

in float64, rounded once to float32. This is the reference; kernels.py computes the same in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

TURN = float(np.float32(2.3283064e-10 * 6.2831855))
r""":math:`2 \pi / 2^{32}` as the WebUI has it, a float32 that is 3e-8 too large."""


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product; int64 wraps, which keeps all 64 bits."""
    product = word * multiplier
    return (product >> 32) & WORD, product & WORD


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10.

    Arguments:
        counter: Four int64 tensors of 32-bit words that broadcast together.
        key: Two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def box_muller(x: Tensor, y: Tensor) -> Tensor:
    """A standard normal number in float32 for each pair of 32-bit words (int64 tensors)."""
    u = x.double() * 2.0**-32 + 2.0**-33
    v = y.double() * TURN + TURN / 2
    return ((-2.0 * u.log()).sqrt() * v.sin()).float()


class PhiloxDraws:
    """The WebUI's NV noise of a batch, one seed per image, as a :data:`~.noising.Draw`.

    Any draw can be asked for at any time. A batch of B images draws what B single runs draw.

    Attributes:
        seeds: Each image's 64-bit seed.
        shape: One image's latent shape, (C, [T,] H, W).
        device: Where draws arrive.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = tuple(int(seed) % 2**64 for seed in seeds)
        self.shape = tuple(shape)
        self.device = torch.device(device)

    def __call__(self, j: int) -> Tensor:
        """Draw j with shape (B, C, [T,] H, W), float32."""
        # The other devices (MPS, DirectML) lack float64; the WebUI itself draws on the CPU for all.
        device = self.device if self.device.type in ("cpu", "cuda") else torch.device("cpu")
        element = torch.arange(int(np.prod(self.shape)), dtype=torch.int64, device=device)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        counter = (zero + j, zero, element, zero)
        noise = torch.empty((len(self.seeds), *self.shape), dtype=torch.float32, device=device)
        for image, seed in zip(noise, self.seeds):
            x, y, _, _ = philox(counter, (seed & WORD, seed >> 32))
            image.copy_(box_muller(x, y).view(self.shape))
        return noise.to(self.device)
