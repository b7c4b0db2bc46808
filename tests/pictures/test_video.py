"""What a player finds in an MP4: a level that hardware decodes, colours that are said and right, exact times."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_unsampler.pictures import timing, video
from lib_unsampler.pictures.animation import write
from lib_unsampler.pictures.timing import Timing

av = pytest.importorskip("av")

CAT = Path(__file__).resolve().parents[2] / "lib_unsampler/assets/cat.jpg"
MATRICES = {1: "bt709", 5: "bt601", 6: "bt601"}
EXACT = 0x42004
"""swscale's BICUBIC, FULL_CHR_H_INT and ACCURATE_RND: without, its own rounding makes everything darker by 1 of 255."""
SIGMAS = [0.0, *np.geomspace(0.03, 14.6, 8).tolist()]
PATCH = 32


def decoded(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def shown(frame: Any) -> np.ndarray:
    """A frame's colours by its tags; a player that finds none takes BT.709, as for any picture of today."""
    matrix = {"bt709": 1, "bt601": 5}[MATRICES.get(int(frame.colorspace), "bt709")]
    way = {"src_colorspace": matrix, "dst_colorspace": matrix, "interpolation": EXACT}
    return frame.reformat(format="rgb24", **way).to_ndarray().astype(float)


def tags(path: Path) -> tuple[int, ...]:
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        return (*map(int, (context.color_primaries, context.color_trc, context.colorspace, context.color_range)),)


def level(path: Path) -> int:
    """Ten times the level, from the decoder's configuration record."""
    with av.open(str(path)) as container:
        return bytes(container.streams.video[0].codec_context.extradata)[3]


def untagged(path: Path, picture: Image.Image) -> None:
    """The file as libav makes it of an RGB frame where nothing is said of colours."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options=video.OPTIONS)
        stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])


def patches(seed: int) -> tuple[Image.Image, np.ndarray]:
    """8 x 8 flat patches: the corners of the colour cube, black to white, and any others."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    colours[0] = [[255 * (i >> 2), 255 * (i >> 1 & 1), 255 * (i & 1)] for i in range(8)]
    colours[1] = np.linspace(0, 255, 8, dtype=np.uint8)[:, None]
    return Image.fromarray(colours.repeat(PATCH, 0).repeat(PATCH, 1)), colours.astype(float)


def off_inside(found: np.ndarray, colours: np.ndarray) -> float:
    """The largest error inside the patches: half of their width."""
    blocks = found.reshape(8, PATCH, 8, PATCH, 3)[:, PATCH // 4 : -PATCH // 4, :, PATCH // 4 : -PATCH // 4]
    return float(np.abs(blocks - colours[:, None, :, None]).max())


@pytest.mark.parametrize("seed", range(4))
def test_flat_patches_keep_their_colours(seed: int, tmp_path: Path) -> None:
    picture, colours = patches(seed)
    write(tmp_path / "ours.mp4", [picture] * 3, Timing([0.1] * 3))
    untagged(tmp_path / "untagged.mp4", picture)
    assert tags(tmp_path / "ours.mp4") == (1, 1, 1, 1) and tags(tmp_path / "untagged.mp4")[:3] == (2, 2, 2)
    for frame in decoded(tmp_path / "ours.mp4"):
        assert off_inside(shown(frame), colours) <= 3
    (frame,) = decoded(tmp_path / "untagged.mp4")
    assert off_inside(shown(frame), colours) > 15


def test_the_cat_keeps_its_mean_colour(tmp_path: Path) -> None:
    cat = Image.open(CAT).convert("RGB")
    write(tmp_path / "ours.mp4", [cat] * 3, Timing([0.1] * 3))
    untagged(tmp_path / "untagged.mp4", cat)
    wanted = np.asarray(cat).mean((0, 1))
    for frame in decoded(tmp_path / "ours.mp4"):
        assert np.abs(shown(frame).mean((0, 1)) - wanted).max() <= 1
    (frame,) = decoded(tmp_path / "untagged.mp4")
    assert np.abs(shown(frame).mean((0, 1)) - wanted).max() > 3


@pytest.mark.parametrize(
    "times", [timing.even, timing.log_sigma, lambda sigmas, _: [0.02, 2.5, 0.033] * (len(sigmas) // 3)]
)
def test_the_level_is_the_mean_frame_rate_s_and_times_stay_exact(
    times: Callable[..., list[float]], tmp_path: Path
) -> None:
    """Of 64 x 64 blocks of 16: level 3.2 holds pictures so large, and 52 of them a second (ITU-T H.264, A.3)."""
    durations = times(SIGMAS, 0.1)
    noise = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    frames = (Image.fromarray(np.roll(noise, i, 0)).resize((1024, 1024)) for i in range(len(durations)))
    write(tmp_path / "a.mp4", frames, Timing(durations))
    assert level(tmp_path / "a.mp4") == 32
    ticks, ends = timing.Ticks(1000), [0]
    for seconds in durations:
        ends.append(ends[-1] + ticks.next(max(seconds, timing.SHORTEST)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        starts = [Fraction(frame.pts) * frame.time_base * 1000 for frame in container.decode(video=0)]
        assert [*starts, Fraction(container.duration, 1000)] == ends
        mean = Fraction(1000 * len(durations), ends[-1])
        assert float(container.streams.video[0].average_rate) == pytest.approx(float(mean), rel=1e-4)


def test_the_level_is_as_low_as_the_size_allows(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", [Image.new("RGB", (128, 128), (9, 90, 200))] * 4, Timing([0.1] * 4))
    assert level(tmp_path / "a.mp4") <= 11
