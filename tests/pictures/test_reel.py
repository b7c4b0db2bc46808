"""A reel: frames go in one by one, an animation and a thinned sheet come out, as the settings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_unsampler.pictures import render
from lib_unsampler.pictures.background import Background
from lib_unsampler.pictures.reel import Reel, timing
from lib_unsampler.pictures.timing import evenly
from lib_unsampler.settings import Settings, parse

SIGMAS = [0.0, 0.1, 0.2, 0.4, 12.8]


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), (40 * i % 256, 90, 255 - i % 256)) for i in range(count)]


def durations(path: Path) -> list[int]:
    with Image.open(path) as picture:
        found = []
        for i in range(picture.n_frames):
            picture.seek(i)
            picture.load()
            found.append(picture.info["duration"])
        return found


@given(st.integers(1, 3000), st.integers(1, 500))
def test_evenly_takes_as_many_as_asked_for_the_last_included(total: int, most: int) -> None:
    taken = [n for n in range(total) if evenly(n, total, most)]
    assert len(taken) == min(total, most) and taken[-1] == total - 1
    gaps = np.diff([-1, *taken])
    assert gaps.max() - gaps.min() <= 1


def test_timing_is_the_settings() -> None:
    fields = {"duration": 0.3, "hold_first": 1, "hold_last": 2, "ping_pong": True, "reverse": True, "loop": 4}
    made = timing(parse(fields, "cli"), SIGMAS)
    assert (made.hold_first, made.hold_last, made.reverse, made.ping_pong, made.plays) == (1, 2, True, True, 4)
    assert list(made.durations) == [0.3] * 5
    by_sigma = timing(parse({"timing": "log sigma"}, "cli"), SIGMAS).durations  # steps 1, 1, 5 in log2
    assert by_sigma == pytest.approx([0.1, 0.1 * 4 / 10, 0.1 * 4 / 10, 0.1 * 12 / 10, 0.1 * 20 / 10])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_run_that_ends_early_is_shown_as_far_as_it_came(count: int, tmp_path: Path) -> None:
    settings = Settings(hold_last=1.0)
    with Background() as background, Reel(settings, SIGMAS, "text", background, tmp_path / "a.gif", True) as reel:
        for i, frame in enumerate(frames(count)):
            assert reel.add(frame, i, None) is frame
        sheet = reel.finish()
    assert durations(tmp_path / "a.gif") == [100] * (count - 1) + [1100]
    assert sheet.tobytes() == render.contact_sheet(frames(count), [render.sigma_text(s) for s in SIGMAS]).tobytes()


def test_captions_are_on_the_animation_and_not_on_the_sheet(tmp_path: Path) -> None:
    settings = Settings(captions=True, noise="path")
    with Background() as background, Reel(settings, SIGMAS, "", background, tmp_path / "a.png", True) as reel:
        shown = [reel.add(f, s, 500.0) for f, s in zip(frames(5), [None, 3, 2, 1, 0])]
        sheet = reel.finish()
    wanted = [render.caption(s, v, 500.0, "path") for s, v in zip([None, 3, 2, 1, 0], SIGMAS)]
    for i, (frame, pieces) in enumerate(zip(frames(5), wanted)):
        assert shown[i].tobytes() == render.captioned(frame, pieces).tobytes() != frame.tobytes()
        with Image.open(tmp_path / "a.png") as moving:
            moving.seek(i)
            assert moving.convert("RGB").tobytes() == shown[i].tobytes()
    assert sheet.tobytes() == render.contact_sheet(frames(5), [render.sigma_text(s) for s in SIGMAS]).tobytes()


def test_a_long_sheet_is_thinned(tmp_path: Path) -> None:
    count = 3 * render.SHEET_FRAMES
    sigmas = [float(i) for i in range(count)]
    with Background() as background, Reel(Settings(), sigmas, "", background, None, True) as reel:
        for frame in frames(count):
            reel.add(frame, 1, None)
        sheet = reel.finish()
    thumbnails = [f for i, f in enumerate(frames(count)) if i % 3 == 2]
    captions = [render.sigma_text(i) for i in range(count) if i % 3 == 2]
    assert sheet.tobytes() == render.contact_sheet(thumbnails, captions).tobytes()


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with Background() as background, Reel(Settings(), SIGMAS, "", background, tmp_path / "a.webp", False) as reel:
        for frame in frames(3):
            reel.add(frame, 1, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("side", "captions", "named"), [(96, False, True), (95, False, False), (60, True, True)])
def test_the_pictures_of_a_panel_are_named_where_there_is_room(side: int, captions: bool, named: bool) -> None:
    parts = [Image.new("RGB", (side, side), (80 + 30 * i,) * 3) for i in range(3)]
    settings = Settings(mode="invert", panel=True, captions=captions)
    panel = render.beside(parts)
    with Background() as background, Reel(settings, SIGMAS, "", background, None, False) as reel:
        clean, noisy = reel.add(panel, None, None), reel.add(panel, 3, None)
    middle = render.caption(3, 0.1, None, "invert") if captions else ["the noisy latent"]
    wanted = render.captioned_panel(panel, [["source"], middle, ["what the model sees in it"]])
    assert noisy.tobytes() == (wanted if named else panel).tobytes() and (clean.tobytes() != panel.tobytes()) == named
