"""Written files, read back: frames, times, order and texts are what went in; a failure leaves nothing."""

from __future__ import annotations

import errno
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import files_up_to
from PIL import Image

from lib_unsampler.files import whole
from lib_unsampler.pictures import animation, containers, video
from lib_unsampler.pictures.animation import Animation, write, write_png
from lib_unsampler.pictures.background import Background
from lib_unsampler.pictures.containers import quantize
from lib_unsampler.pictures.timing import Timing

# None is nearly black: Pillow 9.5 takes that for black.
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (90, 10, 160), (200, 100, 50)]
TIMES = [0.02, 0.5, 0.1, 1.0, 0.03, 2.5]
TEXT = "a cat, ünïcode 日本\nSteps: 20, Sampler: Euler " * 20
ENDINGS = [".gif", ".apng", ".webp", ".mp4"]
STILL_ENDINGS = ENDINGS[:3]
LOSSY = {".webp": 5, ".mp4": 6}


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noisy(seed: int, size: tuple[int, int] = (80, 70)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Read:
    """What a reader that is not ours finds in a file."""

    frames: list[np.ndarray]
    milliseconds: list[float]
    text: str
    info: dict[str, Any]


def read(path: Path) -> Read:
    return read_video(path) if path.suffix == ".mp4" else read_picture(path)


def read_picture(path: Path) -> Read:
    frames, times = [], []
    with Image.open(path) as picture:
        info = dict(picture.info)
        for i in range(picture.n_frames):
            picture.seek(i)
            picture.load()
            times.append(picture.info["duration"])
            frames.append(np.asarray(picture.convert("RGB")))
        comment = picture.getexif().get_ifd(0x8769).get(0x9286) if path.suffix == ".webp" else None
    if comment is not None:
        return Read(frames, times, comment.removeprefix(b"UNICODE\0").decode("utf-16-be"), info)
    return Read(frames, times, info.get("parameters") or info.get("comment", b"").decode("utf-8"), info)


def read_video(path: Path) -> Read:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        decoded = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
        starts = [1000 * time for _, time in decoded] + [container.duration / 1000]
        text, info = container.metadata.get("comment", ""), dict(container.metadata)
    return Read([f for f, _ in decoded], [b - a for a, b in zip(starts, starts[1:])], text, info)


def needs_codec(ending: str) -> None:
    if ending == ".mp4":
        pytest.importorskip("av")


def assert_colours(found: Read, wanted: list[tuple[int, int, int]], ending: str) -> None:
    assert len(found.frames) == len(wanted)
    for frame, colour in zip(found.frames, wanted):
        assert np.abs(frame.astype(int) - colour).max() <= LOSSY.get(ending, 0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_frame_in_order_for_its_own_time_with_the_text(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    path = tmp_path / f"a{ending}"
    write(path, (flat(c) for c in COLOURS), Timing(TIMES, plays=3), TEXT)
    found = read(path)
    assert_colours(found, COLOURS, ending)
    assert found.milliseconds == pytest.approx([1000 * t for t in TIMES], abs=1e-6)
    assert found.text == TEXT and all(f.shape == (12, 20, 3) for f in found.frames)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", STILL_ENDINGS)
@pytest.mark.parametrize(("plays", "gif"), [(0, 0), (1, None), (7, 6)])
def test_how_often_it_plays(ending: str, plays: int, gif: int | None, tmp_path: Path) -> None:
    """GIF's extension counts the repeats after the first time; without it a GIF plays once."""
    write(tmp_path / f"a{ending}", [flat(c) for c in COLOURS], Timing([0.1] * 6, plays=plays))
    found = read(tmp_path / f"a{ending}")
    assert found.info.get("loop") == (gif if ending == ".gif" else plays)
    assert found.text == ""


@pytest.mark.parametrize("ending", ENDINGS)
def test_identical_neighbours_stay_frames_with_their_time(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    order = [0, 0, 0, 1, 1, 0]
    times = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    write(tmp_path / f"a{ending}", [flat(COLOURS[i]) for i in order], Timing(times))
    found = read(tmp_path / f"a{ending}")
    assert_colours(found, [COLOURS[i] for i in order], ending)
    assert found.milliseconds == pytest.approx([1000 * t for t in times], abs=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("ending", ENDINGS)
def test_there_and_back_with_holds(ending: str, count: int, ping_pong: bool, reverse: bool, tmp_path: Path) -> None:
    needs_codec(ending)
    timing = Timing(TIMES, 0.25, 0.75, reverse, ping_pong)
    write(tmp_path / f"a{ending}", [flat(c) for c in COLOURS[:count]], timing)
    order = list(range(count))[:: -1 if reverse else 1]
    seconds = [TIMES[i] for i in order]
    seconds[0] += 0.25
    seconds[-1] += 0.75
    if ping_pong:
        order, seconds = order + order[-2:0:-1], seconds + seconds[-2:0:-1]
    found = read(tmp_path / f"a{ending}")
    assert_colours(found, [COLOURS[i] for i in order], ending)
    assert found.milliseconds == pytest.approx([1000 * s for s in seconds], abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (80, 70)], ids=str)
def test_gif_frames_are_the_quantized_ones(size: tuple[int, int], tmp_path: Path) -> None:
    """Decoding gives the very pixels that quantizing chose: no frame shows through another."""
    pictures = [noisy(i, size) for i in range(3)]
    write(tmp_path / "a.gif", pictures, Timing([0.1] * 3))
    for got, picture in zip(read(tmp_path / "a.gif").frames, pictures):
        assert got.tobytes() == quantize(picture).convert("RGB").tobytes()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (80, 70)], ids=str)
def test_apng_loses_nothing(size: tuple[int, int], tmp_path: Path) -> None:
    pictures = [noisy(i, size) for i in range(5)]
    write(tmp_path / "a.apng", pictures, Timing([0.1] * 5))
    for got, picture in zip(read(tmp_path / "a.apng").frames, pictures):
        assert got.tobytes() == picture.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (33, 21), (32, 21), (33, 20)], ids=str)
