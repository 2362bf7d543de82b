"""A prediction as a self-contained HTML fragment: no script, no external address, everything escaped."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from engine.inputs.preprocess import ImageInput
from engine.render import INK, MANIPULATED, MUTED, TRACK, Color, annotate, caption_pieces, verdict, word_color
from engine.result import Result, Word

_PICTURE_LIMIT = (640, 640)
_JPEG_QUALITY = 88


def write_fragment(result: Result, image: ImageInput | None = None) -> str:
    """Return the fragment: the annotated photograph, verdict, types, caption and warnings.

    `image` replaces the stored thumbnail. Raises InputError where it cannot be read.
    """
    headline, color = verdict(result)
    panel = [
        f'<h3 style="margin:0 0 12px;font-size:24px;color:{css(color)}">{headline}</h3>',
        _bar("score", result.score, color),
        '<hr style="border:0;border-top:2px solid #e5e7eb;margin:14px 0">',
    ]
    for kind, score in result.types.items():
        active = result.manipulated and kind in result.detected
        panel.append(_bar(kind.replace("_", " "), score, MANIPULATED if active else MUTED))
    notes = [" ".join(result.model.values()), *result.warnings]
    panel += [f'<div style="color:{css(MUTED)};font-size:13px">{escape(note)}</div>' for note in notes]
    return (
        f'<div style="font-family:system-ui,sans-serif;color:{css(INK)};background:#fff;'
        'padding:20px;max-width:1060px">'
        '<div style="display:flex;flex-wrap:wrap;gap:28px">'
        f'<div style="flex:1 1 320px">{_image(result, image)}</div>'
        f'<div style="flex:1 1 280px">{"".join(panel)}</div></div>'
        '<p dir="auto" style="font-size:18px;line-height:1.8;overflow-wrap:anywhere">'
        f"{_caption(result)}</p></div>\n"
    )


def _image(result: Result, image: ImageInput | None) -> str:
    return embed(annotate(result, image, _PICTURE_LIMIT))


def embed(photo: Image.Image) -> str:
    """Return an <img> with the image itself as its source, as JPEG."""
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="the picture" style="max-width:100%" src="data:image/jpeg;base64,{data}">'


def _bar(label: str, score: float, color: Color) -> str:
    return (
        f'<div style="display:flex;justify-content:space-between"><span>{escape(label)}</span>'
        f"<span>{score:.1%}</span></div>"
        f'<div style="background:{css(TRACK)};border-radius:4px;margin:3px 0 12px">'
        f'<div style="width:{score:.1%};height:8px;border-radius:4px;background:{css(color)}"></div></div>'
    )


def _caption(result: Result) -> str:
    return "".join(
        escape(text) if word is None else _mark(text, word) for text, word in caption_pieces(result)
    )


def _mark(text: str, word: Word) -> str:
    line = f";border-bottom:2px solid {css(MANIPULATED)}" if word.manipulated else ""
    style = f"color:inherit;border-radius:4px;padding:1px 2px;background:{css(word_color(word))}{line}"
    return f'<mark title="{word.score:.1%}" style="{style}">{escape(text)}</mark>'


def css(color: Color) -> str:
    """Return a colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def escape(text: str) -> str:
    """Escape for HTML; control characters, which it does not allow, become U+FFFD."""
    allowed = "".join(
        c if c >= " " and not "\x7f" <= c <= "\x9f" or c in "\t\n\r" else "\ufffd" for c in text
    )
    return html.escape(allowed, quote=True)
