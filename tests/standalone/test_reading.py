"""One reader for pictures and masks: every mode of Pillow, orientation, profile and depth to the right values."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from lib_unsampler.standalone import formats, reading
from lib_unsampler.standalone.reading import UnreadableError, load_mask, load_picture

ROOT = Path(__file__).resolve().parents[2]
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
"""Every 8-bit value."""
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
ALPHA = np.ascontiguousarray(RAMP[:, ::-1])


def seen(tensor: Tensor) -> np.ndarray:
    """A loaded picture's or mask's pixels on 0 to 255, with shape (H, W) or (H, W, 3)."""
    values = (tensor[0].permute(1, 2, 0).double().numpy() + (tensor.shape[1] == 3)) * (
        127.5 if tensor.shape[1] == 3 else 255
    )
    return values.squeeze(-1) if tensor.shape[1] == 1 else values


def held(picture: Image.Image, **extra: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the reader makes of a picture in memory: as a picture and as a mask, on 0 to 255."""
    picture.info.update(extra)
    colours, greys = (kind(picture, lambda _: None)(picture) for kind in (reading.colours, reading.greys))
    assert colours.mode == "RGB" and greys.mode == "L"
    return np.asarray(colours, float), np.asarray(greys, float)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def grey_of(colour: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, Pillow's grey."""
    return colour @ [0.299, 0.587, 0.114]


def same(found: tuple[np.ndarray, np.ndarray], colour: np.ndarray, weight: np.ndarray, within: float = 1.01) -> None:
    colour = np.repeat(colour[..., None], 3, -1) if colour.ndim == 2 else colour
    assert np.abs(found[0] - colour).max() <= within
    assert np.abs(found[1] - weight).max() <= within


# Modes


def test_greys_of_8_bits_and_fewer() -> None:
    same(held(Image.fromarray(RAMP)), RAMP, RAMP, 0)
    same(held(Image.fromarray(RAMP > 100)), 255.0 * (RAMP > 100), 255 * (RAMP > 100), 0)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bits_are_a_257th_of_their_value(mode: str) -> None:
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    deep = Image.frombytes(mode, (16, 16), (RAMP.astype(order) * 257).tobytes())
    same(held(deep), RAMP, RAMP, 0)


@pytest.mark.parametrize(
    ("mode", "top"), [("I", 255), ("I", 65535), ("I", 2**31 - 1), ("F", 1.0), ("F", 255.0), ("F", 65535.0)]
)
def test_deeper_greys_have_the_smallest_usual_range_and_say_so(mode: str, top: float, tmp_path: Path) -> None:
    values = RAMP / 255 * top
    path, told = tmp_path / "deep.tiff", []
    Image.fromarray(np.rint(values).astype(np.int32) if mode == "I" else values.astype(np.float32)).save(path)
    assert np.abs(seen(load_picture(path, 512, told.append))[..., 1] - RAMP).max() <= 0.51
    assert np.abs(seen(load_mask(path, 16, 16, told.append)) - RAMP).max() <= 0.51
    assert len(told) == 2 and all(f"to {top:g} (white)" in line for line in told)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(wrong: float, tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[3, 4] = wrong
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(UnreadableError, match=r"a\.tiff: not a readable picture \(its values are not all numbers"):
        load_picture(tmp_path / "a.tiff", 512)


def test_a_12_bit_or_inverted_tiff_has_its_own_range() -> None:
    deep = Image.fromarray((RAMP * (4095 / 255)).round().astype(np.uint16))
    deep.format, deep.tag_v2 = "TIFF", {258: (12,), 262: 0}
    same(held(deep), 255.0 - RAMP, 255.0 - RAMP, 0.51)


def test_colours_without_transparency() -> None:
    picture = Image.fromarray(COLOUR)
    same(held(picture), COLOUR, grey_of(COLOUR))
    same(held(picture.convert("RGBX")), COLOUR, grey_of(COLOUR))
    palette = picture.quantize(256)
    there = np.asarray(palette.convert("RGB"), float)
    same(held(palette), there, grey_of(there))
    for mode, within in (("YCbCr", 3), ("HSV", 6)):
        same(held(picture.convert(mode)), COLOUR, grey_of(COLOUR), within)
    same(held(ImageOps.invert(picture).convert("CMYK")), 255.0 - COLOUR, grey_of(255.0 - COLOUR), 2)


def test_lab_is_read_by_its_definition() -> None:
    """Grey 119 is L 50; Lab of pure sRGB red under D50 is about (54.3, 80.8, 69.9)."""
    grey = Image.new("LAB", (1, 1), (128, 128, 128))
    red = Image.new("LAB", (1, 1), (round(54.3 * 2.55), 128 + 81, 128 + 70))
    same(held(grey), np.full((1, 1, 3), 119.0), np.full((1, 1), 119.0), 2)
    same(held(red), np.array([[[255.0, 0, 0]]]), np.array([[76.0]]), 6)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_transparency_lies_on_white_and_takes_weight_from_a_mask(mode: str) -> None:
    colour = np.repeat(RAMP[..., None], 3, -1) if mode in ("LA", "La", "PA") else COLOUR
    alpha = np.where(ALPHA < 8, 8, ALPHA).astype(np.uint8)  # premultiplied colours of a thin alpha are coarse
    picture = Image.fromarray(np.concatenate([colour, alpha[..., None]], -1))
    if mode == "PA":
        picture = Image.fromarray(RAMP).convert("P")
        picture.putalpha(Image.fromarray(alpha))
        assert picture.mode == "PA"
    else:
        picture = picture.convert({"RGBa": "RGBa", "RGBA": "RGBA"}.get(mode, "LA")).convert(mode)
    same(held(picture), on_white(colour, alpha), grey_of(colour) * alpha / 255, 3)


def test_a_colour_or_palette_entry_may_be_the_transparent_one() -> None:
    key = tuple(int(v) for v in COLOUR[3, 5])
    clear = np.isin(COLOUR, key).all(-1) & (COLOUR[..., 0] == key[0])
    same(
        held(Image.fromarray(COLOUR), transparency=key),
        np.where(clear[..., None], 255, COLOUR),
        np.where(clear, 0, grey_of(COLOUR)),
    )
    same(held(Image.fromarray(RAMP), transparency=7), np.where(RAMP == 7, 255, RAMP), np.where(RAMP == 7, 0, RAMP))
    palette = Image.fromarray(RAMP).convert("P")
    palette.putpalette([v for v in range(256) for _ in range(3)])
    same(held(palette, transparency=9), np.where(RAMP == 9, 255, RAMP), np.where(RAMP == 9, 0, RAMP))
    alpha = bytes(ALPHA.reshape(-1).tolist())
    found = held(palette, transparency=alpha)
    share = np.frombuffer(alpha, np.uint8)[RAMP] / 255
    same(found, RAMP * share + 255 * (1 - share), RAMP * share)
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    same(held(deep, transparency=7 * 257), np.where(RAMP == 7, 255, RAMP), RAMP, 0)


def test_every_mode_of_pillow_is_tried_here() -> None:
    here = Path(__file__).read_text()
    assert all(f'"{mode}"' in here for mode in Image.MODES if mode not in ("1", "L", "P", "RGB")), Image.MODES


# Orientation, profiles, frames, formats


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_honoured_by_pictures_and_masks(orientation: int, ending: str, tmp_path: Path) -> None:
    upright = np.kron(np.array([[255, 0, 90], [160, 40, 220]], np.uint8), np.ones((16, 16), np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif, path = Image.Exif(), tmp_path / f"a.{ending}"
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(ending, {})
    Image.fromarray(np.ascontiguousarray(stored)).convert("L" if ending != "webp" else "RGB").save(
        path, exif=exif, **options
    )
    assert np.abs(seen(load_picture(path, 512))[..., 0] - upright).max() <= 2
    assert np.abs(seen(load_mask(path, *upright.shape)) - upright).max() <= 2


def profile(kind: str) -> bytes:
    """An ICC profile: matrix-shaper RGB with red and blue exchanged, or Lab."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()


def exchanged() -> bytes:
    """The sRGB profile with its red and blue primaries exchanged: a picture in it has them exchanged too."""
    data = bytearray(profile("sRGB"))
    count = int.from_bytes(data[128:132], "big")
    entries = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data)


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_follow_the_icc_profile(alpha: bool, tmp_path: Path) -> None:
    picture = Image.fromarray(COLOUR)
    if alpha:
        picture.putalpha(Image.fromarray(ALPHA))
    for data, order in ((profile("sRGB"), [0, 1, 2]), (exchanged(), [2, 1, 0])):
        picture.save(tmp_path / "a.png", icc_profile=data)
        truth = COLOUR[..., order]
        truth = on_white(truth, ALPHA) if alpha else truth
        assert np.abs(seen(load_picture(tmp_path / "a.png", 512)) - truth).max() <= 2


def test_a_profile_that_does_not_fit_is_said_and_not_used() -> None:
    told: list[str] = []
    picture = Image.fromarray(COLOUR)
    picture.info["icc_profile"] = b"no profile"
    assert np.array_equal(np.asarray(reading.colours(picture, told.append)(picture)), COLOUR)
    assert told == ["its ICC profile does not fit its colours and is not used"]


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_the_first_of_several_frames_is_taken_and_said(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), c) for c in ((200, 10, 30), (0, 255, 0), (0, 0, 255))]
    frames[0].save(
        tmp_path / f"a.{ending}",
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if ending == "webp" else {}),
    )
    told: list[str] = []
    assert np.abs(seen(load_picture(tmp_path / f"a.{ending}", 512, told.append)) - (200, 10, 30)).max() <= 1
    load_mask(tmp_path / f"a.{ending}", 6, 8, told.append)
    assert told == ["holds 3 frames; the first is taken"] * 2


@pytest.mark.parametrize(
    "ending", ["avif", "jfif", "tga", "bmp", "qoi", "pgm", "jp2", "pcx", "dds", "ico", "sgi", "im"]
)
def test_what_pillow_reads_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("L" if ending == "pgm" else "RGB", (32, 32), 100 if ending == "pgm" else (100, 100, 100)).save(path)
    assert f".{ending}" in formats.ENDINGS
    assert np.abs(seen(load_picture(path, 512)) - 100).max() <= 3


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_nothing_that_would_start_a_helper_program_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / name, "EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UnreadableError, match=f"{name}: not a readable picture .EPS is refused"):
        load_picture(tmp_path / name, 512)
    assert not set(formats.READ) & {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"} and ".eps" not in formats.ENDINGS


def test_what_is_no_picture_is_told_the_formats(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UnreadableError, match="none of AVIF, .*JPEG, .*PNG, "):
        load_picture(tmp_path / "a.png", 512)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_file_is_unreadable_or_read_and_never_another_error(seed: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(seed)
    for ending in ("png", "jpg", "gif", "webp", "tiff", "bmp", "tga", "jp2", "avif", "ico", "pcx"):
        made = io.BytesIO()
        Image.fromarray(COLOUR).save(made, {"jpg": "JPEG", "jp2": "JPEG2000"}.get(ending, ending.upper()))
        data = bytearray(made.getvalue())
        for at in generator.integers(0, len(data), 6):
            data[at] = generator.integers(0, 256)
        (tmp_path / f"a.{ending}").write_bytes(bytes(data[: generator.integers(len(data) // 2, len(data) + 1)]))
        with suppress(UnreadableError):
            assert torch.isfinite(load_picture(tmp_path / f"a.{ending}", 64)).all()


# Size


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "F", "CMYK"])
def test_a_large_picture_shrinks_to_what_lanczos_makes_of_it(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BAND", 5000)
    cat = Image.open(ROOT / "lib_unsampler/assets/cat.jpg").convert("RGB").resize((1003, 617))
    deep = np.asarray(cat.convert("L"))
    if mode in ("I;16", "F"):
        picture = Image.fromarray(deep.astype(np.uint16) * 257 if mode == "I;16" else deep.astype(np.float32) / 255)
    else:
        picture = cat.convert(mode)
    picture.save(tmp_path / "a.tiff")
    truth = cat.convert("L").convert("RGB") if mode in ("I;16", "F", "L") else picture.convert("RGB")
    for size in (64, 500, 1003):
        found = seen(load_picture(tmp_path / "a.tiff", size))
        wanted = np.asarray(truth.resize((size, round(617 * size / 1003)), Image.Resampling.LANCZOS), float)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).mean() < 1 and np.abs(found - wanted).max() < 12


def test_a_jpeg_is_decoded_at_the_size_it_takes(tmp_path: Path) -> None:
    cat = Image.open(ROOT / "lib_unsampler/assets/cat.jpg").convert("RGB").resize((4000, 3001))
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.save(tmp_path / "a.jpg", quality=95, exif=exif)
    found = seen(load_picture(tmp_path / "a.jpg", 160))
    wanted = np.rot90(np.asarray(cat.resize((160, 120), Image.Resampling.LANCZOS), float), -1)
    assert found.shape == wanted.shape == (160, 120, 3) and np.abs(found - wanted).mean() < 1.5


def test_a_mask_of_another_shape_is_stretched_and_says_so(tmp_path: Path) -> None:
    Image.new("L", (60, 20), 255).save(tmp_path / "m.png")
    told: list[str] = []
    assert load_mask(tmp_path / "m.png", 30, 40, told.append).shape == (1, 1, 30, 40)
    assert told == ["stretched from 60 x 20 to the picture's 40 x 30"]
    Image.new("LA", (40, 30), (255, 0)).save(tmp_path / "m.png")
    load_mask(tmp_path / "m.png", 15, 20, told.append)
    assert told[1:] == ["black or transparent everywhere: nothing is unsampled"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_the_largest_picture_takes_little_more_than_its_own_pixels(tmp_path: Path) -> None:
    """12000 x 12000 in one bit: 144 MB as Pillow decodes it, 576 MB as RGBA; what is added is bounded."""
    Image.new("1", (12000, 12000), 1).save(tmp_path / "a.png")
    program = (
        "import resource, sys; from pathlib import Path; from lib_unsampler.standalone.reading import load_picture\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); x = load_picture(Path(sys.argv[1]), 512); print(*x.shape, float(x.min()), peak() - before)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-c", program, str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    *shape, least, added = done.stdout.split()
    assert shape == ["1", "3", "512", "512"] and float(least) == 1 and int(added) < 350_000
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 30


@pytest.mark.parametrize("size", [(3, 400_000), (400_000, 3)], ids=["tall", "wide"])
def test_a_strip_is_made_small_band_by_band(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by fuzzing: a TIFF of 362 bytes, 12 x 14221322, was held once more in full colour."""
    ramp = Image.linear_gradient("L").resize((3, 400_000), Image.Resampling.BOX)
    (ramp if size[0] == 3 else ramp.transpose(Image.Transpose.TRANSPOSE)).save(tmp_path / "strip.png")
    new, made = Image.new, []
    monkeypatch.setattr(reading.Image, "new", lambda mode, size, *args: made.append(size) or new(mode, size, *args))
    read = reading.load_picture(tmp_path / "strip.png", 32)[0, 0].flatten()
    assert max(width * height for width, height in made) < 10_000
    assert torch.allclose(read, torch.linspace(-1, 1, 65)[1::2], atol=0.05)
