"""Picture files as latents of the embedded models, and mask files as weights: one reader for both.

Every mode of Pillow comes to the values that its file means: 16-bit and deeper greys by their own range,
colours by their ICC profile (to sRGB), premultiplied and keyed transparency, every EXIF orientation. Only
the formats of :mod:`.formats` are tried, so that no helper program is ever started. A large picture is
converted in bands and reduced on the way: nothing of its size is made but what Pillow itself decodes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError
from torch import Tensor

from .formats import PLUGINS, READ, REFUSED

Tell = Callable[[str], None]
"""Told what of a file is not used, or how its values were understood."""

BAND = 2**22
"""Pixels that are converted at once."""
GAP = 3
"""A picture is averaged down to this many times its final size; Lanczos does the rest."""
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
RANGES = (255, 2**12 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)


class UnreadableError(ValueError):
    """A file that is no picture, or not one that can be read here."""


def load_picture(path: Path, size: int, tell: Tell = lambda _: None) -> Tensor:
    """A picture as latents in [-1, 1] with shape (1, 3, H, W), its long side at most ``size``.

    Transparency is laid on white. Of an animated file the first frame is taken.

    Raises:
        UnreadableError: if the file is no picture, or cannot be read.
    """
    with opened(path, size, tell) as (picture, full):
        scale = min(1.0, size / max(full))
        final = max(1, round(full[0] * scale)), max(1, round(full[1] * scale))
        pixels = _shrunk(picture, final, colours(picture, tell), Image.Resampling.LANCZOS)
        return _to_tensor(_upright(pixels, _orientation(picture))) * 2 - 1


def load_mask(path: Path, height: int, width: int, tell: Tell = lambda _: None) -> Tensor:
    """A mask as weights in [0, 1] with shape (1, 1, height, width); white is unsampled, transparent is not.

    Raises:
        UnreadableError: as :func:`load_picture`.
    """
    with opened(path, max(height, width), tell) as (picture, full):
        orientation = _orientation(picture)
        final, shown = ((height, width), full[::-1]) if orientation >= 5 else ((width, height), full)
        if abs(shown[0] * height - shown[1] * width) > max(shown) + max(height, width):  # a pixel of rounding
            tell(f"stretched from {shown[0]} x {shown[1]} to the picture's {width} x {height}")
        weights = _shrunk(picture, final, greys(picture, tell), Image.Resampling.BILINEAR)
        if weights.getextrema()[1] == 0:
            tell("black or transparent everywhere: nothing is unsampled")
        return _to_tensor(_upright(weights, orientation))


@contextmanager
def opened(path: Path, reach: int, tell: Tell) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """A decoded picture file and its full size; what goes wrong with it until it is closed says which file.

    Arguments:
        reach: The long side that is wanted of it; a JPEG is decoded at no more than it takes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about large pictures and odd metadata
            with path.open("rb") as file, _identified(path, file) as picture:
                yield picture, _load(picture, reach, tell)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UnreadableError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise UnreadableError(f"{path}: too large a picture for this machine's memory") from None
    except Exception as error:  # a damaged file makes Pillow's readers raise anything
        raise UnreadableError(f"{path}: not a readable picture ({error or type(error).__name__})") from None


def _identified(path: Path, file: BinaryIO) -> Image.Image:
    """The picture in an open file: by its name, Pillow would map an uncompressed TIFF that is to be turned wrongly."""
    for name, package in PLUGINS.items():
        if path.suffix.lower() in READ[name]:
            with suppress(ImportError):
                import_module(package)
    Image.init()
    try:
        return Image.open(file, formats=[name for name in READ if name in Image.OPEN])
    except UnidentifiedImageError:
        raise UnreadableError(_why_not(path)) from None


