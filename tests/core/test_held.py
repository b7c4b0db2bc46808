"""Which saved levels can guide: a file that lacks one level of an inversion cannot."""

from __future__ import annotations

import pytest
import torch

from lib_unsampler.core.held import unguidable
from lib_unsampler.core.trajectory import Trajectory

SCHEDULE = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.0])


def inverted(kept: list[int], mode: str) -> Trajectory:
    """Levels of a run from step 1 on, least noisy first."""
    sigmas = SCHEDULE[kept]
    source = torch.full((1, 4, 2, 2), 0.5)
    z = source + sigmas.reshape(-1, 1, 1, 1, 1)
    return Trajectory(z, sigmas, SCHEDULE, kept[-1], source, "eps", (1,), settings={"mode": mode})


@pytest.mark.parametrize(("kept", "lacks"), [([3, 2, 1], 0), ([3, 1], 1), ([2, 1], 1), ([1], 2)])
def test_every_sampled_level_of_an_inversion_is_needed(kept: list[int], lacks: int) -> None:
    said = unguidable(inverted(kept, "invert"))
    assert said == (
        f"it lacks {lacks} of the levels that are sampled; save it with a step_increment of 1" if lacks else None
    )
    assert unguidable(inverted(kept, "noise")) is None, "shared noise makes any level"
