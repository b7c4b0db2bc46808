"""Writers: pictures and their times in, one whole file out. They never see the WebUI or a tensor.

Every format keeps its own container (GIF blocks, APNG and RIFF chunks are a few bytes each), so that
frames are encoded as they come, several at once, and put together at the end in any order:
Pillow's ``save_all`` holds them all and merges equal neighbours. Quantising, LZW, deflate and VP8
are Pillow's.

Noise dithers badly and shares no palette between levels: a GIF's frames have palettes of their own,
not dithered. The palette is fitted to 48 x 48 of the frame's pixels. Maximum coverage spreads it
over the colours in use, which costs fewer bits than a median cut's at the same error; one of
Lloyd's steps (IEEE Trans. Inf. Theory 28, 1982) then moves every colour to the mean of its pixels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import GifImagePlugin, Image, PngImagePlugin, features

from . import video
from .background import Background
from .files import naming, spool, whole
from .timing import Timing, ticks
from .video import Video, check_frame

PALETTE_SIDE = 48
WEBP_QUALITY = 80
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
LONG, UNDEFINED = 4, 7

Blobs = Iterable[tuple[bytes, int]]
"""Encoded frames with their ticks, in the order of showing."""


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


def gif_frame(frame: Image.Image) -> bytes:
    """One frame's image descriptor, palette and LZW data (GIF89a)."""
    return b"".join(GifImagePlugin.getdata(quantize(frame), include_color_table=True))


def write_gif(file: BinaryIO, size: tuple[int, int], count: int, blobs: Blobs, text: str, plays: int) -> None:
    """Header, screen descriptor without a global palette, loop and comment extensions, frames."""
    file.write(b"GIF89a" + struct.pack("<HHBBB", *size, 0x70, 0, 0))
    if plays != 1:  # the extension counts the repeats after the first time
        file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<H", max(0, plays - 1)) + b"\0")
    comment = text.encode("utf-8")
    if comment:
        parts = (comment[i : i + 255] for i in range(0, len(comment), 255))
        file.write(b"!\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0")
    for blob, centiseconds in blobs:
        file.write(b"!\xf9\x04\x04" + struct.pack("<H", centiseconds) + b"\0\0" + blob)
    file.write(b";")


def apng_frame(frame: Image.Image) -> bytes:
    """One frame's filtered and deflated pixels, without loss."""
    level, kind = 1, zlib.Z_RLE  # noise repeats nothing: a search is in vain
    return frame.tobytes("zip", "RGB", False, level, kind, b"")


def _png_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    crc = zlib.crc32(data, zlib.crc32(kind))
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc))


def write_apng(file: BinaryIO, size: tuple[int, int], count: int, blobs: Blobs, text: str, plays: int) -> None:
    """Signature, header, animation control, text, then a control and a data chunk for each frame (APNG 1.0)."""
    file.write(b"\x89PNG\r\n\x1a\n")
    _png_chunk(file, b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    _png_chunk(file, b"acTL", struct.pack(">II", count, plays))
    for kind, data, *_ in _parameters(text).chunks:
        _png_chunk(file, kind, data)
    sequence = 0
    for number, (blob, milliseconds) in enumerate(blobs):
        delay = (milliseconds, 1000) if milliseconds < 2**16 else (round(milliseconds / 10), 100)
        _png_chunk(file, b"fcTL", struct.pack(">IIIIIHHBB", sequence, *size, 0, 0, *delay, 0, 0))
        if number:
            _png_chunk(file, b"fdAT", struct.pack(">I", sequence + 1) + blob)
        else:
            _png_chunk(file, b"IDAT", blob)
        sequence += 2 if number else 1
    _png_chunk(file, b"IEND", b"")


def webp_frame(frame: Image.Image) -> bytes:
    """One frame's bitstream chunk."""
    made = io.BytesIO()
    frame.save(made, "WEBP", quality=WEBP_QUALITY)
    webp, at = made.getvalue(), 12
    while webp[at : at + 4] not in (b"VP8 ", b"VP8L"):
        at += 8 + _even(struct.unpack_from("<I", webp, at + 4)[0])
    return webp[at : at + 8 + _even(struct.unpack_from("<I", webp, at + 4)[0])]


def _even(length: int) -> int:
    return length + length % 2


def _riff_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2))


def write_webp(file: BinaryIO, size: tuple[int, int], count: int, blobs: Blobs, text: str, plays: int) -> None:
    """RIFF header, canvas, animation control, frames, Exif (WebP container specification)."""
    width, height = ((side - 1).to_bytes(3, "little") for side in size)
    file.write(b"RIFF\0\0\0\0WEBP")
    _riff_chunk(file, b"VP8X", bytes([0x02 | (0x08 if text else 0), 0, 0, 0]) + width + height)
    _riff_chunk(file, b"ANIM", b"\xff\xff\xff\xff" + struct.pack("<H", plays))
    for blob, milliseconds in blobs:
        place = bytes(6) + width + height + milliseconds.to_bytes(3, "little") + b"\x02"  # not blended
        _riff_chunk(file, b"ANMF", place + blob)
    if text:
        _riff_chunk(file, b"EXIF", user_comment(text))
    length = file.tell() - 8
    if length > RIFF_LENGTH:
        raise ValueError(f"a WebP file holds 4 GiB at most; these {count} frames make {length / 2**30:.1f} GiB")
    file.seek(4)
    file.write(struct.pack("<I", length))


