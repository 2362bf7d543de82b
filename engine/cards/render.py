"""Draws a prediction as one image: the photograph, its evidence, the verdict, the types, the caption.

Pillow only. The card is laid out in units of two pixels each, so that it is sharp on a dense screen.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from engine.cards.card import (
    Bar,
    HeatScale,
    Piece,
    ShownBox,
    caption_pieces,
    evidence_notes,
    heat_scale,
    main_bar,
    model_note,
    ribbon,
    shown_boxes,
    threshold_percent,
    type_bars,
    verdict,
)
from engine.cards.fonts import Fonts
from engine.cards.sheet import INK, MANIPULATED, MUTED, SCALE, TRACK, UNREAD, WHITE, Color, Sheet, mix
from engine.cards.typeset import lacks_shaping
from engine.errors import InputError
from engine.inputs.preprocess import ImageInput, decode_image, make_thumbnail
from engine.logs import warn_once
from engine.result import Result

logger = logging.getLogger(__name__)

EMPTY: Color = (209, 213, 219)
BOX: Color = (0, 229, 255)
# A bar says how much, not good or bad: its colour only tells whether its threshold is reached.
REACHED: Color = (51, 65, 85)
BELOW: Color = (148, 163, 184)
AMBER: Color = (255, 193, 7)
DARK_AMBER: Color = (161, 83, 0)
# From no evidence to full evidence; between the anchors the colours are mixed.
HEAT: tuple[Color, ...] = ((49, 18, 99), (150, 25, 115), (220, 50, 60), (245, 110, 20), (255, 190, 30))

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
# The anchors as they lie on an image, RGBA: the first leaves it as it is, and only high values hide it.
HEAT_LAYER = tuple((*color, round(255 * 0.75 * (i / (len(HEAT) - 1)) ** 2)) for i, color in enumerate(HEAT))
_DASH = 9  # pixels
_MARGIN, _GAP, _RIBBON = 28, 24, 40
_WIDTH, _LEAST_WIDTH, _PANEL = 984, 740, 360
_HEIGHT_BESIDE, _HEIGHT_ABOVE = 640, 460
_PANEL_HEIGHT = {1: 350, 2: 220}  # about, by its columns
_MAX_LINES = 12
_TITLE, _BODY, _SMALL = 32, 19, 14
_LEADING, _SMALL_LEADING = 36, 22
_LEAST_GRADIENT = 80
# Below this longer side the pixels of an image are shown as squares, not blurred; and how large they grow.
_SQUARES, _SQUARES_SIDE = 128, 200


class Layout(NamedTuple):
    """Where the images stand: beside or above the panel, side by side or stacked, each within `slot`."""

    beside: bool
    across: bool
    slot: tuple[float, float]  # width and height in units


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless `path` has an extension that Pillow writes and its folder exists."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"expected the path of an image file to draw into, got {type(path).__name__}")
    target = Path(path)
    if target.suffix.lower() not in _EXTENSIONS:
        raise InputError(f"{target}: expected the name of an image file, ending in {', '.join(_EXTENSIONS)}")
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target}: expected the name of a file in a folder that exists")


def draw_card(result: Result, image: ImageInput | None, font: str | os.PathLike[str] | None) -> Image.Image:
    """Draw the whole card; its size follows the image's shape and the caption.

    Raises InputError where `image` or `font` cannot be read.
    """
    fonts = Fonts(font)
    photo = read_photo(result, image)
    upper = (
        _draw_panel(result, _LEAST_WIDTH, fonts, columns=2)
        if photo is None
        else _draw_images_and_panel(result, photo, fonts)
    )
    width, stored = upper.width // SCALE, image is not None or result.thumbnail is not None
    lower = _draw_caption(result, width, fonts, stored)
    height = (upper.height + lower.height) // SCALE
    card = Sheet(width + 2 * _MARGIN, fonts, height + _RIBBON + 2 * _MARGIN + _GAP)
    if (text := ribbon(result)) is not None:
        card.rectangle(0, 0, card.width, _RIBBON, AMBER)
        card.text(_MARGIN, 10, text, _BODY)
        card.y = _RIBBON
    for part, space in ((upper, _MARGIN), (lower, _GAP)):
        card.paste(part, _MARGIN, card.y + space)
        card.y += space + part.height // SCALE
    card.y += _MARGIN - 8
    return card.cut()


def choose_layout(size: tuple[int, int], count: int) -> Layout:
    """Choose where `count` images of one size, (width, height) in pixels, fill most of the card."""

    def candidate(beside: bool, across: bool) -> tuple[float, Layout]:
        columns, rows = (count, 1) if across else (1, count)
        width, height = (_WIDTH - _PANEL - _GAP, _HEIGHT_BESIDE) if beside else (_WIDTH, _HEIGHT_ABOVE)
        slot = (width - (columns - 1) * _GAP) / columns, (height - (rows - 1) * _GAP) / rows
        scale = min(slot[0] / size[0], slot[1] / size[1], 1.0)
        block = columns * (scale * size[0] + _GAP), rows * (scale * size[1] + _GAP)
        card = (
            (block[0] + _PANEL) * max(block[1], _PANEL_HEIGHT[1])
            if beside
            else max(block[0], _LEAST_WIDTH) * (block[1] + _PANEL_HEIGHT[2])
        )
        return count * scale**2 * size[0] * size[1] / card, Layout(beside, across, slot)

    candidates = [candidate(beside, across) for beside in (True, False) for across in (True, False)]
    return max(candidates, key=lambda scored: scored[0])[1]


def read_photo(result: Result, image: ImageInput | None) -> Image.Image | None:
    """Return `image`, else the thumbnail, else a grey field; None for a pair without an image."""
    if image is not None:
        return decode_image(image).rgb
    if result.thumbnail is not None or not result.size:
        return result.thumbnail
    scale = min(1.0, 512 / max(result.size))
    width, height = (max(1, round(side * scale)) for side in result.size)
    return Image.new("RGB", (width, height), EMPTY)


def fit_photo(photo: Image.Image, limit: tuple[float, float]) -> Image.Image:
    """Return the image within `limit` (width, height) in pixels; a small one is not enlarged into a blur."""
    scale = min(limit[0] / photo.width, limit[1] / photo.height)
    resample = Image.Resampling.BICUBIC
    if scale < 1:
        photo, scale = make_thumbnail(photo, max(1, round(max(photo.size) * scale))), 1.0
    elif max(photo.size) < _SQUARES:
        scale = max(1, int(min(scale, _SQUARES_SIDE * SCALE / max(photo.size))))
        resample = Image.Resampling.NEAREST
    else:
        scale = min(scale, SCALE)
    return photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))), resample)


def annotate(result: Result, photo: Image.Image) -> Image.Image:
    """Return a copy of the photograph with the heat map and the box, where they mean something."""
    photo = photo.copy()
    if (heat := heat_layer(result, photo.size)) is not None:
        photo.paste(heat, mask=heat.getchannel("A"))
    for box in shown_boxes(result):
        draw_box(photo, box)
    return photo


def heat_layer(result: Result, size: tuple[int, int]) -> Image.Image | None:
    """Return the heat map as RGBA of (width, height) pixels, more opaque where it is higher; None without."""
    if result.heatmap is None or (scale := heat_scale(result)) is None:
        return None
    field = Image.fromarray(result.heatmap.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    values = np.clip((np.asarray(field) - scale.low) / (scale.high - scale.low), 0.0, 1.0)
    anchors = np.linspace(0.0, 1.0, len(HEAT_LAYER))
    layers = [np.interp(values, anchors, [color[c] for color in HEAT_LAYER]) for c in range(4)]
    return Image.fromarray(np.rint(np.stack(layers, -1)).astype(np.uint8), "RGBA")


def draw_box(photo: Image.Image, box: ShownBox) -> None:
    """Draw a box on the image that it is of: the network's in its colour, the given one in white dashes."""
    draw = ImageDraw.Draw(photo)
    last = (photo.width - 1, photo.height - 1)
    x1, y1, x2, y2 = (min(share * photo.size[i % 2], last[i % 2]) for i, share in enumerate(box.shares))
    outer = (max(x1 - 1, 0), max(y1 - 1, 0), x2 + 1, y2 + 1)
    draw.rectangle(outer, outline=INK, width=5)
    if not box.given:
        draw.rectangle((x1, y1, x2, y2), outline=BOX, width=3)
        return
    for left in np.arange(x1, x2, 2 * _DASH):
        for top in (y1, y2 - 2):
            draw.rectangle((left, top, min(left + _DASH, x2), top + 2), WHITE)
    for top in np.arange(y1, y2, 2 * _DASH):
        for left in (x1, x2 - 2):
            draw.rectangle((left, top, left + 2, min(top + _DASH, y2)), WHITE)


