"""Text and plots: the built-in font, labels that sit on their ticks, lines without steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, ACCENT = (255, 255, 255), (34, 34, 34), (205, 205, 205), (196, 62, 28)
FINE = 4
"""Plots are drawn this many times larger, and reduced."""

Point = tuple[float, float]


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's built-in font; before Pillow 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def write_text(draw: ImageDraw.ImageDraw, at: Point, text: str, size: int, share: float = 0.0) -> None:
    """Dark text in the built-in font, a share of its width left of a point: 0.5 centres it, 1 ends there."""
    letters = font(size)
    left, _, right, _ = letters.getbbox(text)
    draw.text((round(at[0] - share * (right - left)), at[1]), text, fill=INK, font=letters)


class Plot:
    """A page whose lines and marks are smooth; text is written when all of them are there."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._page = Image.new("RGB", (FINE * size[0], FINE * size[1]), PAPER)
        self._fine = ImageDraw.Draw(self._page)
        self._texts: list[Callable[[ImageDraw.ImageDraw], None]] = []

    def line(self, points: Sequence[Point], colour: tuple[int, int, int], width: float) -> None:
        """A line through points, with round ends."""
        scaled = [(FINE * x, FINE * y) for x, y in points]
        self._fine.line(scaled, fill=colour, width=round(FINE * width), joint="curve")
        for end in (points[0], points[-1]):
            self.mark(end, colour, width / 2)

    def mark(self, at: Point, colour: tuple[int, int, int], radius: float = 4) -> None:
        """A disc at a point."""
        x, y, radius = FINE * at[0], FINE * at[1], FINE * radius
        self._fine.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def frame(self, box: tuple[int, int, int, int]) -> None:
        """A faint rectangle."""
        left, top, right, bottom = box
        self.line([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], FAINT, 1)

    def text(self, at: Point, text: str, size: int, share: float = 0.0) -> None:
        """As :func:`write_text`."""
        self._texts.append(lambda draw: write_text(draw, at, text, size, share))

    def page(self) -> Image.Image:
        """What has been drawn."""
        page = self._page.reduce(FINE)
        draw = ImageDraw.Draw(page)
        for write in self._texts:
            write(draw)
        return page
