"""Animations of limited size: never larger, with every frame and its time; quality first, then the side; said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_animation import ENDINGS, needs_codec, read

from lib_unsampler.pictures import fitting
from lib_unsampler.pictures.animation import FORMATS, Animation, Making, write
from lib_unsampler.pictures.background import Background
from lib_unsampler.pictures.fitting import SMALLEST, Fit, Fitted, Way
from lib_unsampler.pictures.timing import Timing

SIZE, COUNT = (384, 288), 12
CAT = Image.open(Path(fitting.__file__).parents[1] / "assets/cat.jpg").convert("RGB").resize(SIZE)
TIMING = Timing([0.1, *[0.05] * (COUNT - 2), 0.1], hold_last=0.5)
QUALITY = (".webp", ".mp4")


def noise(number: int) -> Image.Image:
    """The cat on its way into noise of one pixel's grain."""
    share = number / (COUNT - 1)
    pixels = np.random.default_rng(number).normal(128, 60, (SIZE[1], SIZE[0], 3))
    return Image.fromarray((share * pixels + (1 - share) * np.asarray(CAT)).clip(0, 255).astype(np.uint8))


def smooth(number: int) -> Image.Image:
    return noise(number).resize((SIZE[0] // 8, SIZE[1] // 8)).resize(SIZE, Image.Resampling.BICUBIC)


def mixed(number: int) -> Image.Image:
    """One frame rough, the next smooth, and each of both kinds from top to bottom."""
    kinds = (noise, smooth) if number % 2 else (smooth, noise)
    page = kinds[0](number)
    page.paste(kinds[1](number).crop((0, 0, SIZE[0], SIZE[1] // 3)), (0, 0))
    return page


FILMS = {"noise": noise, "smooth": smooth, "mixed": mixed}


def fitted(path: Path, frames: list[Image.Image], most: int, timing: Timing = TIMING, side: int | None = None) -> Fit:
    with Background() as background, Fitted(path, timing, "text " * 50, background, Making(side), most) as made:
        for frame in frames:
            made.add(frame)
        return made.finish()


def size_of(path: Path) -> tuple[int, int]:
    height, width = read(path).frames[0].shape[:2]
    return width, height


@pytest.mark.parametrize("film", FILMS)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.one_of(5)
def test_a_file_is_never_larger_and_keeps_every_frame_and_time(ending: str, film: str, tmp_path: Path) -> None:
    needs_codec(ending)
    frames = [FILMS[film](number) for number in range(COUNT)]
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"a{ending}"
    write(whole, frames, TIMING, "text " * 50)
    there, natural, sides = read(whole), whole.stat().st_size, []
    for share in (1.5, 0.8, 0.4):
        most = round(share * natural)
        fit = fitted(path, frames, most)
        found = read(path)
        assert fit.kept and fit.bytes == path.stat().st_size <= most
        assert len(found.frames) == COUNT and found.milliseconds == there.milliseconds and found.text == there.text
        even = tuple(side + side % 2 for side in fit.size) if ending == ".mp4" else fit.size
        assert size_of(path) == even and max(fit.size) >= SMALLEST
        assert fit.size[0] / fit.size[1] == pytest.approx(SIZE[0] / SIZE[1], rel=0.01)
        sides.append(fit.size[0])
        form = FORMATS[ending]
        if share > 1:
            assert fit.size == SIZE and path.read_bytes() == whole.read_bytes()
        elif ending in QUALITY:
            assert fit.size == SIZE or fit.quality == form.worst  # the quality goes first
        assert (fit.quality is None) == (ending not in QUALITY)
        assert fit.bytes > 0.6 * min(most, natural)  # nothing is given away
    assert sides == sorted(sides, reverse=True)
    assert {p.name for p in tmp_path.iterdir()} == {whole.name, path.name}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_cannot_be_small_enough_is_said_and_not_made(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"the old one")
    fit = fitted(path, [noise(number) for number in range(COUNT)], 1500)
    assert not fit.kept and fit.size == (SMALLEST, 96) and fit.bytes > 1500
    assert fit.quality in (None, FORMATS[ending].worst)
    assert f"{fit.bytes / 1e6:.3g} MB" in fit.said() and "128 x 96" in fit.said() and "0.0015 MB" in fit.said()
    assert path.read_bytes() == b"the old one" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("more", [{"reverse": True}, {"ping_pong": True}], ids=str)
def test_the_order_of_showing_is_kept(more: dict[str, bool], tmp_path: Path) -> None:
    frames, timing = [noise(number) for number in range(COUNT)], Timing([0.1] * COUNT, **more)
    write(tmp_path / "whole.gif", frames, timing)
    most = round(0.5 * (tmp_path / "whole.gif").stat().st_size)
    fit = fitted(tmp_path / "a.gif", frames, most, timing)
    made = read(tmp_path / "a.gif")
    wanted = [frame.resize(fit.size, Image.Resampling.LANCZOS) for frame in frames]
    for shown, (number, _) in zip(made.frames, timing.shown(COUNT)):
        assert np.abs(shown.astype(int) - np.asarray(wanted[number])).mean() < 12
    assert len(made.frames) == len(timing.shown(COUNT)) and 0.6 * most < fit.bytes <= most


def test_frames_below_the_smallest_side_keep_theirs(tmp_path: Path) -> None:
    small = [noise(number).resize((80, 60)) for number in range(COUNT)]
    fit = fitted(tmp_path / "a.webp", small, 8000)
    assert fit.kept and fit.size == (80, 60) and fit.quality is not None and fit.quality < FORMATS[".webp"].best
    fit = fitted(tmp_path / "b.gif", small, 1000)
    assert not fit.kept and fit.size == (80, 60)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_side_alone(ending: str, tmp_path: Path) -> None:
    """The frames of the file are Lanczos's of those that came; a longer side changes nothing."""
    needs_codec(ending)
    frames = [smooth(number) for number in range(COUNT)]
    path, same, whole = (tmp_path / f"{name}{ending}" for name in ("a", "same", "whole"))
    for file, side in ((path, 160), (same, 1000), (whole, None)):
        with Background() as background, Animation(file, TIMING, "", background, Making(side)) as made:
            for frame in frames:
                made.add(frame)
            made.finish()
    assert same.read_bytes() == whole.read_bytes()
    assert size_of(path) == (160, 120)
    for shown, frame in zip(read(path).frames, frames):
        wanted = np.asarray(frame.resize((160, 120), Image.Resampling.LANCZOS))
        error = np.abs(shown.astype(int) - wanted)
        assert error.max() <= 2 if ending == ".apng" else error.mean() < 12


def test_a_side_and_a_limit_go_together(tmp_path: Path) -> None:
    frames = [noise(number) for number in range(COUNT)]
    assert fitted(tmp_path / "a.gif", frames, 10**9, side=200).size == (200, 150)
    fit = fitted(tmp_path / "a.gif", frames, 250_000, side=200)
    assert fit.kept and SMALLEST <= fit.size[0] < 200
    assert fitted(tmp_path / "a.gif", frames, 10**9, side=64).size == (64, 48)


@pytest.mark.parametrize("ending", ENDINGS[:3])
def test_a_film_is_written_once(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that are encoded, those of trials with them: at most 1.3 times a film's, where half of it must go too."""
    form, spent = FORMATS[ending], [0]
    encode = form.encode

    def counted(frame: Image.Image, quality: int) -> bytes:
        spent.append(frame.width * frame.height)
        return encode(frame, quality)

    monkeypatch.setattr(form, "encode", staticmethod(counted))
    frames = [noise(number).resize((640, 480)) for number in range(COUNT)]
    write(tmp_path / f"whole{ending}", frames, TIMING)
    natural, once = (tmp_path / f"whole{ending}").stat().st_size, sum(spent)
    for share in (1.5, 0.9, 0.5):
        spent.clear()
        assert fitted(tmp_path / f"a{ending}", frames, round(share * natural)).kept
        assert sum(spent) <= 1.3 * once, share
        if ending == ".gif" and share > 0.5:
            assert len(spent) <= 1.3 * COUNT, share  # a palette takes as long for few pixels as for many


def test_no_frame_at_all_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 frames"):
        fitted(tmp_path / "a.gif", [], 1000)
    assert not list(tmp_path.iterdir())


def test_frames_that_do_not_belong_are_refused_as_they_come(tmp_path: Path) -> None:
    with Background() as background, Fitted(tmp_path / "a.gif", TIMING, "", background, Making(), 1000) as made:
        made.add(noise(0))
        with pytest.raises(ValueError, match="the first was"):
            made.add(noise(0).resize((10, 10)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_way_goes_from_the_best_to_the_smallest(ending: str) -> None:
    """Every place is no better than the one before it: first in quality, then in side."""
    form, way = FORMATS[ending], Way(FORMATS[ending], (1000, 500), 10)
    makings = [way.making(way.end * step / 200) for step in range(201)]
    assert makings[0] == Making(1000, form.best) and makings[-1] == Making(SMALLEST, form.worst)
    for before, after in zip(makings, makings[1:]):
        assert after.side <= before.side
        assert abs(after.quality - form.worst) <= abs(before.quality - form.worst)
        assert after.side == 1000 or after.quality == form.worst


def test_the_way_s_aim_is_where_the_bytes_are_known_to_be() -> None:
    way = Way(FORMATS[".gif"], (1024, 1024), 16)
    way.learn(0.0, 8_000_000)
    assert way.aim(9_000_000) == 0
    far = way.aim(2_000_000)
    share = 8_000_000 / (1024 * 1024 * 16 * fitting.SAMPLES[FORMATS[".gif"]].noise)
    assert 0.3 < share < 0.5 and way.making(far).side == pytest.approx(1024 * 0.25 ** (1 / 1.5), abs=1)
    way.learn(far, 1_000_000)
    nearer = way.aim(2_000_000)
    assert 0 < nearer < far
    way.correct(nearer, 2_400_000)  # it was a fifth more: so everything is
    assert nearer < way.aim(2_000_000) < far
    assert way.aim(1) == way.end


@pytest.mark.parametrize("ending", [".gif", ".apng"])
def test_noise_loses_as_many_bytes_as_pixels(ending: str) -> None:
    """A film of nothing but noise, of a quarter of its bytes, has half the side; no other has more."""
    form = FORMATS[ending]
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    count, way = len(form.encode(frame, form.best)), Way(form, frame.size, 1)
    way.learn(0.0, count)
    assert way.making(way.aim(count / 4)).side == pytest.approx(256, rel=0.05)