def _draw_images_and_panel(result: Result, photo: Image.Image, fonts: Fonts) -> Image.Image:
    """Draw the images, clean and with evidence, and the panel beside or below them."""
    count = 2 if shown_boxes(result) or heat_scale(result) else 1
    layout = choose_layout(photo.size, count)
    images = _draw_images(result, photo, layout, count, fonts)
    width, height = images.width // SCALE, images.height // SCALE
    if layout.beside:
        whole = max(_LEAST_WIDTH, width + _GAP + _PANEL)
        panel = _draw_panel(result, whole - width - _GAP, fonts, columns=1)
        corner = width + _GAP, 0
    else:
        whole = max(_LEAST_WIDTH, width)
        panel = _draw_panel(result, whole, fonts, columns=2)
        corner = 0, height + _GAP
    sheet = Sheet(whole, fonts)
    sheet.paste(images, 0, 0)
    sheet.paste(panel, *corner)
    sheet.y = max(height, corner[1] + panel.height // SCALE)
    return sheet.cut()


def _draw_images(result: Result, photo: Image.Image, layout: Layout, count: int, fonts: Fonts) -> Image.Image:
    """Draw the clean image, the one with evidence, and the heat map's scale."""
    clean = fit_photo(photo, (layout.slot[0] * SCALE, layout.slot[1] * SCALE))
    images = [clean, annotate(result, clean)][:count]
    width, height = -(-clean.width // SCALE), -(-clean.height // SCALE)
    steps = (width + _GAP, 0) if layout.across else (0, height + _GAP)
    block = Sheet(max(width + steps[0] * (count - 1), 180), fonts)
    for number, part in enumerate(images):
        block.paste(part, steps[0] * number, steps[1] * number)
    block.y = height + steps[1] * (count - 1)
    if (scale := heat_scale(result)) is not None:
        _draw_scale(block, scale)
    boxes = shown_boxes(result)
    if any(box.given for box in boxes):  # one alone is the network's, as on every card
        _draw_legend(block, boxes)
    return block.cut()


def _draw_scale(sheet: Sheet, scale: HeatScale) -> None:
    """Draw the heat map's scale below what is there: its name, and beside or below it the colours."""
    y, label, end = sheet.y + 12, f"{scale.label}  ", f"{scale.high:g}"
    low, left = f"{scale.low:g}", sheet.length(label, _SMALL)
    sheet.text(0, y, label, _SMALL, MUTED)
    taken = sheet.length(low, _SMALL) + sheet.length(end, _SMALL) + 16
    if sheet.width - left - taken < _LEAST_GRADIENT:
        y, left = y + _SMALL_LEADING, 0
    sheet.text(left, y, low, _SMALL, MUTED)
    left += sheet.length(low, _SMALL) + 8
    width = min(sheet.width - left - sheet.length(end, _SMALL) - 8, 240)
    sheet.gradient(left, y + 3, width, 10, tuple(mix(WHITE, c[:3], c[3] / 255) for c in HEAT_LAYER))
    sheet.text(left + width + 8, y, end, _SMALL, MUTED)
    sheet.y = y + _SMALL_LEADING


def _draw_legend(sheet: Sheet, boxes: list[ShownBox]) -> None:
    """Say below what is there which box is whose, one a line."""
    sheet.y += 12
    for box in boxes:
        swatch = Image.new("RGB", (22 * SCALE, 14 * SCALE), UNREAD)
        draw_box(swatch, box._replace(shares=(0, 0, 1, 1)))
        sheet.paste(swatch, 0, sheet.y + 2)
        sheet.text(30, sheet.y, box.text, _SMALL, MUTED)
        sheet.y += _SMALL_LEADING


def _draw_panel(result: Result, width: int, fonts: Fonts, columns: int) -> Image.Image:
    """Draw the verdict with its bar, and the types below it or in a second column."""
    column = width if columns == 1 else (width - 2 * _GAP) // 2
    left, right = Sheet(column, fonts, 600), Sheet(column, fonts, 600)
    left.text(0, 0, verdict(result), _TITLE, MANIPULATED if result.manipulated else INK)
    left.y = 56
    draw_bar(left, main_bar(result), named=True)
    types = left if columns == 1 else right
    if columns == 1:
        left.rectangle(0, left.y, column, 1, TRACK)
        left.y += 18
    for bar in type_bars(result):
        draw_bar(types, bar, named=False)
    panel = Sheet(width, fonts, 600)
    panel.paste(left.cut(), 0, 0)
    if columns == 2:
        panel.paste(right.cut(), width - column, 0)
    panel.y = max(left.y, right.y)
    return panel.cut()


def draw_bar(sheet: Sheet, bar: Bar, named: bool) -> None:
    """Draw a labelled bar with its threshold as a tick, whose value stands below where `named`."""
    reached = bar.detected or named
    sheet.text(0, sheet.y, bar.label, _BODY, INK if reached else MUTED)
    if bar.weak:
        sheet.text(sheet.length(bar.label, _BODY) + 10, sheet.y + 4, "weak", _SMALL, DARK_AMBER)
    taken = sheet.length(bar.label, _BODY) + sheet.length(bar.value, _BODY)
    size = _BODY if taken < sheet.width - _GAP // 2 else _SMALL
    left, top = sheet.width - sheet.length(bar.value, size), sheet.y + _BODY - size
    sheet.text(left, top, bar.value, size, INK if reached else MUTED)
    y = sheet.y + 30
    sheet.rectangle(0, y, sheet.width, 8, TRACK, 4)
    if bar.score is not None:
        sheet.rectangle(0, y, max(8, sheet.width * bar.score), 8, REACHED if reached else BELOW, 4)
    sheet.y += 50
    if bar.threshold is None:
        return
    tick = min(sheet.width * bar.threshold, sheet.width - 2)
    sheet.rectangle(tick - 1, y - 4, 4, 16, WHITE)
    sheet.rectangle(tick, y - 4, 2, 16, INK)
    if named:
        text = f"threshold {threshold_percent(bar.threshold)}"
        length = sheet.length(text, _SMALL)
        sheet.text(min(max(tick - length / 2, 0), sheet.width - length), y + 16, text, _SMALL, MUTED)
        sheet.y += 24


def _draw_caption(result: Result, width: int, fonts: Fonts, stored: bool) -> Image.Image:
    """Draw the caption and the notes."""
    sheet = Sheet(width, fonts)
    sheet.y = 4  # of a mark above its word
    sheet.paragraph(caption_pieces(result), _BODY, _LEADING, _MAX_LINES)
    sheet.y += 8
    known = [*evidence_notes(result, stored), *result.warnings]
    for note in [*_drawing_notes(result.caption, known, fonts), *known]:
        sheet.paragraph([Piece(note, None)], _SMALL, _SMALL_LEADING, 3, DARK_AMBER)
    sheet.paragraph([Piece(model_note(result), None)], _SMALL, _SMALL_LEADING, 3, MUTED)
    return sheet.cut()


def _drawing_notes(caption: str, notes: list[str], fonts: Fonts) -> list[str]:
    """Tell, on the card and in the log, which text cannot be drawn as it should."""
    for note in notes:
        fonts.runs(note, _SMALL)
    told = []
    if fonts.missing:
        letters = " ".join(f"U+{ord(c):04X}" for c in sorted(fonts.missing)[:5])
        told.append(f"Some letters cannot be drawn, such as {letters}: install a font that has them.")
    if fonts.spelt:
        told.append("Symbols that no font here has stand as words in brackets.")
    if lacks_shaping(caption):
        told.append("Right-to-left letters are not joined: this Pillow was built without raqm.")
    for note in told:
        warn_once(logger, note)
    return told
