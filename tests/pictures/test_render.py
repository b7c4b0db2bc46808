"""Pictures of latents: exact pixels, the source untouched outside a mask, every frame on the sheet in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from lib_unsampler.core.noising import blend
from lib_unsampler.pictures.render import (
    ACCENT,
    INK,
    beside,
    caption,
    captioned,
    captioned_panel,
    contact_sheet,
    in_chunks,
    sigma_curve,
    sigma_text,
    thumbnail,
    to_pictures,
    viewed,
)

COLOURS = [(200, 20, 10 * i) for i in range(13)]


def regions(page: Image.Image, colour: tuple[int, int, int]) -> list[tuple[slice, slice]]:
    """Bounding boxes of the connected patches of a colour."""
    found = (np.asarray(page) == colour).all(-1)
    return ndimage.find_objects(ndimage.label(found, np.ones((3, 3)))[0])


def test_every_pixel_value_survives_latent_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    one, two = to_pictures(pixels / 255 * 2 - 1)
    assert (np.asarray(one)[..., 1] == np.arange(256).reshape(16, 16)).all()
    assert one.tobytes() == two.tobytes() and one.mode == "RGB"


def test_values_outside_the_range_clip_and_channels_keep_their_place() -> None:
    (picture,) = to_pictures(torch.tensor([-9.0, 9.0, 0.01]).reshape(1, 3, 1, 1).half())
    assert picture.getpixel((0, 0)) == (0, 255, 129)  # 1.01 * 127.5 = 128.8


@pytest.mark.parametrize("view", ["variance preserving", "raw"])
@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_view_scales_the_noisy_part_alone(view: str, prediction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z, source = torch.randn(2, 1, 3, 6, 5, generator=generator)
    mask, sigma = torch.linspace(0, 1, 5).expand(1, 1, 6, 5), torch.tensor(3.0)
    scale = 10**0.5 if (view, prediction) == ("variance preserving", "eps") else 1.0
    torch.testing.assert_close(viewed(z, source, None, sigma, prediction, view), z / scale)
    shown = viewed(blend(z, source, mask), source, mask, sigma, prediction, view)
    torch.testing.assert_close(shown, mask * z / scale + (1 - mask) * source, rtol=1e-5, atol=1e-6)
    assert torch.equal(shown[..., 0], source[..., 0])  # where the mask is 0


@pytest.mark.parametrize("count", [1, 2, 5, 13])
@pytest.mark.parametrize("size", [(40, 30), (20, 150), (190, 9), (1, 1)], ids=str)
def test_contact_sheet_holds_every_frame_whole_and_in_order(count: int, size: tuple[int, int]) -> None:
    frames = [Image.new("RGB", size, c) for c in COLOURS[:count]]
    page = contact_sheet(frames, [sigma_text(i) for i in range(count)])
    corners = []
    for colour in COLOURS[:count]:
        (box,) = regions(page, colour)
        assert (box[1].stop - box[1].start, box[0].stop - box[0].start) == size
        corners.append((box[0].start, box[1].start))
    assert corners == sorted(corners)  # read like a page


def test_contact_sheet_writes_each_caption_below_its_frame() -> None:
    frames = [Image.new("RGB", (96, 50), c) for c in COLOURS[:2]]
    bare, captioned = contact_sheet(frames, ["", ""]), contact_sheet(frames, ["", "sigma 14.6"])
    changed = np.argwhere((np.asarray(bare) != np.asarray(captioned)).any(-1))
    (box,) = regions(bare, COLOURS[1])
    assert len(changed) and changed[:, 0].min() >= box[0].stop and changed[:, 1].min() >= box[1].start


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        contact_sheet([], [])


@pytest.mark.parametrize(("size", "small"), [((384, 192), (192, 96)), ((100, 50), (100, 50)), ((5000, 2), (192, 1))])
def test_thumbnails_shrink_and_never_grow(size: tuple[int, int], small: tuple[int, int]) -> None:
    assert thumbnail(Image.new("RGB", size)).size == small


def test_sigma_curve_marks_each_kept_level_at_its_height() -> None:
    schedule = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.0])
    kept = (5, 2, 0)
    boxes = sorted(regions(sigma_curve(schedule, kept), ACCENT), key=lambda b: b[1].start)
    bare = np.asarray(sigma_curve(schedule, ()))
    across = [(b[1].start + b[1].stop) / 2 for b in boxes]
    down = [(b[0].start + b[0].stop) / 2 for b in boxes]
    wide, high = np.polyfit([0, 2, 5], across, 1), np.polyfit(np.log10([10, 1, 0.03]), down, 1)
    for x, y in zip(across, down):  # on the curve
        assert (bare[int(y) - 1 : int(y) + 2, int(x)] == INK).all(-1).any()
    assert len(boxes) == len(kept) and wide[0] > 0 > high[0]  # later is right, noisier is up
    np.testing.assert_allclose(np.polyval(wide, [0, 2, 5]), across, atol=1)  # straight in the step
    np.testing.assert_allclose(np.polyval(high, np.log10([10, 1, 0.03])), down, atol=1)  # and in log sigma


@pytest.mark.parametrize("schedule", [[1.0, 0.0], [2.0, 2.0, 0.0], [1.0], [160.0, 1e-3, 0.0, 0.0]], ids=str)
def test_sigma_curve_of_odd_schedules(schedule: list[float]) -> None:
    page = sigma_curve(torch.tensor(schedule), range(len(schedule)))
    noisy = sum(s > 0 for s in schedule)
    assert page.size == (720, 405) and len(regions(page, ACCENT)) == noisy


class OutOfMemoryError(RuntimeError):
    """As torch on MPS and the CPU tells it: in words alone."""


def limited(most: int, tried: list[int]) -> Callable[[list[int]], list[list[int]]]:
    """A decoder that has room for ``most`` levels at once."""

    def decode(levels: list[int]) -> list[list[int]]:
        tried.append(len(levels))
        if len(levels) > most:
            raise OutOfMemoryError("MPS backend out of memory")
        return [[10 * level] for level in levels]

    return decode


@pytest.mark.parametrize("count", [0, 1, 7, 20])
@pytest.mark.parametrize(("chunk", "most"), [(1, 1), (8, 8), (8, 5), (8, 1), (5, 2), (7, 3)])
def test_chunks_are_halved_until_they_fit_and_no_level_is_lost(count: int, chunk: int, most: int) -> None:
    tried: list[int] = []
    freed: list[int] = []
    pulled = iter(range(count))
    found = list(in_chunks(pulled, limited(most, tried), chunk, lambda: freed.append(1)))
    assert found == [(i, [10 * i]) for i in range(count)]
    assert len(freed) == sum(size > most for size in tried)  # tried again after each
    failed = [size for size in tried if size > most]
    assert all(after == before // 2 for before, after in zip(failed, failed[1:])) and len(set(failed)) == len(failed)


def test_not_even_one_level_fits() -> None:
    with pytest.raises(MemoryError, match="not even one frame can be decoded"):
        list(in_chunks(range(9), limited(0, []), 8))


def test_other_errors_of_a_decoder_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_chunks([1], lambda levels: [[1 / 0]], 4))


def test_chunks_are_pulled_only_as_they_are_needed() -> None:
    pulled = 0

    def source() -> Iterator[int]:
        nonlocal pulled
        for pulled in range(1, 100):  # noqa: UP028 (the test reads pulled)
            yield pulled

    stream = in_chunks(source(), limited(8, []), 4)
    next(stream)
    assert pulled == 4
    for _ in range(4):
        next(stream)
    assert pulled == 8


@pytest.mark.parametrize("size", [(512, 512), (512, 200), (96, 300), (24, 16), (1, 1)], ids=str)
@pytest.mark.parametrize("shade", [0, 127, 255])
def test_captions_are_legible_on_any_frame_and_scale_with_it(shade: int, size: tuple[int, int]) -> None:
    frame = Image.new("RGB", size, (shade,) * 3)
    page = captioned(frame, caption(7, 3.21, 801.2, "independent"))
    assert page.size == size and frame.getpixel((0, 0)) == (shade,) * 3
    if size != (512, 512):
        return
    rows = (np.asarray(page) != np.asarray(frame)).any(-1).any(1)
    ground = 512 - 2 * (512 // 20 + 8) - 6  # two lines at most
    assert not rows[:ground].any() and rows[-1] == (shade > 0)
    white = np.argwhere((np.asarray(page)[ground:] == 255).all(-1) & (np.asarray(page)[ground:, :1] < 100).all(-1))
    assert np.ptp(white[:, 0]) > 512 / 20 * 0.5 and np.ptp(white[:, 1]) > 100


def test_a_narrow_frame_gets_its_caption_in_lines() -> None:
    wide, narrow = (captioned(Image.new("RGB", (w, 200)), caption(7, 3.21, None, "path")) for w in (300, 60))
    rows = [np.flatnonzero((np.asarray(p) > 128).all(-1).any(1)) for p in (wide, narrow)]
    assert np.ptp(rows[1]) > 2 * np.ptp(rows[0])


def test_what_captions_say() -> None:
    assert caption(None, 0.0, None, "shared") == ["source", "sigma 0"]
    assert caption(3, 14.6146, 999.0, "path") == ["step 3", "sigma 14.6", "t 999", "path"]
    assert caption(3, 0.5, None, "path") == ["step 3", "sigma 0.5", "path"]


def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float, float]]:
    """Every text that is written from now on, with its left, right and top."""
    written: list[tuple[str, float, float, float]] = []
    own = ImageDraw.ImageDraw.text

    def noted(self: ImageDraw.ImageDraw, at: tuple[float, float], text: str, **options: Any) -> None:
        left, _, right, _ = options["font"].getbbox(text)
        written.append((text, at[0], at[0] + right - left, at[1]))
        own(self, at, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return written


def test_labels_sit_on_their_ticks_and_words_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    schedule = torch.cat([torch.logspace(1, -1, 21), torch.zeros(1)])
    boxes = sorted(regions(sigma_curve(schedule, range(0, 21, 3)), ACCENT), key=lambda b: b[1].start)
    middles = [(b[1].start + b[1].stop) / 2 for b in boxes]
    labels = {text: (left + right) / 2 for text, left, right, _ in written if text.isdigit()}
    for index, middle in zip(range(0, 21, 3), middles):
        assert abs(labels[str(index)] - middle) <= 1, index
    assert any(text == "sigma of each step; 7 levels kept" for text, *_ in written)
    sigma_curve(schedule, [4])
    assert any(text == "sigma of each step; 1 level kept" for text, *_ in written)


def test_the_curve_has_no_steps() -> None:
    """Along its lower edge the grey of a smooth line changes little by little: many shades, not two."""
    page = np.asarray(sigma_curve(torch.logspace(1, 0.8, 5), ()))
    assert len(np.unique(page[60:340, 100:600].reshape(-1, 3), axis=0)) > 12


@pytest.mark.parametrize("size", [(160, 120), (96, 72), (64, 48), (48, 64), (32, 24), (24, 24)], ids=str)
def test_no_letter_of_a_caption_is_cut_off(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pasted: list[tuple[int, int, int, int]] = []
    own = Image.Image.paste

    def noted(self: Image.Image, im: Any, box: Any = None, mask: Any = None) -> None:
        if mask is not None:
            pasted.append((*box, box[0] + mask.width, box[1] + mask.height))
        own(self, im, box, mask)

    monkeypatch.setattr(Image.Image, "paste", noted)
    page = captioned(Image.new("RGB", size, (90, 90, 90)), caption(17, 3.21, 801.2, "independent"))
    assert pasted and all(box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1] for box in pasted)
    rows = (np.asarray(page) != 90).any(-1).any(1)
    assert min(size) < 48 or rows.sum() <= size[1] // 2 + 1


def test_a_panel_is_captioned_picture_by_picture() -> None:
    parts = [Image.new("RGB", (120, 90), (90 + 20 * i,) * 3) for i in range(3)]
    words = [["source"], ["step 3", "sigma 2"], ["what the model sees in it"]]
    page = captioned_panel(beside(parts), words)
    assert page.size == (360, 90)
    for number, (part, pieces) in enumerate(zip(parts, words)):
        box = (120 * number, 0, 120 * number + 120, 90)
        assert page.crop(box).tobytes() == captioned(part, pieces).tobytes() != part.tobytes()
