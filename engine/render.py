"""Draws a prediction as one image: the photograph with its evidence, the verdict, the caption's words.

Pillow only. Colours are fixed; sizes are in pixels of the drawn card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.errors import InputError
from engine.inputs.preprocess import ImageInput, decode_image, make_thumbnail
from engine.result import Result, Word

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

WHITE: Color = (255, 255, 255)
INK: Color = (31, 41, 51)
MUTED: Color = (107, 114, 128)
TRACK: Color = (229, 231, 235)
EMPTY: Color = (209, 213, 219)
MANIPULATED: Color = (198, 40, 40)
PRISTINE: Color = (46, 125, 50)
BOX: Color = (0, 229, 255)
# From no evidence to full evidence; between the anchors the colours are mixed.
HEAT: tuple[Color, ...] = ((49, 18, 99), (150, 25, 115), (220, 50, 60), (245, 110, 20), (255, 190, 30))

# Only these say that a face was manipulated, so only with them the box means something.
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
FACE_TYPES = frozenset({"face_swap", "face_attribute"})
_MARGIN = 28
_PICTURE_WIDTH = 620
_PICTURE_HEIGHT = 620
_PANEL_WIDTH = 360
_LINE = 34
_MAX_LINES = 12
_MAX_HEAT_OPACITY = 0.6
_BODY = 19
_SMALL = 14
_TITLE = 32


class Piece(NamedTuple):
    """A piece of the caption: a scored word, or the text between two words."""

    text: str
    word: Word | None


def caption_pieces(result: Result) -> Iterator[Piece]:
    """Split the caption into its words and what stands between them; joined they give the caption."""
    position = 0
    for word in result.words:
        if word.start > position:
            yield Piece(result.caption[position : word.start], None)
        yield Piece(result.caption[word.start : word.end], word)
        position = word.end
    if position < len(result.caption):
        yield Piece(result.caption[position:], None)


def verdict(result: Result) -> tuple[str, Color]:
    """Return the headline and its colour."""
    return ("Manipulated", MANIPULATED) if result.manipulated else ("Not manipulated", PRISTINE)


def annotate(result: Result, image: ImageInput | None, limit: tuple[int, int]) -> Image.Image:
    """Return the photograph within `limit` (width, height), with the heat map and box of a manipulated pair.

    `image` replaces the stored thumbnail; with neither, a grey field of the same shape is drawn.
    """
    photo = _photograph(result, image, limit)
    if not result.manipulated:
        return photo
    if result.heatmap is not None:
        photo = _blend_heat(photo, result.heatmap)
    if result.box is not None and FACE_TYPES & set(result.detected):
        draw_box(photo, result.box, result.size)
    return photo


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless `path` has an extension that Pillow writes and its folder exists."""
    target = Path(path)
    if target.suffix.lower() not in _EXTENSIONS:
        raise InputError(f"{target}: expected the name of an image file, ending in {', '.join(_EXTENSIONS)}")
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target}: expected the name of a file in a folder that exists")