def test_a_video_of_odd_sizes_repeats_its_last_row_and_column(size: tuple[int, int], tmp_path: Path) -> None:
    needs_codec(".mp4")
    write(tmp_path / "a.mp4", [flat(c, size) for c in COLOURS], Timing([0.1] * 6))
    found = read(tmp_path / "a.mp4")
    assert_colours(found, COLOURS, ".mp4")
    assert found.frames[0].shape == (size[1] + size[1] % 2, size[0] + size[0] % 2, 3)


@pytest.mark.parametrize("ending", [".webp", ".mp4"])
def test_lossy_frames_are_near_what_went_in(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    y, x = np.mgrid[:70, :80] / 12.0
    smooth = [np.stack([np.sin(x + k), np.cos(y - k), np.sin(x * y / 9)], -1) for k in range(4)]
    pictures = [Image.fromarray(np.uint8(127.5 * s + 127.5)) for s in smooth]
    write(tmp_path / f"a{ending}", pictures, Timing([0.1] * 4))
    for got, picture in zip(read(tmp_path / f"a{ending}").frames, pictures):
        error = np.sqrt(np.mean((got.astype(float) - np.asarray(picture)) ** 2))
        assert 20 * np.log10(255 / error) > 30


def test_long_times_of_apng_are_hundredths(tmp_path: Path) -> None:
    write(tmp_path / "a.apng", [flat(c) for c in COLOURS[:2]], Timing([65.536, 655.35]))
    assert read(tmp_path / "a.apng").milliseconds == [65540, 655350]


def test_webp_chunks_are_whole_and_count_their_lengths(tmp_path: Path) -> None:
    """The whole file is chunks of even length; readers are lenient about it, browsers less."""
    write(tmp_path / "a.webp", [noisy(i, (31, 17)) for i in range(4)], Timing([0.1] * 4), "odd")
    data = (tmp_path / "a.webp").read_bytes()
    assert struct.unpack("<4sI4s", data[:12]) == (b"RIFF", len(data) - 8, b"WEBP")
    at, kinds = 12, []
    while at < len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        kinds.append(kind)
        at += 8 + length + length % 2
    assert at == len(data) and kinds == [b"VP8X", b"ANIM"] + [b"ANMF"] * 4 + [b"EXIF"]


def test_a_webp_that_grows_too_long_is_refused_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "LONGEST_WEBP", 30_000)
    taken = []
    with pytest.raises(ValueError, match=r"4 GiB at most, and \d+ frames are more"):
        write(tmp_path / "a.webp", (taken.append(i) or noisy(i) for i in range(200)), Timing([0.1] * 200))
    assert len(taken) < 50 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", STILL_ENDINGS)