def _load(picture: Image.Image, reach: int, tell: Tell) -> tuple[int, int]:
    """Decodes the first frame; returns its full size."""
    frames = 1
    with suppress(Exception):
        if picture.format != "PSD" and getattr(picture, "is_animated", False):  # a PSD's frames are its layers
            frames = getattr(picture, "n_frames", 1)
            picture.seek(0)
    if frames > 1:
        tell(f"holds {frames} frames; the first is taken")
    full, large = picture.size, max(picture.size) / (GAP * reach)
    drafted = large > 1 and picture.draft(None, (int(full[0] / large), int(full[1] / large)))
    picture.load()
    return full if drafted else picture.size


def _why_not(path: Path) -> str:
    """What is said of a file that none of the read formats is."""
    with suppress(Exception), Image.open(path, formats=[n for n in REFUSED if n in Image.OPEN]) as picture:
        return f"{picture.format} is refused: Pillow would start another program for it"
    for name, package in PLUGINS.items():
        if path.suffix.lower() in READ[name] and name not in Image.OPEN:
            return f"{name} needs the package {package.replace('_', '-')}"
    return f"none of {', '.join(READ)}"


# Orientation


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of a loaded picture (Pillow turns TIFF files itself)."""
    with suppress(Exception):  # damaged metadata turns nothing
        turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return turn if turn in range(1, 9) else 1
    return 1


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(pixels: Image.Image, orientation: int) -> Image.Image:
    return pixels.transpose(TURNS[orientation]) if orientation in TURNS else pixels


# Values

Convert = Callable[[Image.Image], Image.Image]


def colours(picture: Image.Image, tell: Tell) -> Convert:
    """What turns a band of a picture into RGB, transparency on white."""
    if picture.mode in DEEP:
        shallow = _deep(picture, tell)
        key = picture.info.get("transparency")
        managed = _managed(picture, "L", tell)

        def flat(band: Image.Image) -> Image.Image:
            pixels = managed(shallow(band))
            if isinstance(key, int):
                paper = Image.fromarray(np.asarray(band) == key)
                pixels.paste("white", (0, 0), paper)
            return pixels

        return flat
    grey = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    if not _transparent(picture):
        bare = picture.mode if picture.mode in ("LAB", "CMYK") else grey
        managed = _managed(picture, bare, tell)
        return lambda band: managed(_plain(band, bare))
    managed = _managed(picture, grey, tell)

    def on_white(band: Image.Image) -> Image.Image:
        seen = _unmultiplied(band).convert("RGBA")
        alpha = seen.getchannel("A")
        paper = Image.new("RGBA", band.size, "white")
        pixels = Image.merge("RGBA", (*managed(seen.convert("RGB").convert(grey)).split(), alpha))
        return Image.alpha_composite(paper, pixels).convert("RGB")

    return on_white


def greys(picture: Image.Image, tell: Tell) -> Convert:
    """What turns a band of a mask into weights: its grey, nothing where it is transparent."""
    if picture.mode in DEEP:
        return _deep(picture, tell)
    if not _transparent(picture):
        return lambda band: _plain(band, "L")

    def seen(band: Image.Image) -> Image.Image:
        both = _unmultiplied(band).convert("RGBA")
        return ImageChops.multiply(both.convert("RGB").convert("L"), both.getchannel("A"))

    return seen


def _transparent(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or picture.has_transparency_data


def _unmultiplied(band: Image.Image) -> Image.Image:
    return band.convert({"La": "LA", "RGBa": "RGBA"}[band.mode]) if band.mode in ("La", "RGBa") else band


def _plain(band: Image.Image, mode: str) -> Image.Image:
    """A band without transparency in another mode; LAB by its definition, others as Pillow converts them."""
    if band.mode == mode:
        return band
    if band.mode == "LAB":
        return _lab_to_rgb(band).convert(mode)
    return band.convert("RGB").convert(mode) if band.mode in ("HSV", "YCbCr", "CMYK", "RGBX") else band.convert(mode)


def _lab_to_rgb(band: Image.Image) -> Image.Image:
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB")
    return _transformed(band, transform)


def _transformed(band: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    made = ImageCms.applyTransform(band, transform)
    assert made is not None  # it would be if the band were changed in place
    return made


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _by_profile(transform: ImageCms.ImageCmsTransform, source: str, band: Image.Image) -> Image.Image:
    return _transformed(band.convert(source), transform)


def _managed(picture: Image.Image, mode: str, tell: Tell) -> Convert:
    """What turns a band of ``mode`` into sRGB by the picture's ICC profile; without one as Pillow does."""
    profile = picture.info.get("icc_profile")
    if mode == "LAB":
        return _lab_to_rgb
    if profile:
        for source in (mode, "RGB") if mode == "L" else (mode,):  # a grey picture may hold a colour profile
            with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
                held = ImageCms.ImageCmsProfile(io.BytesIO(profile))
                transform = ImageCms.buildTransform(held, _srgb(), source, "RGB")
                return partial(_by_profile, transform, source)
        tell("its ICC profile does not fit its colours and is not used")
    return lambda band: band.convert("RGB")


