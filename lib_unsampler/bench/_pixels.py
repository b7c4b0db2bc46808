r"""A small trained denoiser of 32 x 32 colour photographs: the nearest thing to a real network that ships here.

EDM preconditioning (Karras et al. 2022), :math:`D(z; s) = c_{skip} z + c_{out} F(c_{in} z, \ln(s) / 4)` with data
deviation 0.5, around a two-scale convolutional network. ``tests/train_denoiser.py`` made its weights from the
photographs that scikit-image ships.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.noising import append_dims

DEVIATION = 0.5
SIDE = 32
WEIGHTS = Path(__file__).with_name("pixels.safetensors")


class Block(nn.Module):
    """Two convolutions around the level's scale and shift, added to what came in."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(2))
        self.level = nn.Linear(features, 2 * width)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.level(features)[..., None, None].chunk(2, dim=1)
        h = self.first(nn.functional.silu(self.norms[0](x)))
        h = self.norms[1](h) * (1 + scale) + shift
        return x + self.second(nn.functional.silu(h))


class PixelDenoiser(nn.Module):
    """``model(z, sigma) -> D(z; sigma)`` for pictures in [-1, 1] with shape (B, 3, 32, 32)."""

    frequencies: Tensor

    def __init__(self, width: int = 24, wide: int = 40, features: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))
        self.embed = nn.Sequential(nn.Linear(8, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.down = nn.ModuleList(Block(width, features) for _ in range(2))
        self.shrink = nn.Conv2d(width, wide, 2, stride=2)
        self.middle = nn.ModuleList(Block(wide, features) for _ in range(2))
        self.grow = nn.ConvTranspose2d(wide, width, 2, stride=2)
        self.up = nn.ModuleList(Block(width, features) for _ in range(2))
        self.leave = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        s = append_dims(sigma, z.ndim)
        total = (s**2 + DEVIATION**2).sqrt()
        angles = (sigma.log() / 4)[:, None] * self.frequencies
        features = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        h = below = self.enter(nn.functional.pixel_unshuffle(z / total, 2))
        for block in self.down:
            h = block(h, features)
        across = h
        h = self.shrink(h)
        for block in self.middle:
            h = block(h, features)
        h = self.grow(h) + across
        for block in self.up:
            h = block(h, features)
        out = nn.functional.pixel_shuffle(self.leave(h + below), 2)
        return DEVIATION**2 / total**2 * z + s * DEVIATION / total * out


@cache
def pixel_denoiser() -> PixelDenoiser:
    """The trained network, without gradients."""
    network = PixelDenoiser()
    network.load_state_dict({name: t.float() for name, t in load_file(WEIGHTS).items()})
    return network.eval().requires_grad_(False)
