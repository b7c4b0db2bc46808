"""GIF, APNG and WebP files that grow frame by frame; MP4 is in :mod:`.video`.

Every format keeps its own container (GIF blocks, APNG and RIFF chunks are a few bytes each), so that
frames are encoded as they come, several at once, and none is held or merged with an equal neighbour,
as Pillow's ``save_all`` does. Quantising, LZW, deflate and VP8 are Pillow's.

Noise dithers badly and shares no palette between levels: a GIF's frames have palettes of their own,
not dithered. The palette is fitted to 48 x 48 of the frame's pixels. Maximum coverage spreads it
over the colours in use, which costs fewer bits than a median cut's at the same error; one of
Lloyd's steps (IEEE Trans. Inf. Theory 28, 1982) then moves every colour to the mean of its pixels.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from . import png

PALETTE_SIDE = 48
GRAIN = 40
"""Mean step in grey from pixel to pixel, from which on WebP's search for what repeats finds nothing: its quick
method then gives as many bytes at the same error in half the time."""
LONGEST_WEBP = 2**32 - 2**20
"""Bytes; the rest is for the generation parameters."""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
LONG, UNDEFINED = 4, 7


class Container(Protocol):
    """A file that is being written.

    Attributes:
        side: The longest side of a frame that the format can hold.
        ticks_per_second: Of its times.
        ticks: The longest time of one frame.
        best: The quality that frames have where nothing else is asked for.
        worst: The lowest quality that still shows something; as ``best`` where the format has but one.
        base: Bytes of a file without frames, about.
        overhead: Bytes of a frame that its size does not change, about.
    """

    side: int
    ticks_per_second: int
    ticks: int
    best: int
    worst: int
    base: int
    overhead: int

    def __init__(self, path: Path, size: tuple[int, int], text: str, plays: int, mean: float, quality: int) -> None:
        """Opens the file.

        Arguments:
            path: Where it is written.
            size: Width and height of each frame.
            text: The generation parameters.
            plays: How often it plays; 0 is for ever.
            mean: Seconds of a frame, on average.
            quality: From ``best`` to ``worst``, on the format's own scale.
        """

    def begin(self) -> None:
        """Writes what comes before the frames."""

    @staticmethod
    def encode(frame: Image.Image, quality: int) -> bytes:
        """What of an RGB frame is stored; in any thread, several at once."""

    def add(self, blob: bytes, ticks: int) -> None:
        """Writes the next frame and its time."""

    def finish(self) -> None:
        """Writes what comes after the frames."""

    def close(self) -> None:
        """Closes the file, whole or not."""


def quantize(frame: Image.Image) -> Image.Image:
    """An RGB frame in 256 colours of its own, without dithering."""
    side = (min(frame.width, PALETTE_SIDE), min(frame.height, PALETTE_SIDE))
    thumbnail = frame.resize(side, Image.Resampling.NEAREST)
    first = thumbnail.quantize(256, Image.Quantize.MAXCOVERAGE)
    pixels, nearest = np.asarray(thumbnail).reshape(-1, 3), np.asarray(first).reshape(-1)
    count = np.maximum(np.bincount(nearest, minlength=256), 1)
    means = [np.bincount(nearest, channel, 256) / count for channel in pixels.T.astype(float)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.rint(means).T.astype(np.uint8).tobytes())
    return frame.quantize(palette=palette, dither=Image.Dither.NONE)


def grain(frame: Image.Image) -> float:
    """The mean step in grey from one pixel to the next in its row, of every 16th row."""
    grey = np.asarray(frame.convert("L"), np.int16)[::16]
    return float(np.abs(np.diff(grey, axis=1)).mean()) if frame.width > 1 else 0.0


class _File:
    """What the three have in common: the open file, and what it is to hold."""

    best, worst = 0, 0

    def __init__(self, path: Path, size: tuple[int, int], text: str, plays: int, mean: float, quality: int) -> None:
        self._file, self._size, self._text, self._plays, self._count = path.open("wb"), size, text, plays, 0

    def close(self) -> None:
        self._file.close()


GIF_HEAD = 13
"""Bytes before a GIF's palette: signature and screen descriptor, whose third byte from the end tells its length."""


def _saved(picture: Image.Image, file: BinaryIO) -> bytes:
    with file:
        picture.save(file, "GIF", interlace=0, optimize=False)
        file.seek(0)
        return file.read()


