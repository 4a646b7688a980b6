"""Draw a picture once, as SVG for a page or as pixels for a file.

Coordinates are pixels of a picture of about 900 by 420; y grows downwards. Texts are ASCII, so that both look the same
with any font.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any, Literal, Protocol

from langchain_aegis.errors import AegisConfigError

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]

INK, FAINT, PAPER = "#1a1a1a", "#d9d9d9", "#ffffff"
_SCALE = 2  # pixels of the file per pixel of the drawing: sharp on every screen
_SMOOTH = 2  # drawn larger still, then reduced


class Canvas(Protocol):
    """What a chart draws on."""

    width: int
    height: int

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Fill a rectangle."""

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0) -> None:
        """Join points by straight lines."""

    def polygon(self, points: Sequence[Point], fill: str) -> None:
        """Fill a polygon."""

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """Fill a circle."""

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, anchor: Anchor = "start", colour: str = INK,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Write a line of text; `y` is its baseline."""


class Svg:
    """A drawing as an SVG element that needs nothing else.

    Args:
        width: In pixels.
        height: In pixels.
        title: Read aloud in place of the picture.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg" '
            f'font-family="Helvetica, Arial, sans-serif"><title>{escape(title)}</title>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Fill a rectangle."""
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0) -> None:
        """Join points by straight lines."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def polygon(self, points: Sequence[Point], fill: str) -> None:
        """Fill a polygon."""
        self._parts.append(f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{fill}"/>')

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """Fill a circle."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"/>')

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, anchor: Anchor = "start", colour: str = INK,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Write a line of text; `y` is its baseline."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>'
            f"{escape(text)}</text>"
        )

    def done(self) -> str:
        """Return the element."""
        return "".join([*self._parts, "</svg>"])


class Pixels:
    """A drawing as a PNG file, with twice as many pixels each way.

    Args:
        width: In pixels of the drawing.
        height: In pixels of the drawing.

    Raises:
        AegisConfigError: Pillow is not installed.
    """

    def __init__(self, width: int, height: int) -> None:
        image, draw, self._font = _pillow()
        self.width, self.height = width, height
        self._by = _SCALE * _SMOOTH
        self._image = image.new("RGB", (width * self._by, height * self._by), PAPER)
        self._draw = draw.Draw(self._image)
        self._texts: list[tuple[Point, str, int, Anchor, str, bool]] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Fill a rectangle."""
        if width > 0 and height > 0:
            self._draw.rectangle([v * self._by for v in (x, y, x + width, y + height)], fill=fill)

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0) -> None:
        """Join points by straight lines."""
        placed = [(x * self._by, y * self._by) for x, y in points]
        self._draw.line(placed, fill=colour, width=max(1, round(width * self._by)), joint="curve")

    def polygon(self, points: Sequence[Point], fill: str) -> None:
        """Fill a polygon."""
        self._draw.polygon([(x * self._by, y * self._by) for x, y in points], fill=fill)

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """Fill a circle."""
        self._draw.ellipse([v * self._by for v in (x - radius, y - radius, x + radius, y + radius)], fill=fill)

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, anchor: Anchor = "start", colour: str = INK,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Write a line of text; `y` is its baseline."""
        self._texts.append(((x, y), text, size, anchor, colour, bold))

    def done(self) -> bytes:
        """Return the file."""
        image, draw, _ = _pillow()
        small = self._image.resize((self.width * _SCALE, self.height * _SCALE), image.Resampling.LANCZOS)
        pen = draw.Draw(small)
        for (x, y), text, size, anchor, colour, bold in self._texts:  # not reduced: the font is smooth by itself
            pen.text(
                (x * _SCALE, y * _SCALE), text, fill=colour, font=self._font(size * _SCALE),
                anchor={"start": "ls", "middle": "ms", "end": "rs"}[anchor], stroke_width=0.6 if bold else 0,
                stroke_fill=colour,
            )  # fmt: skip
        file = io.BytesIO()
        small.save(file, "PNG", optimize=True, dpi=(96 * _SCALE, 96 * _SCALE))
        return file.getvalue()


def check_pillow() -> None:
    """Raise AegisConfigError unless PNG files can be drawn."""
    _pillow()


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as exc:
        raise AegisConfigError(f"--png needs Pillow ({exc}); run: pip install 'langchain-aegis[bench]'") from exc
    return Image, ImageDraw, ImageFont.load_default
