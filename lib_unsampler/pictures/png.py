r"""PNG made without holding the interpreter: Pillow's own encoder keeps every other thread waiting while it deflates.

Each byte x of a row is stored modulo 256 as :math:`x - a`, :math:`x - b` or :math:`x - \lfloor (a + b) / 2 \rfloor`
(the PNG specification's filters Sub, Up and Average), where a is the same channel of the pixel to its left and b of
the one above: whichever leaves the least sum of signed bytes in the row. Average leaves least of noisy pictures; of
smooth ones Paeth's filter does, which takes longest and is tried on some rows first. Noise repeats nothing, so deflate
counts letters and looks for runs alone.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SUB = 1
"""The filter type of Sub; Up, Average and Paeth follow."""
TRIED = 8
"""Of so many rows one tells whether Paeth's filter is worth its time."""
STRIP = 2**19
"""Bytes that are filtered at once: few enough for a processor's own memory, and not so few that threads take turns."""


def chunk(kind: bytes, *data: bytes) -> Iterator[bytes]:
    """A PNG chunk: length, kind, data and their check sum."""
    crc = zlib.crc32(kind)
    for part in data:
        crc = zlib.crc32(part, crc)
    yield from (struct.pack(">I", sum(map(len, data))), kind, *data, struct.pack(">I", crc))


def header(size: tuple[int, int]) -> Iterator[bytes]:
    """The signature and head of a file of RGB pixels, eight bits each."""
    yield SIGNATURE
    yield from chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))


def deflated(picture: Image.Image) -> bytes:
    """The pixels of an RGB picture, filtered and deflated: what its IDAT chunks hold."""
    rows = np.asarray(picture).reshape(picture.height, -1)
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    above = np.zeros_like(rows[:1])
    parts, height = [], max(1, STRIP // rows.shape[1])
    for top in range(0, len(rows), height):
        strip = rows[top : top + height]
        parts.append(deflate.compress(_filtered(strip, above).data))
        above = strip[-1:]
    return b"".join([*parts, deflate.flush()])


def _filtered(rows: NDArray[np.uint8], before: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of pixels, each behind its filter's type; ``before`` is the row above the first."""
    left, above = np.zeros_like(rows), np.concatenate([before, rows[:-1]])
    left[:, 3:] = rows[:, :-3]
    choices = [rows - left, rows - above, rows - ((left & above) + ((left ^ above) >> 1))]
    sizes = [_sizes(kept) for kept in choices]
    some = slice(None, None, TRIED)
    if _sizes(_paeth(rows[some], left[some], above[some])).sum() < min(size[some].sum() for size in sizes):
        choices.append(_paeth(rows, left, above))
        sizes.append(_sizes(choices[-1]))
    best = np.argmin(sizes, axis=0)
    stored = np.empty((rows.shape[0], 1 + rows.shape[1]), np.uint8)
    stored[:, 0] = best + SUB
    for number, kept in enumerate(choices):
        stored[best == number, 1:] = kept[best == number]
    return stored


def _sizes(kept: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Each row's sum of signed bytes."""
    sums: NDArray[np.int64] = np.minimum(kept, 0 - kept).sum(axis=1, dtype=np.int64)
    return sums


def _paeth(rows: NDArray[np.uint8], left: NDArray[np.uint8], above: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """X less whichever of a, b and c, the pixel left of b, is nearest to a + b - c."""
    corner = np.zeros_like(above)
    corner[:, 3:] = above[:, :-3]
    a, b, c = (part.astype(np.int16) for part in (left, above, corner))
    from_a, from_b = np.abs(b - c), np.abs(a - c)
    from_c = np.abs(a + b - 2 * c)
    nearest: NDArray[np.uint8] = np.where(
        (from_a <= from_b) & (from_a <= from_c), left, np.where(from_b <= from_c, above, corner)
    )
    return np.subtract(rows, nearest, dtype=np.uint8)


def serves(picture: Image.Image, options: Mapping[str, Any]) -> bool:
    """Whether :func:`save` writes what Pillow would with these options of its ``save``: RGB pixels and texts."""
    plain = picture.mode == "RGB" and not {"icc_profile", "transparency", "exif"} & set(picture.info)
    return plain and options.get("format") == "PNG" and set(options) <= {"format", "quality", "pnginfo"}


class Prepared:
    """A picture's pixels, deflated before it is known what becomes of it."""

    def __init__(self, picture: Image.Image) -> None:
        self._data, self._sum = deflated(picture), zlib.crc32(picture.tobytes())

    def data(self, picture: Image.Image) -> bytes:
        """The pixels of ``picture``, which is the same one: deflated again if somebody has drawn on it since."""
        return self._data if zlib.crc32(picture.tobytes()) == self._sum else deflated(picture)


def save(
    picture: Image.Image,
    file: str | os.PathLike[str],
    info: PngImagePlugin.PngInfo | None,
    prepared: Prepared | None = None,
) -> None:
    """Writes an RGB picture as a PNG file with the texts of ``info``, as ``picture.save(file, pnginfo=info)`` does."""
    data = chunk(b"IDAT", deflated(picture) if prepared is None else prepared.data(picture))
    Path(file).write_bytes(b"".join([*header(picture.size), *texts(info), *data, *chunk(b"IEND")]))


def texts(info: PngImagePlugin.PngInfo | None) -> Iterator[bytes]:
    """The chunks of a picture's texts."""
    for kind, data, *_ in [] if info is None else info.chunks:
        yield from chunk(kind, data)
