"""The formats' limits, at them and one beyond: where a mutant of the code lived on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from lib_unsampler.pictures import animation
from lib_unsampler.pictures.timing import Timing

LONGEST = {".gif": 655.35, ".png": 655.35, ".webp": 16777.215}
"""Seconds: GIF89a 23.c.vi and APNG's fcTL have 16 bits of 1/100 s, WebP's ANMF 24 of 1/1000 s."""
SIDES = {".gif": 65535, ".webp": 16383}
"""GIF89a 18 has 16 bits; the WebP bitstream has 14 (RFC 9649, 2.6)."""


def pictures(size: tuple[int, int]) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in ("navy", "gold")]


def shown(path: Path) -> list[float]:
    with Image.open(path) as read:
        return [(frame.load(), frame.info["duration"])[1] for frame in ImageSequence.Iterator(read)]


@pytest.mark.parametrize("ending", LONGEST)
def test_a_frame_is_shown_as_long_as_the_format_can(ending: str, tmp_path: Path) -> None:
    file, longest = tmp_path / f"film{ending}", LONGEST[ending]
    animation.write(file, pictures((8, 6)), Timing((longest, 0.1)))
    assert shown(file) == pytest.approx([1000 * longest, 100])
    animation.write(file, pictures((8, 6)), Timing((0.1, 0.5), hold_last=longest - 0.5))
    assert shown(file) == pytest.approx([100, 1000 * longest])
    with pytest.raises(ValueError, match=f"a frame is shown .* s, above the format's {longest:g} s"):
        animation.write(tmp_path / f"other{ending}", pictures((8, 6)), Timing((0.1, longest + 0.01)))
    assert not (tmp_path / f"other{ending}").exists()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ending", SIDES)
def test_a_side_is_as_long_as_the_format_can(ending: str, turned: bool, tmp_path: Path) -> None:
    def size(side: int) -> tuple[int, int]:
        return (1, side) if turned else (side, 1)

    file, side = tmp_path / f"film{ending}", SIDES[ending]
    animation.write(file, pictures(size(side)), Timing((0.1, 0.1)))
    with Image.open(file) as read:
        assert (read.size, read.n_frames) == (size(side), 2)
        assert [frame.convert("RGB").getpixel((0, 0))[2] > 64 for frame in ImageSequence.Iterator(read)] == [
            True,
            False,
        ]
    with pytest.raises(ValueError, match=str(side)):
        animation.write(tmp_path / f"other{ending}", pictures(size(side + 1)), Timing((0.1, 0.1)))
    assert not (tmp_path / f"other{ending}").exists()


@pytest.mark.parametrize(("ending", "most"), [(".gif", 65535), (".png", 65535), (".webp", 65535)])
def test_it_plays_as_often_as_the_format_can_say(ending: str, most: int, tmp_path: Path) -> None:
    """A GIF's number is of the times after the first."""
    animation.write(tmp_path / f"film{ending}", pictures((8, 6)), Timing((0.1, 0.1), plays=most))
    with Image.open(tmp_path / f"film{ending}") as read:
        assert read.info["loop"] == most - (ending == ".gif")


def test_a_colour_of_one_pixel_is_kept_by_a_gif(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.putdata([(4 * i, 255 - 3 * i, 40 * (i % 6)) for i in range(64)])
    animation.write(tmp_path / "film.gif", [picture, picture], Timing((0.1, 0.1)))
    with Image.open(tmp_path / "film.gif") as read:
        assert read.convert("RGB").tobytes() == picture.tobytes()
