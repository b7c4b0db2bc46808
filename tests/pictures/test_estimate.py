"""What a request will cost, beside what it did cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lib_unsampler.core.schedule import levels
from lib_unsampler.pictures.estimate import Estimate, estimate, size
from lib_unsampler.pictures.reel import timing
from lib_unsampler.settings import FORMATS, Settings
from lib_unsampler.standalone.cli import main
from lib_unsampler.standalone.sampling import kd

ROOT = Path(__file__).resolve().parents[2]
SIDE = 128


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("gif", {"steps": 8, "captions": True}),
        ("webp", {"steps": 10, "ping_pong": True}),
        ("apng", {"steps": 6, "end_at_step": 3}),
        ("mp4", {"steps": 10, "noise": "path"}),
    ],
)
def test_a_film_is_as_large_as_was_said(form: str, more: dict[str, object], tmp_path: Path) -> None:
    assert form in FORMATS
    picture = tmp_path / "cat.png"
    Image.open(ROOT / "lib_unsampler/assets/cat.jpg").convert("RGB").resize((SIDE, SIDE)).save(picture)
    film = tmp_path / f"film.{'png' if form == 'apng' else form}"
    options: list[str] = []
    for name, value in more.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    assert main([str(picture), "-o", str(film), *options]) in (0, None)
    settings = Settings(output=("animation",), format=form, **more)
    plan = levels(kd.get_sigmas_karras(settings.steps, 0.0291675, 14.614642), max(0, settings.end_at_step))
    told = estimate(settings, plan.sigmas.tolist(), len(plan.visited), 0, SIDE, SIDE)
    assert 1 / 1.5 < film.stat().st_size / told.bytes < 1.5


def test_frames_and_seconds_are_the_reel_s() -> None:
    sigmas = [0.1, 0.5, 2.0, 9.0]
    settings = Settings(timing="log sigma", hold_first=0.5, hold_last=1, ping_pong=True, duration=0.2)
    told = estimate(settings, sigmas, 4, 0, 64, 64)
    order = timing(settings, [0.0, *sigmas]).shown(5)
    assert told.frames == 5 and told.seconds == pytest.approx(sum(time for _, time in order))
    assert estimate(Settings(output=("latents",)), sigmas, 4, 0, 64, 64) == Estimate(0, 0.0, 0, 0, 0.0)


def test_side_and_limit_are_taken_into_account() -> None:
    sigmas = [0.1, 0.5, 2.0, 9.0]
    whole = estimate(Settings(), sigmas, 4, 0, 1024, 512)
    smaller = estimate(Settings(animation_side=512), sigmas, 4, 0, 1024, 512)
    assert smaller.bytes == pytest.approx(whole.bytes / 4, abs=1) and smaller.megapixels == whole.megapixels
    assert estimate(Settings(animation_side=2000), sigmas, 4, 0, 1024, 512) == whole
    limited = estimate(Settings(max_megabytes=0.5), sigmas, 4, 0, 1024, 512)
    assert limited.bytes == 500_000 and "at most 500 kB GIF" in limited.said("gif")
    roomy = estimate(Settings(max_megabytes=500), sigmas, 4, 0, 1024, 512)
    assert roomy == whole and f"about {size(whole.bytes)} GIF" in roomy.said("gif")


def test_model_calls() -> None:
    sigmas = [float(i) for i in range(1, 11)]

    def calls(steps: int = 1, sampled: int = 0, **settings: object) -> int:
        return estimate(Settings(**settings), sigmas, 10, sampled, 64, 64, 1, steps).calls

    assert calls() == 0
    assert calls(output=("init",), sampled=6) == 6
    assert calls(mode="invert", solver="reverse") == 10 and calls(2, mode="invert", solver="reverse") == 20
    assert calls(mode="invert") == 40 and calls(mode="invert", max_calls=2) == 20
    assert calls(mode="invert", report=True) == 50
    assert calls(mode="replay", output=("frames",)) == 0
    assert calls(mode="replay", output=("init",), sampled=10) == 20


def test_what_is_dear_is_warned_of() -> None:
    assert not Estimate(20, 2.0, 6_000_000, 0, 5.0).warning()
    assert "about 500 model calls" in Estimate(20, 2.0, 0, 500, 5.0).warning()
    assert "a file of about 200 MB" in Estimate(20, 2.0, 200_000_000, 0, 5.0).warning()
    assert "3000 megapixels" in Estimate(20, 2.0, 0, 0, 3000.0).warning()


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (6_040_000, "6.04 MB"), (2.5e9, "2.5 GB")])
def test_sizes_in_words(count: float, said: str) -> None:
    assert size(count) == said
