"""Written files, read back: frames, times, order and texts are what went in; a failure leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_unsampler.animation import centiseconds, quantize, write_gif, write_png
from lib_unsampler.files import whole

# None is nearly black: Pillow 9.5 takes that for black.
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (90, 10, 160), (200, 100, 50)]


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noisy(seed: int, size: tuple[int, int] = (80, 70)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def read(path: Path) -> tuple[list[Image.Image], list[int], dict[str, Any]]:
    """A GIF's frames, their milliseconds and the first frame's info."""
    frames, times = [], []
    with Image.open(path) as gif:
        info = dict(gif.info)
        for i in range(gif.n_frames):
            gif.seek(i)
            times.append(gif.info["duration"])
            frames.append(gif.convert("RGB"))
    return frames, times, info


def colours(frames: list[Image.Image]) -> list[Any]:
    assert all(len(f.getcolors()) == 1 for f in frames)
    return [f.getpixel((0, 0)) for f in frames]


def test_gif_has_every_frame_in_order_for_its_own_time(tmp_path: Path) -> None:
    times = [0.02, 0.5, 0.1, 1.0, 0.03, 2.5]
    write_gif(tmp_path / "a.gif", (flat(c) for c in COLOURS), times, comment="steps: 20, ünïcode " * 30, loop=3)
    frames, read_times, info = read(tmp_path / "a.gif")
    assert colours(frames) == COLOURS
    assert read_times == [20, 500, 100, 1000, 30, 2500]
    assert all(f.size == (20, 12) for f in frames)
    assert info["comment"].decode("utf-8") == "steps: 20, ünïcode " * 30 and info["loop"] == 3
    assert info["version"] == b"GIF89a"


def test_gif_loops_for_ever_and_has_no_comment_unless_asked(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", [flat(c) for c in COLOURS[:2]], [0.1, 0.1])
    _, _, info = read(tmp_path / "a.gif")
    assert info["loop"] == 0 and "comment" not in info


def test_identical_neighbours_stay_frames_with_their_time(tmp_path: Path) -> None:
    order = [0, 0, 0, 1, 1, 0]
    write_gif(tmp_path / "a.gif", [flat(COLOURS[i]) for i in order], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    frames, times, _ = read(tmp_path / "a.gif")
    assert colours(frames) == [COLOURS[i] for i in order]
    assert times == [100, 200, 300, 400, 500, 600]


def test_reversed_frames_are_read_reversed(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", reversed([flat(c) for c in COLOURS]), [0.1] * 6)
    assert colours(read(tmp_path / "a.gif")[0]) == COLOURS[::-1]


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (80, 70)], ids=str)
def test_gif_frames_are_the_quantized_ones(size: tuple[int, int], tmp_path: Path) -> None:
    """Decoding gives the very pixels that quantizing chose: no frame shows through another."""
    pictures = [noisy(i, size) for i in range(3)]
    write_gif(tmp_path / "a.gif", pictures, [0.1] * 3)
    for got, picture in zip(read(tmp_path / "a.gif")[0], pictures):
        assert got.tobytes() == quantize(picture).convert("RGB").tobytes()


def test_quantizing_keeps_few_colours_and_stays_near_many() -> None:
    page = Image.new("RGB", (20, 60))
    for i, colour in enumerate(COLOURS):
        page.paste(colour, (0, 10 * i, 20, 10 * i + 10))
    assert quantize(page).convert("RGB").tobytes() == page.tobytes()
    noise = noisy(0, (128, 128))
    error = np.asarray(quantize(noise).convert("RGB"), float) - np.asarray(noise)
    # 256 cells of equal volume in the cube: a cell's side is 255 / 256^(1/3), its RMSE per channel side / sqrt(12)
    assert np.sqrt((error**2).mean()) < 1.5 * 255 / 256 ** (1 / 3) / 12**0.5


def test_quantizing_does_not_dither() -> None:
    """Pixels of one colour stay of one colour, also where there are more colours than 256."""
    steps = np.arange(0, 240, 10, dtype=np.uint8)
    pixels = np.stack(np.meshgrid(steps, steps, steps[:5]), -1).repeat(4, 0).repeat(4, 1).reshape(96, -1, 3)
    chosen = np.asarray(quantize(Image.fromarray(pixels)).convert("RGB"))
    both = np.unique(np.concatenate([pixels, chosen], -1).reshape(-1, 6), axis=0)
    assert len(both) == len(np.unique(pixels.reshape(-1, 3), axis=0)) == 24 * 24 * 5


@given(st.lists(st.floats(0.03, 60), max_size=200))
def test_centiseconds_never_drift(durations: list[float]) -> None:
    """Every frame starts within half a hundredth of its true time."""
    ends = list(accumulate(centiseconds(durations)))
    assert all(abs(end - 100 * true) <= 0.5 + 1e-6 for end, true in zip(ends, accumulate(durations)))
    assert len(ends) == len(durations)


def test_thirtieths_of_a_second_alternate() -> None:
    assert centiseconds([1 / 30] * 6) == [3, 4, 3, 3, 4, 3] and sum(centiseconds([1 / 30] * 900)) == 3000


def test_no_frame_is_shorter_than_browsers_play() -> None:
    assert centiseconds([0.001, 0.0, 0.02]) == [2, 2, 2]


def failing(frames: int) -> Iterator[Image.Image]:
    for i in range(frames):
        yield flat(COLOURS[i])
    raise RuntimeError("decoder failed")


BAD: dict[str, tuple[Callable[[Path], None], type[BaseException]]] = {
    "no frames": (lambda p: write_gif(p, [], []), ValueError),
    "too few": (lambda p: write_gif(p, [flat(COLOURS[0])], [0.1, 0.1]), ValueError),
    "too many": (lambda p: write_gif(p, [flat(c) for c in COLOURS], [0.1]), ValueError),
    "sizes differ": (lambda p: write_gif(p, [flat(COLOURS[0]), flat(COLOURS[1], (5, 5))], [1, 1]), ValueError),
    "too large": (lambda p: write_gif(p, [flat(COLOURS[0], (65536, 1))], [1]), ValueError),
    "source fails at once": (lambda p: write_gif(p, failing(0), [1, 1]), RuntimeError),
    "source fails later": (lambda p: write_gif(p, failing(3), [1] * 5), RuntimeError),
    "picture cannot be a PNG": (lambda p: write_png(p, Image.new("HSV", (4, 4))), OSError),
}


@pytest.mark.parametrize("old", [None, b"the old file"], ids=["new", "old"])
@pytest.mark.parametrize("case", BAD)
def test_a_failing_writer_leaves_nothing_and_keeps_the_old_file(case: str, old: bytes | None, tmp_path: Path) -> None:
    writer, error = BAD[case]
    path = tmp_path / "a.gif"
    if old:
        path.write_bytes(old)
    with pytest.raises(error):
        writer(path)
    assert [p.name for p in tmp_path.iterdir()] == (["a.gif"] if old else [])
    assert not old or path.read_bytes() == old


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_a_half_written_file_never_has_the_name(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(error), whole(path) as part:
        part.write_bytes(b"half")
        assert not path.exists() and part.parent == path.parent
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    for text in ("one", "two"):
        with whole(path) as part:
            part.write_text(text)
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("text", ["", "Steps: 20, Sampler: Euler\nsecond line, ünïcode 日本"])
def test_png_keeps_pixels_and_parameters(text: str, tmp_path: Path) -> None:
    picture = noisy(3)
    write_png(tmp_path / "a.png", picture, text)
    with Image.open(tmp_path / "a.png") as got:
        assert got.format == "PNG" and got.tobytes() == picture.tobytes()
        assert got.info.get("parameters", "") == text
