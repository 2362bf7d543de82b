"""A sheet to draw on: text, bars and marks, in units of which each is SCALE pixels wide."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw

from engine.cards.card import Piece
from engine.cards.fonts import Fonts
from engine.cards.typeset import Atom, set_rows

Color = tuple[int, int, int]

SCALE = 2
_SMOOTHING = 4  # a rounded shape is drawn so many times larger, then reduced

WHITE: Color = (255, 255, 255)
INK: Color = (31, 41, 51)
MUTED: Color = (107, 114, 128)
UNREAD: Color = (156, 163, 175)
TRACK: Color = (229, 231, 235)
MANIPULATED: Color = (198, 40, 40)


def mix(low: Color, high: Color, share: float) -> Color:
    """Return the colour `share` of the way from `low` to `high`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


class Sheet:
    """A white image that grows downwards: `y` is where the next part begins; `cut` returns what is drawn.

    Positions and sizes are in units; SCALE pixels make one. `most` is the lowest position that can be drawn.
    """

    def __init__(self, width: int, fonts: Fonts, most: int = 2000) -> None:
        self.width, self.fonts, self.y = width, fonts, 0
        self._image = Image.new("RGB", (width * SCALE, most * SCALE), WHITE)
        self._draw = ImageDraw.Draw(self._image)

    def cut(self) -> Image.Image:
        """Return the image down to `y`."""
        return self._image.crop((0, 0, self._image.width, max(1, self.y) * SCALE))

    def paste(self, image: Image.Image, x: int, y: int) -> None:
        """Lay an image, given in pixels, with its upper left corner at (x, y)."""
        self._image.paste(image, (x * SCALE, y * SCALE))

    def length(self, text: str, size: int) -> float:
        """Return the width of a line of text."""
        return self.fonts.length(text, size * SCALE) / SCALE

    def text(self, x: float, y: float, text: str, size: int, color: Color = INK) -> None:
        """Write a line of text whose letters of `size` begin at `y`."""
        left = x * SCALE
        for part, font in self.fonts.runs(text, size * SCALE):
            self._draw.text((left, (y + size) * SCALE), part, color, font, anchor="ls")
            left += font.getlength(part)

    def rectangle(
        self, x: float, y: float, width: float, height: float, color: Color, radius: int = 0
    ) -> None:
        """Fill a rectangle, its corners rounded and smooth."""
        left, top = round(x * SCALE), round(y * SCALE)
        size = max(1, round(width * SCALE)), max(1, round(height * SCALE))
        if not radius:
            self._draw.rectangle((left, top, left + size[0] - 1, top + size[1] - 1), color)
            return
        large = size[0] * _SMOOTHING, size[1] * _SMOOTHING
        mask = Image.new("L", large)
        corner = radius * SCALE * _SMOOTHING
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, large[0] - 1, large[1] - 1), corner, 255)
        self._image.paste(color, (left, top), mask.reduce(_SMOOTHING))

    def gradient(self, x: float, y: float, width: float, height: float, colors: tuple[Color, ...]) -> None:
        """Fill a rectangle with colours that change from left to right."""
        strip = Image.new("RGB", (len(colors), 1))
        strip.putdata(colors)
        size = round(width * SCALE), round(height * SCALE)
        # The middles of the outer pixels are the ends of the scale.
        ends = (0.5, 0, len(colors) - 0.5, 1)
        self._image.paste(
            strip.resize(size, Image.Resampling.BILINEAR, box=ends), (round(x * SCALE), round(y * SCALE))
        )

    def paragraph(
        self, pieces: Iterable[Piece], size: int, leading: int, most: int, color: Color = INK
    ) -> None:
        """Write text in at most `most` rows below `y`, its marks behind it, and move `y` on."""
        rows, leftwards = set_rows(pieces, self.fonts, size * SCALE, self.width * SCALE, most)
        for row in rows:
            left = self.width - sum(atom.width for atom in row) / SCALE if leftwards else 0.0
            self._marks(row, left, size)
            for atom in row:
                self.text(left, self.y, atom.text, size, color if atom.piece.read else UNREAD)
                left += atom.width / SCALE
            self.y += leading

    def _marks(self, row: list[Atom], left: float, size: int) -> None:
        """Draw the marks of a row, those of adjacent words as one."""
        start, mark = left, None
        for atom in [*row, Atom("", 0.0, Piece("", None))]:
            if atom.piece.mark != mark:
                if mark is not None:
                    shade = mix(WHITE, MANIPULATED, 0.15 + 0.3 * mark)
                    edge = max(start - 2, 0)
                    self.rectangle(edge, self.y - 3, min(left + 2, self.width) - edge, size + 11, shade, 4)
                    self.rectangle(start, self.y + size + 4, left - start, 2, MANIPULATED)
                start, mark = left, atom.piece.mark
            left += atom.width / SCALE