def test_frames_are_written_as_they_come_not_at_the_end(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    with Background() as background, Animation(path, Timing([0.1] * 60), "", background) as made:
        for i in range(60):
            made.add(noisy(i, (160, 160)))
        (part,) = tmp_path.iterdir()
        before = part.stat().st_size
        made.finish()
        assert [p.name for p in tmp_path.iterdir()] == [path.name] and before > 0.7 * path.stat().st_size


def test_apng_chunks_are_in_order_with_right_sums(tmp_path: Path) -> None:
    write(tmp_path / "a.apng", [noisy(i) for i in range(3)], Timing([0.1] * 3), "text")
    data, at, kinds, sequence = (tmp_path / "a.apng").read_bytes(), 8, [], []
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        if kind in (b"fcTL", b"fdAT"):
            sequence.append(struct.unpack_from(">I", body)[0])
        at += 12 + length
    frames = [b"fcTL", b"IDAT", b"fcTL", b"fdAT", b"fcTL", b"fdAT"]
    assert kinds == [b"IHDR", b"acTL", b"iTXt", *frames, b"IEND"] and sequence == list(range(5))


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


def test_gif_is_near_and_small_beside_pillow_s_own(tmp_path: Path) -> None:
    """On levels of noise: at least 1.5 dB nearer than Pillow's default, and no larger."""
    y, x = np.mgrid[:128, :128] / 20.0
    clean = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) * 0.7
    noise = np.random.default_rng(0).normal(size=clean.shape)
    shown = [(clean + s * noise) / np.sqrt(1 + s * s) for s in np.geomspace(0.03, 14.6, 8)]
    pictures = [Image.fromarray(np.uint8((z.clip(-1, 1) + 1) * 127.5)) for z in shown]
    write(tmp_path / "ours.gif", pictures, Timing([0.1] * 8))
    pictures[0].save(tmp_path / "pillow.gif", save_all=True, append_images=pictures[1:], duration=100)
    errors = {}
    for name in ("ours", "pillow"):
        got = np.array(read(tmp_path / f"{name}.gif").frames, float)
        errors[name] = np.mean((got - np.array([np.asarray(p) for p in pictures])) ** 2)
    assert 10 * np.log10(errors["pillow"] / errors["ours"]) > 1.5
    assert (tmp_path / "ours.gif").stat().st_size < (tmp_path / "pillow.gif").stat().st_size


# What cannot be


def failing(frames: int) -> Iterator[Image.Image]:
    for i in range(frames):
        yield flat(COLOURS[i])
    raise RuntimeError("decoder failed")


BAD: dict[str, tuple[Callable[[Path], None], type[BaseException], str]] = {
    "no frames": (lambda p: write(p, [], Timing([0.1])), ValueError, "0 frames"),
    "too many": (lambda p: write(p, [flat(c) for c in COLOURS], Timing([0.1])), ValueError, "more frames than the 1"),
    "sizes differ": (
        lambda p: write(p, [flat(COLOURS[0]), flat(COLOURS[1], (5, 5))], Timing([1, 1])),
        ValueError,
        r"frame 1 is \(5, 5\), the first was \(20, 12\)",
    ),
    "source fails at once": (lambda p: write(p, failing(0), Timing([1] * 5)), RuntimeError, "decoder failed"),
    "source fails later": (lambda p: write(p, failing(3), Timing([1] * 5)), RuntimeError, "decoder failed"),
    "source fails, reversed": (
        lambda p: write(p, failing(3), Timing([1] * 5, reverse=True)),
        RuntimeError,
        "decoder failed",
    ),
}


