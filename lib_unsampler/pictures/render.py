"""From latents' pictures to what people look at: frames, the contact sheet, the sigma curve."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ..core.noising import variance_preserving
from .drawing import ACCENT, FAINT, INK, PAPER, Plot, font, write_text

Level = TypeVar("Level")
Made = TypeVar("Made")

SHEET_SIDE = 192
SHEET_FRAMES = 400
CAPTION_SHARE = 20
"""A caption's letters are a twentieth of the frame's shorter side, but never below CAPTION_LEAST pixels."""
CAPTION_LEAST = 9
LEGIBLE = 6
"""No caption's letters are lower, in pixels."""


STRIP = 2**16
"""Values that are turned into bytes at once on the CPU: as many as its nearest memory holds."""


def pixels(decoded: Tensor) -> Tensor | NDArray[np.uint8]:
    """What comes to the CPU of decoded images in [-1, 1] with shape (B, 3, H, W): bytes of a GPU's, else themselves."""
    if decoded.device.type == "cpu":
        return decoded
    levels = decoded.float().clamp(-1, 1).add_(1).mul_(127.5).round_()
    made: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).to(torch.uint8).contiguous().cpu().numpy()
    return made


def to_pictures(decoded: Tensor | NDArray[np.uint8]) -> list[Image.Image]:
    """RGB pictures from decoded images in [-1, 1] with shape (B, 3, H, W), or their bytes; values outside clip.

    In numpy: torch's threads would wait for those that encode the pictures before.
    """
    if isinstance(decoded, Tensor):
        decoded = _bytes(decoded.detach().float().cpu().numpy())
    return [Image.fromarray(picture) for picture in decoded]


def _bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """:math:`127.5 (x + 1)`, rounded, with shape (B, H, W, 3)."""
    count, channels, height, width = values.shape
    made = np.empty((count, height, width, channels), np.uint8)
    rows = max(1, STRIP // width)
    for image, top, channel in product(range(count), range(0, height, rows), range(channels)):
        strip = np.clip(values[image, channel, top : top + rows], -1, 1)
        strip += 1
        strip *= np.float32(127.5)
        made[image, top : top + rows, :, channel] = np.rint(strip, out=strip)
    return made


def viewed(z: Tensor, source: Tensor, mask: Tensor | None, sigma: Tensor, prediction: str, view: str) -> Tensor:
    """The latent to decode for a level's picture: variance preserving or raw, the source as it is.

    Outside the mask the source keeps its own brightness, also where the noisy part is scaled down.

    Arguments:
        z: Latents after ``noising.blend`` with shape (B, C, [T,] H, W).
        source: Clean latents of the same shape.
        mask: Weights that broadcast against them, or None.
        sigma: Noise level, with shape ().
        view: ``variance preserving`` or ``raw``.
    """
    if view == "raw":
        return z
    if mask is None:
        return variance_preserving(z, sigma, prediction)
    still = (1 - mask.to(z)) * source
    return variance_preserving(z - still, sigma, prediction) + still


def in_chunks(
    levels: Iterable[Level],
    decode: Callable[[list[Level]], list[Made]],
    chunk: int,
    recover: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Level, Made]]:
    """Each level with what is decoded of it, decoded several at a time: half as many from the moment memory runs out.

    Arguments:
        levels: Whatever ``decode`` takes, one after the other; at most ``chunk`` are taken ahead.
        decode: Turns a list of levels into what is made of each.
        chunk: Levels to decode at once, at least 1.
        recover: Gives memory back after it ran out.

    Raises:
        MemoryError: if not even one level can be decoded.
    """
    source, waiting = iter(levels), deque[Level]()
    while True:
        waiting.extend(islice(source, max(0, chunk - len(waiting))))
        if not waiting:
            return
        taken = list(islice(waiting, chunk))
        try:
            decoded = decode(taken)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(taken) == 1:
                raise MemoryError(f"out of memory: not even one frame can be decoded ({error})") from None
            decoded = None
        if decoded is None:  # outside of the handler, which keeps what the failed call had made
            recover()
            chunk = len(taken) // 2
            continue
        for made in decoded:
            yield waiting.popleft(), made


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device's or the machine's memory is used up."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()  # MPS and CPU tell it in words alone
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def sigma_text(sigma: float) -> str:
    """A sigma for a caption, spelled out: Pillow's built-in font has no Greek."""
    return f"sigma {sigma:.3g}"


def caption(step: int | None, sigma: float, timestep: float | None, noise: str, name: str = "source") -> list[str]:
    """What a frame's caption says, piece by piece; a picture without noise has only its name and sigma."""
    if step is None:
        return [name, sigma_text(sigma)]
    known = [] if timestep is None else [f"t {timestep:.0f}"]
    return [f"step {step}", sigma_text(sigma), *known, noise]