def draw_card(result: Result, image: ImageInput | None, font: str | os.PathLike[str] | None) -> Image.Image:
    """Draw the whole card: photograph on the left, verdict and types on the right, caption below."""
    photo = annotate(result, image, (_PICTURE_WIDTH, _PICTURE_HEIGHT))
    body, small = _font(font, _BODY), _font(font, _SMALL)
    width = 3 * _MARGIN + _PICTURE_WIDTH + _PANEL_WIDTH
    rows = list(_wrap(result, body, width - 2 * _MARGIN))
    top = 2 * _MARGIN + max(photo.height, _panel_height(result))
    height = top + _LINE * len(rows) + _MARGIN
    card = Image.new("RGB", (width, height), WHITE)
    card.paste(photo, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(card)
    _draw_panel(draw, result, (2 * _MARGIN + _PICTURE_WIDTH, _MARGIN), font)
    _draw_caption(draw, rows, top, body, small)
    return card


def mix(low: Color, high: Color, share: float) -> Color:
    """Return the colour `share` of the way from `low` to `high`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def word_color(word: Word) -> Color:
    """Background of a word: white at score 0, strongest at 1; words below the threshold stay pale."""
    return mix(WHITE, MANIPULATED, (0.25 + 0.45 * word.score) if word.manipulated else 0.2 * word.score)


def _font(path: str | os.PathLike[str] | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(os.fspath(path), size)


def _photograph(result: Result, image: ImageInput | None, limit: tuple[int, int]) -> Image.Image:
    photo = result.thumbnail if image is None else decode_image(image).rgb
    if photo is None:
        photo = Image.new("RGB", result.size if max(result.size) <= 1024 else (256, 256), EMPTY)
    scale = min(limit[0] / photo.width, limit[1] / photo.height)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    if scale < 1:
        photo = make_thumbnail(photo, max(size))
    return photo.resize(size, Image.Resampling.BICUBIC)


def _blend_heat(photo: Image.Image, heatmap: np.ndarray) -> Image.Image:
    """Blend the map over the image, more opaque where its value in [0, 1] is higher."""
    field = Image.fromarray(heatmap.astype(np.float32)).resize(photo.size, Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(field), 0.0, 1.0)
    anchors = np.linspace(0.0, 1.0, len(HEAT))
    channels = [np.interp(values, anchors, [color[c] for color in HEAT]) for c in range(3)]
    opacity = (_MAX_HEAT_OPACITY * values)[..., None]
    pixels = np.asarray(photo, dtype=np.float32)
    return Image.fromarray(
        np.rint(pixels * (1 - opacity) + np.stack(channels, -1) * opacity).astype(np.uint8)
    )


def draw_box(
    photo: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], color: Color = BOX
) -> None:
    """Draw a box (x1, y1, x2, y2), given in pixels of a (width, height) image, on `photo` of any size."""
    draw = ImageDraw.Draw(photo)
    scale = (photo.width / size[0], photo.height / size[1])
    x1, y1, x2, y2 = (value * scale[i % 2] for i, value in enumerate(box))
    x2, y2 = min(x2, photo.width - 1), min(y2, photo.height - 1)
    for grow, shade in ((1, INK), (0, color)):
        corners = (max(x1 - grow, 0), max(y1 - grow, 0), x2 + grow, y2 + grow)
        draw.rectangle(corners, outline=shade, width=3 + 2 * grow)


def _panel_height(result: Result) -> int:
    return 190 + 46 * len(result.types) + 22 * (2 + len(result.warnings))


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    result: Result,
    corner: tuple[int, int],
    font: str | os.PathLike[str] | None,
) -> None:
    x, y = corner
    body, small = _font(font, _BODY), _font(font, _SMALL)
    headline, color = verdict(result)
    draw.text((x, y - 6), headline, INK if color == PRISTINE else color, _font(font, _TITLE))
    y = _draw_bar(draw, (x, y + 44), "score", result.score, color, body)
    draw.line((x, y + 6, x + _PANEL_WIDTH, y + 6), TRACK, 2)
    y += 20
    for kind, score in result.types.items():
        active = result.manipulated and kind in result.detected
        y = _draw_bar(draw, (x, y), kind.replace("_", " "), score, MANIPULATED if active else MUTED, body)
    y += 8
    if result.manipulated and result.heatmap is not None:
        y = _draw_legend(draw, (x, y), small)
    for line in _notes(result):
        draw.text((x, y), _fit(line, small, _PANEL_WIDTH), MUTED, small)
        y += 22


def _notes(result: Result) -> list[str]:
    model = " ".join(result.model.get(key, "") for key in ("name", "size", "precision", "backend"))
    total = result.timing.get("total")
    return [model + (f", {total:.0f} ms" if total is not None else ""), *map(_printable, result.warnings)]


def _draw_bar(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], label: str, score: float, color: Color, font: Font
) -> int:
    """Draw a labelled bar and return the y below it."""
    x, y = corner
    value = f"{score:.1%}"
    draw.text((x, y), label, INK, font)
    draw.text((x + _PANEL_WIDTH - font.getlength(value), y), value, INK, font)
    draw.rectangle((x, y + 27, x + _PANEL_WIDTH, y + 34), TRACK)
    draw.rectangle((x, y + 27, x + round(_PANEL_WIDTH * score), y + 34), color)
    return y + 46


def _draw_legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], font: Font) -> int:
    """Draw the heat map's scale and return the y below it."""
    x, y = corner
    label = "patch evidence  0"
    draw.text((x, y), label, MUTED, font)
    left = x + round(font.getlength(label)) + 8
    right = x + _PANEL_WIDTH - 18
    for column in range(left, right):
        position = (column - left) / (right - left) * (len(HEAT) - 1)
        index = min(int(position), len(HEAT) - 2)
        draw.line((column, y + 3, column, y + 13), mix(HEAT[index], HEAT[index + 1], position - index))
    draw.text((right + 8, y), "1", MUTED, font)
    return y + 26


def _wrap(result: Result, font: Font, width: int) -> Iterator[list[Piece]]:
    """Break the caption into at most _MAX_LINES rows that fit `width` pixels."""
    row: list[Piece] = []
    used = 0.0
    count = 1
    for piece in _atoms(result, font, width):
        length = font.getlength(piece.text)
        if used + length > width and row:
            if count == _MAX_LINES:
                yield [*row, Piece(" ...", None)]
                return
            yield row
            row, used, count = [], 0.0, count + 1
        if row or not piece.text.isspace():
            row.append(piece)
            used += length
    if row:
        yield row


def _atoms(result: Result, font: Font, width: int) -> Iterator[Piece]:
    """The caption's pieces, printable, white space as one space, none wider than `width`."""
    for piece in caption_pieces(result):
        for text in re.findall(r"\s+|\S+", piece.text):
            shown = " " if text.isspace() else _fit(_printable(text), font, width)
            yield Piece(shown, piece.word)


def _draw_caption(
    draw: ImageDraw.ImageDraw, rows: list[list[Piece]], top: int, font: Font, small: Font
) -> None:
    for number, row in enumerate(rows):
        x, y = float(_MARGIN), top + number * _LINE
        for text, word in row:
            length = font.getlength(text)
            if word is not None:
                draw.rounded_rectangle((x - 2, y - 1, x + length + 2, y + 25), 4, word_color(word))
                if word.manipulated:
                    draw.line((x, y + 26, x + length, y + 26), MANIPULATED, 2)
            draw.text((x, y), text, INK, font)
            x += length


def _fit(text: str, font: Font, width: int) -> str:
    """Shorten `text` with an ellipsis until it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle] + "...") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low] + "..."


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
