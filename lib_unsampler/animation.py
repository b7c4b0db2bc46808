"""Writers: pictures and durations in, one whole file out. They never see the WebUI or a tensor.

GIF keeps its own container (blocks are a few bytes each) so that frames are written as they come;
quantising and LZW are Pillow's. Noise dithers badly and shares no palette between levels, so every
frame gets its own palette from a thumbnail, without dithering.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from PIL import GifImagePlugin, Image, PngImagePlugin

from .files import whole

GIF_SIDE = 65535
PALETTE_SIDE = 64


def centiseconds(durations: Sequence[float]) -> list[int]:
    """Frame durations in GIF's unit, rounded so that the sum never drifts; none below 2.

    Browsers play a frame of 0 or 1 hundredths as if it were 10.
    """
    ends = [round(end * 100) for end in accumulate(durations)]
    return [max(2, end - start) for start, end in zip([0, *ends], ends)]


def quantize(frame: Image.Image) -> Image.Image:
    """An RGB frame in 256 colours of its own, without dithering."""
    thumbnail = frame.resize(
        (min(frame.width, PALETTE_SIDE), min(frame.height, PALETTE_SIDE)), Image.Resampling.NEAREST
    )
    palette = thumbnail.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    return frame.quantize(palette=palette, dither=Image.Dither.NONE)


def write_gif(
    path: Path,
    frames: Iterable[Image.Image],
    durations: Sequence[float],
    comment: str = "",
    loop: int = 0,
) -> None:
    """Writes an animated GIF, one frame at a time.

    Arguments:
        path: Where it appears when whole.
        frames: RGB pictures of one size, as many as ``durations``.
        durations: Seconds each frame is shown.
        comment: Text for the comment extension (the generation parameters).
        loop: How often it repeats; 0 is for ever.

    Raises:
        ValueError: for no frames, a count that differs from ``durations``, sizes that differ or
            are above 65535.
    """
    delays = centiseconds(durations)
    size = None
    count = 0
    with whole(path) as part, part.open("wb") as file:
        for frame in frames:
            if size is None:
                size = frame.size
                file.write(_gif_head(size, comment, loop))
            if frame.size != size:
                raise ValueError(f"frame {count} is {frame.size}, the first was {size}")
            if count == len(delays):
                raise ValueError(f"more frames than the {len(delays)} durations")
            blocks = GifImagePlugin.getdata(
                quantize(frame), duration=delays[count] * 10, include_color_table=True
            )
            file.write(b"".join(blocks))
            count += 1
        if count != len(delays) or count == 0:
            raise ValueError(f"{count} frames for {len(delays)} durations")
        file.write(b";")


def _gif_head(size: tuple[int, int], comment: str, loop: int) -> bytes:
    """Header, screen descriptor without a global palette, loop and comment extensions (GIF89a)."""
    if max(size) > GIF_SIDE:
        raise ValueError(f"frame size {size} is above GIF's {GIF_SIDE}")
    head = b"GIF89a" + struct.pack("<HHBBB", *size, 0x70, 0, 0)
    head += b"!\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<H", loop) + b"\0"
    text = comment.encode("utf-8")
    if text:
        chunks = (text[i : i + 255] for i in range(0, len(text), 255))
        head += b"!\xfe" + b"".join(bytes([len(c)]) + c for c in chunks) + b"\0"
    return head


def write_png(path: Path, picture: Image.Image, parameters: str = "") -> None:
    """Writes a PNG; ``parameters`` goes where the WebUI keeps generation parameters."""
    info = PngImagePlugin.PngInfo()
    if parameters:
        info.add_itxt("parameters", parameters)
    with whole(path) as part:
        picture.save(part, "PNG", pnginfo=info)