class Gif(_File):
    """GIF89a: header, screen descriptor without a global palette, loop and comment extensions, frames."""

    side, ticks_per_second, ticks = 2**16 - 1, 100, 2**16 - 1
    base, overhead = 32, 790  # the palette is 768 of it

    def begin(self) -> None:
        self._file.write(b"GIF89a" + struct.pack("<HHBBB", *self._size, 0x70, 0, 0))
        if self._plays != 1:  # the extension counts the repeats after the first time
            self._file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<H", max(0, self._plays - 1)) + b"\0")
        comment = self._text.encode("utf-8")
        if comment:
            parts = (comment[i : i + 255] for i in range(0, len(comment), 255))
            self._file.write(b"!\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0")

    @staticmethod
    def encode(frame: Image.Image, quality: int) -> bytes:
        """Image descriptor, palette and LZW data.

        Taken out of a whole file: into one with a descriptor Pillow's LZW writes without holding the interpreter.
        """
        reduced = quantize(frame)
        reduced.info.clear()  # what else a picture says of itself would come before its descriptor
        try:
            made = _saved(reduced, os.fdopen(os.memfd_create("frame"), "w+b"))
        except (AttributeError, OSError):  # not Linux, or no room for files: the caller's own will tell of that
            made = _saved(reduced, io.BytesIO())
        colours = 2 << (made[GIF_HEAD - 3] & 7)
        palette, at = made[GIF_HEAD : GIF_HEAD + 3 * colours], GIF_HEAD + 3 * colours
        size, data = made[at : at + 9], made[at + 10 : -1]
        return size + bytes([0x80 | made[GIF_HEAD - 3] & 7]) + palette + data

    def add(self, blob: bytes, ticks: int) -> None:
        self._file.write(b"!\xf9\x04\x04" + struct.pack("<H", ticks) + b"\0\0")
        self._file.write(blob)

    def finish(self) -> None:
        self._file.write(b";")


class Apng(_File):
    """APNG 1.0: signature, header, animation control, text, then a control and a data chunk for each frame."""

    side, ticks_per_second, ticks = 2**31 - 1, 1000, 10 * (2**16 - 1)
    base, overhead = 65, 60

    def begin(self) -> None:
        self._file.writelines(png.header(self._size))
        self._control = self._file.tell()
        self._write_control()
        self._file.writelines(png.texts(parameters(self._text)))

    @staticmethod
    def encode(frame: Image.Image, quality: int) -> bytes:
        """Filtered and deflated pixels, without loss."""
        return png.deflated(frame)

    def add(self, blob: bytes, ticks: int) -> None:
        sequence = max(0, 2 * self._count - 1)
        delay = (ticks, 1000) if ticks < 2**16 else (round(ticks / 10), 100)
        self._chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, *self._size, 0, 0, *delay, 0, 0))
        if self._count:
            self._chunk(b"fdAT", struct.pack(">I", sequence + 1), blob)
        else:
            self._chunk(b"IDAT", blob)
        self._count += 1

    def finish(self) -> None:
        self._chunk(b"IEND")
        self._file.seek(self._control)
        self._write_control()

    def _write_control(self) -> None:
        """The number of frames is known at the end only."""
        self._chunk(b"acTL", struct.pack(">II", self._count, self._plays))

    def _chunk(self, kind: bytes, *data: bytes) -> None:
        self._file.writelines(png.chunk(kind, *data))


class WebP(_File):
    """WebP container specification: RIFF header, canvas, animation control, frames, Exif."""

    side, ticks_per_second, ticks = 2**14 - 1, 1000, 2**24 - 1
    best, worst, base, overhead = 80, 20, 44, 160

    def begin(self) -> None:
        self._sides = b"".join((side - 1).to_bytes(3, "little") for side in self._size)
        self._file.write(b"RIFF\0\0\0\0WEBP")
        self._chunk(b"VP8X", bytes([0x02 | (0x08 if self._text else 0), 0, 0, 0]) + self._sides)
        self._chunk(b"ANIM", b"\xff\xff\xff\xff" + struct.pack("<H", self._plays))

    @staticmethod
    def encode(frame: Image.Image, quality: int) -> bytes:
        """The bitstream's chunk."""
        made = io.BytesIO()
        method = 1 if grain(frame) > GRAIN else 4
        frame.copy().save(
            made, "WEBP", quality=quality, method=method
        )  # saving changes it, and others may be saving it
        webp, at = made.getvalue(), 12
        while webp[at : at + 4] not in (b"VP8 ", b"VP8L"):
            at += 8 + _even(struct.unpack_from("<I", webp, at + 4)[0])
        return webp[at : at + 8 + _even(struct.unpack_from("<I", webp, at + 4)[0])]

    def add(self, blob: bytes, ticks: int) -> None:
        place = bytes(6) + self._sides + ticks.to_bytes(3, "little") + b"\x02"  # not blended
        self._chunk(b"ANMF", place + blob)
        self._count += 1
        if self._file.tell() > LONGEST_WEBP:
            raise ValueError(f"a WebP file holds 4 GiB at most, and {self._count} frames are more")

    def finish(self) -> None:
        if self._text:
            self._chunk(b"EXIF", user_comment(self._text))
        length = self._file.tell() - 8
        self._file.seek(4)
        self._file.write(struct.pack("<I", length))

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.writelines([kind, struct.pack("<I", len(data)), data, b"\0" * (len(data) % 2)])


def _even(length: int) -> int:
    return length + length % 2


def user_comment(text: str) -> bytes:
    """Exif data with the user comment, where the WebUI keeps and looks for generation parameters.

    A big-endian TIFF with one tag in its Exif directory; Pillow would write the comment as bytes, which
    the WebUI's reader (piexif) does not take.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    head = b"MM\0*" + struct.pack(">I", 8)
    pointer = struct.pack(">HHHIII", 1, EXIF_IFD, LONG, 1, 26, 0)
    entry = struct.pack(">HHHIII", 1, USER_COMMENT, UNDEFINED, len(comment), 44, 0)
    return head + pointer + entry + comment


def parameters(text: str) -> PngImagePlugin.PngInfo:
    """``text`` where the WebUI keeps a PNG's generation parameters."""
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_itxt("parameters", text)
    return info
