"""Predictions as HTML: a fragment for one, a page for a list; self-contained, all escaped by Jinja2."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from engine.cards.card import (
    alternative,
    caption_pieces,
    evidence_notes,
    heat_scale,
    main_bar,
    model_name,
    model_note,
    percent,
    ribbon,
    shown_boxes,
    shown_types,
    threshold_percent,
    type_bars,
    verdict,
)
from engine.cards.render import BOX, HEAT_LAYER, fit_photo, heat_layer, read_photo
from engine.inputs.preprocess import ImageInput
from engine.result import Result

if TYPE_CHECKING:
    from jinja2 import Environment

# The most (width, height) in pixels.
_FRAGMENT_LIMIT, _LIST_LIMIT = (640, 480), (320, 320)
_HEAT_SIDE = 64
_JPEG_QUALITY = 88
# A list's image is encoded at the first of these qualities that keeps it so small.
_LIST_QUALITIES, _LIST_BYTES = (75, 50, 30), 14_000
_REASON = 240  # characters of an error
# What a message says of the item, which the heading of its card says already.
_ITEM = re.compile(r"^(item|line) \d+( \('.*'\))?: ", re.DOTALL)


class _Photo(NamedTuple):
    """An image of a card: a data URI, and the size in pixels, which holds its place until it is shown."""

    source: str
    width: int
    height: int

    @classmethod
    def of(cls, photo: Image.Image, encode: Callable[[Image.Image], str]) -> _Photo:
        """Encode an image."""
        return cls(encode(photo), *photo.size)


@dataclass
class _Summary:
    """What the head of a page tells about its pairs; written after them, shown above them."""

    verdicts: Counter[str] = field(default_factory=Counter)
    types: dict[str, None] = field(default_factory=dict)
    models: dict[str, None] = field(default_factory=dict)
    ribbons: dict[str, None] = field(default_factory=dict)

    def add(self, result: Result | Exception) -> None:
        """Count one pair."""
        self.verdicts[_verdict_key(result)] += 1
        if isinstance(result, Result):
            self.types |= dict.fromkeys(result.types)
            self.models[model_name(result)] = None
            if (text := ribbon(result)) is not None:
                self.ribbons[text] = None


def write_fragment(result: Result, image: ImageInput | None = None) -> str:
    """Return the fragment: the image, clean and with its evidence, verdict, types, caption and warnings.

    `image` replaces the stored thumbnail. Raises InputError where it cannot be read.
    """
    photo = read_photo(result, image)
    shown = None if photo is None else _Photo.of(fit_photo(photo, _FRAGMENT_LIMIT), _jpeg)
    stored = image is not None or result.thumbnail is not None
    card = _card(result, stored)
    card |= {"photo": shown, "clean_beside": card["boxes"] or card["heat"], "model": model_note(result)}
    return _environment().get_template("fragment.html").render(card=card)


def write_page(results: Iterable[tuple[str, Result | Exception]]) -> Iterator[str]:
    """Yield a whole HTML document, part by part as the results come: (name, prediction or its error) each.

    Only one pair is held at a time. The page counts, sorts and filters its pairs; without scripts it is a
    plain list.
    """
    summary = _Summary()
    environment = _environment()
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    pairs = (_pair(number, name, result, summary) for number, (name, result) in enumerate(results, start=1))
    template = environment.get_template("page.html")
    yield from map(str, template.generate(pairs=pairs, summary=summary, script=script, script_digest=digest))


def _pair(number: int, name: str, result: Result | Exception, summary: _Summary) -> dict[str, Any]:
    """What the page's template shows of one pair."""
    summary.add(result)
    pair = {"number": number, "name": name, "verdict": _verdict_key(result)}
    if isinstance(result, Exception):
        return pair | {"error": _reason(result), "card": None, "score": None, "types": ()}
    photo = read_photo(result, None)
    shown = None if photo is None else _Photo.of(fit_photo(photo, _LIST_LIMIT), _small)
    card = _card(result, result.thumbnail is not None) | {"photo": shown, "clean_beside": False}
    return pair | {"error": None, "card": card, "score": result.score, "types": shown_types(result)}


def _reason(error: Exception) -> str:
    """What went wrong, without the item, which the heading names, and not too long to read."""
    reason = _ITEM.sub("", str(error))
    return reason if len(reason) <= _REASON else reason[: _REASON - 3] + "..."


def _verdict_key(result: Result | Exception) -> str:
    return "error" if isinstance(result, Exception) else verdict(result).lower().replace(" ", "-")


def _card(result: Result, stored: bool) -> dict[str, Any]:
    """What the card's template shows, but for the image; `stored` is whether there is one."""
    heat = heat_layer(result, (_HEAT_SIDE, _HEAT_SIDE))
    boxes = shown_boxes(result)
    return {
        "verdict": verdict(result),
        "manipulated": result.manipulated,
        "ribbon": ribbon(result),
        "main": main_bar(result),
        "types": type_bars(result),
        "notes": [*evidence_notes(result, stored), *result.warnings],
        # Runs of pieces with one mark.
        "caption": [
            (mark, list(run)) for mark, run in groupby(caption_pieces(result), lambda piece: piece.mark)
        ],
        "heat": None if heat is None else _encode(heat, "WEBP", quality=60),
        "scale": heat_scale(result),
        "boxes": boxes,
        "named": any(box.given for box in boxes),  # one alone is the network's, as on every card
        "alternative": alternative(result),
    }


def environment(package: str) -> Environment:
    """Jinja2 over the templates of a package: all text escaped, control characters replaced."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: _allowed(value) if type(value) is str else value,
    )


@cache
def _environment() -> Environment:
    made = environment("engine.cards")
    made.filters |= {"percent": percent, "threshold": threshold_percent}
    made.globals |= {"box_color": css(BOX), "heat_colors": ", ".join(map(css, HEAT_LAYER))}
    return made


def embed(photo: Image.Image) -> str:
    """Return an <img> with the image itself as its source, as JPEG."""
    return f'<img alt="the image" style="max-width:100%" src="{_jpeg(photo)}">'


def _jpeg(photo: Image.Image) -> str:
    return _encode(photo, "JPEG", quality=_JPEG_QUALITY)


def _small(photo: Image.Image) -> str:
    """An image of a list, in few bytes; one that is all noise has half its sides."""
    for quality in _LIST_QUALITIES:
        source = _encode(photo, "WEBP", quality)
        if len(source) <= _LIST_BYTES:
            return source
    return _encode(photo.reduce(2), "WEBP", _LIST_QUALITIES[-1])


def _encode(image: Image.Image, kind: str, quality: int) -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def css(color: Sequence[int]) -> str:
    """Return a colour, RGB or RGBA, as CSS writes it."""
    return "#" + "".join(f"{channel:02x}" for channel in color)


def _allowed(text: str) -> str:
    """The text with U+FFFD for control characters, which HTML does not allow."""
    return "".join(c if c >= " " and not "\x7f" <= c <= "\x9f" or c in "\t\n\r" else "\ufffd" for c in text)