@pytest.mark.parametrize("old", [None, b"the old file"], ids=["new", "old"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("case", BAD)
def test_a_failing_writer_leaves_nothing_and_keeps_the_old_file(
    case: str, ending: str, old: bytes | None, tmp_path: Path
) -> None:
    needs_codec(ending)
    writer, error, message = BAD[case]
    path = tmp_path / f"a{ending}"
    if old:
        path.write_bytes(old)
    with pytest.raises(error, match=message):
        writer(path)
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if old else [])
    assert not old or path.read_bytes() == old


TOO_LARGE = {".gif": ((65536, 1), "65535"), ".webp": ((1, 16384), "16383"), ".mp4": ((16386, 2), "16384")}


@pytest.mark.parametrize("ending", TOO_LARGE)
def test_a_size_beyond_the_format_is_refused(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    size, named = TOO_LARGE[ending]
    with pytest.raises(ValueError, match=f"above the format's {named}"):
        write(tmp_path / f"a{ending}", [flat(COLOURS[0], size)], Timing([1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_largest_size_is_written(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    side = {".gif": 65535, ".apng": 70000, ".webp": 16383, ".mp4": 16384}[ending]
    write(tmp_path / f"a{ending}", [flat(COLOURS[0], (side, 2))], Timing([1]))
    found = read(tmp_path / f"a{ending}")
    assert found.frames[0].shape == (2, side, 3)
    assert_colours(found, COLOURS[:1], ending)


@pytest.mark.parametrize("ending", STILL_ENDINGS)
def test_a_time_beyond_the_format_is_refused_before_any_frame(ending: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a frame is shown 20000 s, above the format's"):
        write(tmp_path / f"a{ending}", failing(0), Timing([1.0, 19000.0], hold_last=1000.0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["x" * 300, "taken", "file/below"])
def test_a_name_that_cannot_be_is_refused_before_any_frame(name: str, ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    (tmp_path / f"taken{ending}").mkdir()
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / f"{name}{ending}"
    with pytest.raises(OSError) as caught:
        write(path, failing(0), Timing([0.1]))
    assert str(path) in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {f"taken{ending}", "file"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_frame_that_is_written_may_be_saved_by_others_meanwhile(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow keeps a save's options in the picture: two at once mix them up."""
    frame, save, saved = noisy(1), Image.Image.save, []

    def watched(picture: Image.Image, *args: Any, **options: Any) -> None:
        saved.append(picture)
        save(picture, *args, **options)

    monkeypatch.setattr(Image.Image, "save", watched)
    animation.FORMATS[ending].encode(frame, 80)
    assert not any(one is frame for one in saved)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files of Linux")
@pytest.mark.parametrize("ending", [".gif", ".apng"])
def test_what_fails_at_the_head_leaves_no_open_file(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open file cannot be removed on Windows."""
    unlink, still = Path.unlink, []

    def watched(path: Path, **options: bool) -> None:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        still.extend(link for link in links if os.readlink(link) == str(path))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / f"a{ending}", [noisy(i) for i in range(9)], Timing([0.1] * 9), "\ud800")
    assert still == [] and list(tmp_path.iterdir()) == []


def test_an_error_of_others_keeps_its_name(tmp_path: Path) -> None:
    def frames() -> Iterator[Image.Image]:
        yield noisy(1)
        Path("/nonexistent/source").read_bytes()

    with pytest.raises(FileNotFoundError, match="/nonexistent/source"):
        write(tmp_path / "a.gif", frames(), Timing([0.1] * 9))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_name_may_be_as_long_as_the_system_allows(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    path = tmp_path / ("x" * (255 - len(ending)) + ending)
    write(path, [flat(COLOURS[0])], Timing([0.1]))
    assert_colours(read(path), COLOURS[:1], ending)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.parametrize("order", [{}, {"reverse": True}, {"ping_pong": True}], ids=["forward", "reverse", "ping-pong"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_disk_that_fills_up_is_said_and_leaves_nothing(ending: str, order: dict[str, bool], tmp_path: Path) -> None:
    needs_codec(ending)
    frames = [noisy(i, (160, 160)) for i in range(20)]
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"the old file")
    with files_up_to(100_000), pytest.raises(OSError) as caught:
        write(path, frames, Timing([0.1] * 20, **order))
    assert caught.value.errno == errno.EFBIG and str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"the old file"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_a_video_that_fails_while_its_thread_is_at_work_fails_cleanly(tmp_path: Path) -> None:
    """Large frames at once: the thread still has some when the first one's failure is known."""
    needs_codec(".mp4")
    frames = [noisy(i, (640, 640)) for i in range(6)]
    for _ in range(5):
        with files_up_to(50_000), pytest.raises(OSError, match="a.mp4"):
            write(tmp_path / "a.mp4", frames * 3, Timing([0.1] * 18))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_that_cannot_be_written_is_refused_before_any_frame(ending: str, tmp_path: Path) -> None:
    needs_codec(ending)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=f"a{ending}"):
            write(tmp_path / f"a{ending}", failing(0), Timing([0.1]))
    finally:
        tmp_path.chmod(0o700)


def test_without_pyav_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="needs PyAV.*pip install av"):
        write(tmp_path / "a.mp4", failing(0), Timing([0.1]))
    assert video.HOW_TO_GET and list(tmp_path.iterdir()) == []


def test_without_webp_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation.features, "check", lambda name: False)
    with pytest.raises(ValueError, match="without WebP"):
        write(tmp_path / "a.webp", failing(0), Timing([0.1]))


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


def test_a_picture_that_cannot_be_a_png_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_png(tmp_path / "a.png", Image.new("HSV", (4, 4)))
    assert list(tmp_path.iterdir()) == []
