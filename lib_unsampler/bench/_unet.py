r"""A network of Stable Diffusion 1.5's size and shape, with random weights: for what its calls cost, not what they say.

Its layers are those of the published architecture (Rombach et al. 2022): widths 320, 640, 1280, 1280, two residual
blocks a level on the way down and three on the way up, transformers with 8 heads over all but the lowest resolution,
a text of 77 tokens of 768 values. About 860 million weights. Its answer is a Gaussian prior's with a little of the
network's mixed in, so that an inversion has something smooth to solve:
:math:`D(z; s) = z / (1 + s^2) + \epsilon\, s / \sqrt{1 + s^2}\, F(z / \sqrt{1 + s^2}, \ln(s) / 4)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.noising import append_dims

WIDTHS, HEADS, TOKENS, TEXT = (320, 640, 1280, 1280), 8, 77, 768
MIXED = 0.05
"""Epsilon."""


class Residual(nn.Module):
    """Two convolutions around the level's shift, added to what came in."""

    def __init__(self, come: int, go: int, features: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(32, come), nn.GroupNorm(32, go)])
        self.first, self.second = nn.Conv2d(come, go, 3, padding=1), nn.Conv2d(go, go, 3, padding=1)
        self.level = nn.Linear(features, go)
        self.across = nn.Conv2d(come, go, 1) if come != go else nn.Identity()

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """With the level's features."""
        h = self.first(functional.silu(self.norms[0](x))) + self.level(features)[..., None, None]
        return self.across(x) + self.second(functional.silu(self.norms[1](h)))


class Attention(nn.Module):
    """Of the pixels to the pixels or to the text."""

    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(source, width, bias=False), nn.Linear(source, width, bias=False)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Eight heads."""
        parts = (self.query(x), self.key(source), self.value(source))
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.leave(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Self-attention, attention to the text and a gated layer, over the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.enter, self.leave = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.text = Attention(width, width), Attention(width, TEXT)
        self.gate, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """With the text's tokens."""
        h = self.enter(self.norm(x)).flatten(2).transpose(1, 2)
        seen = self.norms[0](h)
        h = h + self.own(seen, seen)
        h = h + self.text(self.norms[1](h), text)
        value, gate = self.gate(self.norms[2](h)).chunk(2, dim=2)
        h = h + self.down(value * functional.gelu(gate))
        return x + self.leave(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks of one resolution, each with its transformer but at the lowest."""

    def __init__(self, comes: list[int], width: int, features: int, attends: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(come, width, features) for come in comes)
        self.attends = nn.ModuleList(Transformer(width) if attends else nn.Identity() for _ in comes)

    def block(self, number: int, x: Tensor, features: Tensor, text: Tensor) -> Tensor:
        """One block and its transformer."""
        x = self.blocks[number](x, features)
        attend = self.attends[number]
        return attend(x, text) if isinstance(attend, Transformer) else attend(x)


class LargeDenoiser(nn.Module):
    """``model(z, sigma) -> D(z; sigma)`` for latents of shape (B, 4, H, W), H and W multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        features, (first, *_) = 4 * WIDTHS[0], WIDTHS
        self.embed = nn.Sequential(nn.Linear(first, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())
        self.enter, self.leave = nn.Conv2d(4, first, 3, padding=1), nn.Conv2d(first, 4, 3, padding=1)
        self.norm = nn.GroupNorm(32, first)
        widths = (first, *WIDTHS)
        self.down = nn.ModuleList(Level([a, b], b, features, b != a or b == first) for a, b in zip(widths, WIDTHS))
        self.shrink = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for width in WIDTHS[:-1])
        self.middle = Level([WIDTHS[-1]] * 2, WIDTHS[-1], features, False)
        self.attend = Transformer(WIDTHS[-1])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        above = WIDTHS[-1]
        for number in reversed(range(len(WIDTHS))):
            width, lower = WIDTHS[number], WIDTHS[max(number - 1, 0)]
            comes = [above + width, 2 * width, width + lower]
            self.up.append(Level(comes, width, features, number < len(WIDTHS) - 1))
            self.grow.append(nn.Conv2d(width, width, 3, padding=1) if number else nn.Identity())
            above = width
        self.text: Tensor
        self.frequencies: Tensor
        self.register_buffer("text", torch.randn(1, TOKENS, TEXT, generator=torch.manual_seed(0)))
        self.register_buffer("frequencies", torch.exp(-9.2 * torch.linspace(0, 1, first // 2)))

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        """In the precision of the weights, answered in that of z."""
        s = append_dims(sigma, z.ndim)
        total = (1 + s**2).sqrt()
        seen = self._network((z / total).to(self.text), (250 * sigma.log()).to(self.text))
        return z / total**2 + MIXED * s / total * seen.to(z)

    def _network(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * self.frequencies
        features, text = self.embed(torch.cat([angles.sin(), angles.cos()], 1)), self.text.expand(len(x), -1, -1)
        h = self.enter(x)
        kept = [h]
        for number, level in enumerate(self.down):
            assert isinstance(level, Level)
            for block in range(2):
                h = level.block(block, h, features, text)
                kept.append(h)
            if number < len(self.shrink):
                h = self.shrink[number](h)
                kept.append(h)
        h = self.middle.block(1, self.attend(self.middle.block(0, h, features, text), text), features, text)
        for level, grow in zip(self.up, self.grow):
            assert isinstance(level, Level)
            for block in range(3):
                h = level.block(block, torch.cat([h, kept.pop()], 1), features, text)
            if isinstance(grow, nn.Conv2d):
                h = grow(functional.interpolate(h, scale_factor=2.0))
        return self.leave(functional.silu(self.norm(h)))