def captioned(frame: Image.Image, pieces: Sequence[str]) -> Image.Image:
    """A copy of a frame with a caption along its lower edge, in lines that fit into it.

    On a small frame the letters shrink, until they leave half of it free or are hardly legible; pieces for which
    there is no room then are left out, the last first.
    """
    page = frame.copy()
    lines, gap = _fitted(list(pieces), page.size)
    if not lines:
        return page
    top = page.height - sum(line.height + gap for line in lines) - gap
    box = (0, max(0, top), page.width, page.height)
    page.paste(page.crop(box).point(lambda v: v * 3 // 10), box)  # white is legible on any frame's three tenths
    y = top + gap
    for line in lines:
        page.paste((255, 255, 255), (gap, y), line)
        y += line.height + gap
    return page


def captioned_panel(panel: Image.Image, parts: Sequence[Sequence[str]]) -> Image.Image:
    """A copy of a panel (see :func:`beside`) with a caption on each of its pictures."""
    width = panel.width // len(parts)
    boxes = [(number * width, 0, (number + 1) * width, panel.height) for number in range(len(parts))]
    return beside([captioned(panel.crop(box), pieces) for box, pieces in zip(boxes, parts)])


def _fitted(pieces: list[str], frame: tuple[int, int]) -> tuple[list[Image.Image], int]:
    """A caption's lines as masks that fit a frame's width and height, and the gap around them."""
    most = max(CAPTION_LEAST, round(min(frame) / CAPTION_SHARE))
    while pieces:
        for room, size in product((frame[1] // 2, frame[1]), range(most, LEGIBLE - 1, -1)):
            gap = max(1, size // 4)
            lines = _lines(pieces, size, frame[0] - 2 * gap)
            widest, height = max(line.width for line in lines), sum(line.height + gap for line in lines) + gap
            if widest <= frame[0] - 2 * gap and height <= room:
                return lines, gap
        pieces = pieces[:-1]
    return [], 0


def _lines(pieces: Sequence[str], size: int, width: int) -> list[Image.Image]:
    """Pieces in as few lines as they need, each as wide as is allowed or a piece alone."""
    lines: list[Image.Image] = []
    row = ""
    for piece in pieces:
        longer = f"{row}  {piece}" if row else piece
        if row and _letters(longer, size).width > width:
            lines.append(_letters(row, size))
            longer = piece
        row = longer
    return [*lines, _letters(row, size)]


def _letters(text: str, size: int) -> Image.Image:
    """A line of text as a mask, ``size`` pixels high, in the built-in font."""
    letters = font(size)
    left, _, right, _ = letters.getbbox(text)
    _, low, _, deep = letters.getbbox("Ag0")
    mask = Image.new("L", (max(1, int(right - left)), max(1, int(deep - low))))
    ImageDraw.Draw(mask).text((-left, -low), text, fill=255, font=letters)
    if hasattr(letters, "path"):
        return mask
    scale = size / mask.height  # the font of one size only
    return mask.resize((max(1, round(mask.width * scale)), size), Image.Resampling.LANCZOS)


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row; a single one as it is."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    page = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        page.paste(picture, (number * width, 0))
    return page


def thumbnail(frame: Image.Image) -> Image.Image:
    """A copy of a frame that fits a contact sheet's cell."""
    scale = min(1.0, SHEET_SIDE / max(frame.size))
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    return frame.resize(size, Image.Resampling.LANCZOS)


def contact_sheet(thumbnails: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """All frames on one page, in order, each above its caption."""
    if not thumbnails:
        raise ValueError("a contact sheet needs at least one frame")
    width, height = thumbnails[0].size
    columns = max(1, min(len(thumbnails), round(math.sqrt(len(thumbnails) * 1.4 * height / width))))
    rows = -(-len(thumbnails) // columns)
    gap, strip = 10, 24
    cell_width = max(width, 96)
    size = (gap + columns * (cell_width + gap), gap + rows * (height + strip + gap))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for i, (frame, caption) in enumerate(zip(thumbnails, captions)):
        x = gap + (i % columns) * (cell_width + gap)
        y = gap + (i // columns) * (height + strip + gap)
        page.paste(frame, (x, y))
        write_text(draw, (x, y + height + 4), caption, 14)
    return page


def sigma_curve(schedule: Tensor, kept: Sequence[int], size: tuple[int, int] = (720, 405)) -> Image.Image:
    """The schedule's sigma over its step, logarithmic, with the kept levels marked.

    Arguments:
        schedule: The whole descending schedule with shape (n + 1); zeros are not drawn.
        kept: Schedule indices to mark.
    """
    sigmas = [s for s in schedule.tolist() if s > 0]
    low, high = math.log10(min(sigmas)), math.log10(max(sigmas))
    low, high = (low - 0.05, high + 0.05) if high > low else (low - 0.5, high + 0.5)
    left, top, right, bottom = 64, 44, size[0] - 24, size[1] - 48

    def place(index: int) -> tuple[float, float]:
        across = index / max(1, len(sigmas) - 1)
        up = (math.log10(sigmas[index]) - low) / (high - low)
        return left + across * (right - left), bottom - up * (bottom - top)

    plot = Plot(size)
    plot.text((left, 14), f"sigma of each step; {len(kept)} level{'' if len(kept) == 1 else 's'} kept", 16)
    _grid(plot, low, high, (left, top, right, bottom))
    step = max(1, -(-len(sigmas) // 10))
    for index in range(0, len(sigmas), step):
        plot.text((place(index)[0], bottom + 8), str(index), 13, 0.5)
    plot.text((right, bottom + 26), "step", 13, 1)
    plot.line([place(i) for i in range(len(sigmas))], INK, 3)
    for index in kept:
        if index < len(sigmas):
            plot.mark(place(index), ACCENT)
    return plot.page()


def _grid(plot: Plot, low: float, high: float, box: tuple[int, int, int, int]) -> None:
    """Horizontal lines at 1, 2 and 5 times the powers of ten within the range."""
    left, top, right, bottom = box
    plot.frame(box)
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            up = (math.log10(value) - low) / (high - low)
            if 0 <= up <= 1:
                y = bottom - up * (bottom - top)
                plot.line([(left, y), (right, y)], FAINT, 1)
                plot.text((left - 8, y - 8), f"{value:g}", 13, 1)