RIFF_LENGTH = 2**32 - 10


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


@dataclass(frozen=True)
class Format:
    """One container: what it can hold, how a frame becomes bytes, how the bytes become a file."""

    side: int
    ticks_per_second: int
    ticks: int
    encode: Callable[[Image.Image], bytes]
    write: Callable[[BinaryIO, tuple[int, int], int, Blobs, str, int], None]


GIF = Format(2**16 - 1, 100, 2**16 - 1, gif_frame, write_gif)
APNG = Format(2**31 - 1, 1000, 10 * (2**16 - 1), apng_frame, write_apng)
WEBP = Format(2**14 - 1, 1000, 2**24 - 1, webp_frame, write_webp)
FORMATS = {".gif": GIF, ".apng": APNG, ".png": APNG, ".webp": WEBP}
ENDINGS = (*FORMATS, ".mp4")


class Animation:
    """An animation that is being made: encoded frames lie on disk until their order and times are known."""

    def __init__(self, path: Path, timing: Timing, text: str, background: Background) -> None:
        self._path, self._timing, self._text, self._background = path, timing, text, background
        self._format = FORMATS[path.suffix.lower()]
        _check_longest(path, timing, self._format)
        self._size: tuple[int, int] | None = None
        self._spool, self._spooling = spool(path), Lock()
        self._places: list[tuple[int, int]] = []
        self._count = 0

    def __enter__(self) -> Animation:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, frame: Image.Image) -> None:
        """Takes the next frame, an RGB picture that nobody changes any more.

        Raises:
            ValueError: if its size is not the first one's or too large, or no time is left for it.
        """
        check_frame(frame, self._size, self._format.side, self._count, self._timing)
        self._size = frame.size
        self._count += 1
        self._background.submit(3 * frame.width * frame.height, self._places.append, self._keep, frame)

    def _keep(self, frame: Image.Image) -> tuple[int, int]:
        """Encodes a frame and spools it, in the background's thread; returns where it lies and its length."""
        blob = self._format.encode(frame)
        with self._spooling, naming(self._path):
            start = self._spool.tell()
            self._spool.write(blob)
        return start, len(blob)

    def finish(self) -> None:
        """Writes the file.

        Raises:
            ValueError: if no frame has come. OSError: if it cannot be written.
        """
        shown = self._timing.shown(self._count)
        self._background.finish()
        delays = ticks([seconds for _, seconds in shown], self._format.ticks_per_second)
        blobs = ((self._read(frame), delay) for (frame, _), delay in zip(shown, delays))
        with whole(self._path) as part, part.open("wb") as file:
            self._format.write(file, self._size, len(shown), blobs, self._text, self._timing.plays)

    def _read(self, frame: int) -> bytes:
        start, length = self._places[frame]
        self._spool.seek(start)
        return self._spool.read(length)


def _check_longest(path: Path, timing: Timing, form: Format) -> None:
    longest = form.ticks / form.ticks_per_second
    if timing.longest() > longest:
        raise ValueError(f"{path}: a frame is shown {timing.longest():g} s, above the format's {longest:g} s")


def check_format(ending: str) -> None:
    """Refuses a format that cannot be written here.

    Raises:
        ValueError: saying what is missing.
    """
    if ending == ".webp" and not features.check("webp"):
        raise ValueError("this Pillow was built without WebP")
    if ending == ".mp4":
        video.load()


def begin(path: Path, timing: Timing, text: str, background: Background) -> Animation | Video:
    """Begins the animation that the ending of ``path`` names; a context manager that forgets it at its end.

    Arguments:
        path: Where it appears when whole.
        timing: Times of all frames that may come, and their order.
        text: The generation parameters.
        background: Where frames are encoded.

    Raises:
        ValueError: if the format cannot hold it. OSError: if its folder cannot be written.
    """
    check_format(path.suffix.lower())
    if path.suffix.lower() == ".mp4":
        return Video(path, timing, text)
    return Animation(path, timing, text, background)


def write(path: Path, frames: Iterable[Image.Image], timing: Timing, text: str = "") -> None:
    """Writes an animation, frame by frame."""
    with Background() as background, begin(path, timing, text, background) as animation:
        for frame in frames:
            animation.add(frame)
        animation.finish()


def _parameters(text: str) -> PngImagePlugin.PngInfo:
    """``text`` where the WebUI keeps generation parameters."""
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_itxt("parameters", text)
    return info


def write_png(path: Path, picture: Image.Image, parameters: str = "") -> None:
    """Writes a PNG with its generation parameters."""
    with whole(path) as part:
        picture.save(part, "PNG", pnginfo=_parameters(parameters))