def _deep(picture: Image.Image, tell: Tell) -> Convert:
    """What turns a band of a 16-bit, 32-bit or float grey picture into 8 bits."""
    top, inverted = _range(picture, tell)

    def shallow(band: Image.Image) -> Image.Image:
        values = np.clip(np.asarray(band, np.float64) / top, 0, 1)
        return Image.fromarray(np.rint(255 * (1 - values if inverted else values)).astype(np.uint8))

    return shallow


def _range(picture: Image.Image, tell: Tell) -> tuple[float, bool]:
    """The value at the far end from 0 in a deep grey picture, and whether that end is black.

    16 bits mean 0 to 65535 (a TIFF may say 12). 32 bits and floats say nothing of their range: it is the
    smallest usual one that holds their values, and that is told.
    """
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    inverted = tags.get(262) == 0
    if picture.mode.startswith("I;16"):
        bits = tags.get(258, (16,))
        return float(2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1), inverted
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):
        return 65535.0, False  # Pillow reads 16 bits so, or scales to them
    bands = [np.asarray(picture.crop(box)) for box in _boxes(picture, 1)]
    if not all(np.isfinite(band).all() for band in bands):
        raise UnreadableError("its values are not all numbers (NaN or infinite)")
    most = max(float(band.max()) for band in bands)
    kinds = (1, *RANGES) if picture.mode == "F" else RANGES
    top = next((float(r) for r in kinds if most <= r), most)
    kind = "float" if picture.mode == "F" else "32-bit"
    tell(f"{kind} grey values up to {most:g}: taken as 0 (black) to {top:g} (white)")
    return top, inverted


# Size


def _boxes(picture: Image.Image, factor: int) -> Iterator[tuple[int, int, int, int]]:
    """Bands over the whole picture whose heights are multiples of a factor, but for the last."""
    rows = max(1, BAND // (picture.width * factor)) * factor
    for top in range(0, picture.height, rows):
        yield 0, top, picture.width, min(top + rows, picture.height)


def _shrunk(
    picture: Image.Image, final: tuple[int, int], convert: Convert, resampling: Image.Resampling
) -> Image.Image:
    """A picture converted and of its final size: in bands, averaged down on the way where it is much larger."""
    across, down = (max(1, side // (GAP * wanted)) for side, wanted in zip(picture.size, final))
    size = -(-picture.width // across), -(-picture.height // down)
    page = Image.new("RGB", size)
    for box in _boxes(picture, down):
        band = convert(picture.crop(box)).reduce((across, down))
        page = page if page.mode == band.mode else Image.new(band.mode, size)
        page.paste(band, (0, box[1] // down))
    if page.size == final == picture.size:
        return page
    whole = (0, 0, picture.width / across, picture.height / down)
    return page.resize(final, resampling, box=whole)


def _to_tensor(picture: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2).float() / 255
