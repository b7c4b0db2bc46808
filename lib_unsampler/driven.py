"""What the model drives inside the host's own sampler: ``invert`` and ``replay`` for one batch.

The host's ``sample_img2img`` is run with another function in its sampler's place, so the model is
loaded, guided, previewed and interrupted as in the host's own sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import host
from .schedule import Levels


@dataclass(frozen=True)
class Plan:
    """What one batch walks: the levels, and whether its last is where img2img would start anyway.

    The prediction type is the model's that begins the sampling: a refiner may end it.
    """

    levels: Levels
    prediction: str
    total: int
    own_start: bool

    @property
    def start(self) -> int:
        """The schedule index of the noisiest level."""
        return self.levels.kept[-1]


@dataclass(frozen=True)
class Batch:
    """One batch as the host calls its sampler's ``sample_img2img``; x and noise have shape (B, C, [T,] H, W)."""

    own: Callable[..., Tensor]
    p: Any
    x: Tensor
    noise: Tensor
    conditioning: Any
    unconditional_conditioning: Any
    steps: int | None = None
    image_conditioning: Any = None

    def sample(self, plan: Plan, body: Callable[..., Tensor] | None = None, conds: tuple[Any, Any] | None = None) -> Tensor:
        """The host's own sampling from the plan's noisiest level down, or a body in its function's place."""
        conds = conds or (self.conditioning, self.unconditional_conditioning)
        begin = nullcontext(self.steps) if plan.own_start else host.start_at(self.p, plan.total, plan.start)
        with begin as steps:
            args = (self.p, self.x, self.noise, *conds, steps, self.image_conditioning)
            return self.own(*args) if body is None else host.in_sampler(body, self.own, *args)
