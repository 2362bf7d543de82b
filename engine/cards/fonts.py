"""Fonts for any script: a letter that the chosen font lacks is drawn with an installed font that has it."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import ImageFont

from engine.errors import InputError, quoted

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_SUFFIXES = (".ttf", ".otf", ".ttc")
_STYLES = (
    "bold",
    "italic",
    "oblique",
    "light",
    "thin",
    "black",
    "mono",
    "serif",
    "math",
    "narrow",
    "condensed",
)
_BLANK = "lastresort"  # has a placeholder for every letter
_MOST_FONTS = 400  # opened in search of a letter, about a millisecond each
_PROBE_SIZE = 16
_UNASSIGNED = "\U0010ffff"  # no font has it, so it is drawn as the font draws what it lacks
_SYMBOLS = ("So", "Sk", "Me")  # pictures, modifiers such as skin colours, and enclosing marks
_FLAG_A = "\U0001f1e6"
_EMOJI_JOINERS = "\u200d\ufe0f"
JOINERS = "\u200c\u200d"  # decide how the letters beside them join

_found: dict[str, str | None] = {}  # by letter: the installed font that has it


def font_folders() -> list[Path]:
    """Return the folders where this system keeps its fonts."""
    home = Path("~").expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return [
            Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"),
            Path(local, r"Microsoft\Windows\Fonts"),
        ]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [*(Path(x, "fonts") for x in shared.split(":")), home / ".local/share/fonts", home / ".fonts"]


@cache
def installed_fonts() -> tuple[str, ...]:
    """Return the paths of the installed fonts, upright sans serif of regular weight first."""
    paths = [
        str(Path(folder, name))
        for root in font_folders()
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(_SUFFIXES) and _BLANK not in name.lower()
    ]
    return tuple(sorted(paths, key=lambda path: (_styles(path), path))[:_MOST_FONTS])


def _styles(path: str) -> int:
    name = Path(path).name.lower()
    return sum(style in name for style in _STYLES)


class Fonts:
    """The fonts of one card: a given TrueType file or Pillow's own font first, then the installed ones.

    `missing` collects the letters that none of them has; `spelt` is whether symbols were put in words. Raises
    InputError where `path` cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else os.fspath(path)
        self.missing: set[str] = set()
        self.spelt = False
        try:
            _load(self.path, _PROBE_SIZE)
        except (OSError, ValueError) as error:
            raise InputError(
                f"font {quoted(self.path)}: cannot be read as a TrueType font: {error}"
            ) from error

    def runs(self, text: str, size: int) -> list[tuple[str, Font]]:
        """Split `text` into the longest runs that one font draws, in order."""
        letters = [c for c in text if _needs_glyph(c)]
        lacking = [c for c in letters if not _has_glyph(self.path, c)]
        if not lacking:
            return [(text, _load(self.path, size))]
        _find(lacking)
        self.missing.update(c for c in lacking if _found[c] is None)
        other = _found[lacking[0]]
        if other is not None and all(_has_glyph(other, c) for c in letters):
            return [(text, _load(other, size))]
        chosen = self._paths(text, set(lacking))
        pairs = groupby(zip(text, chosen, strict=True), key=lambda pair: pair[1])
        return [("".join(c for c, _ in run), _load(path, size)) for path, run in pairs]

    def spelled(self, text: str) -> str:
        """Return `text` with the symbols that no font has in words, as "[thumbs up sign]" for an emoji.

        Parts of an emoji, such as a skin colour, are left out where no font has them; flags become letters.
        """
        lacking = {c for c in text if _needs_glyph(c) and not _has_glyph(self.path, c)}
        _find(lacking)
        absent = {c for c in lacking if _found[c] is None and unicodedata.category(c) in _SYMBOLS}
        if not absent:
            return text
        self.spelt = True
        return "".join(_spell(c) if c in absent else "" if c in _EMOJI_JOINERS else c for c in text)

    def length(self, text: str, size: int) -> float:
        """Return the width of `text` in pixels."""
        return sum(font.getlength(part) for part, font in self.runs(text, size))

    def _paths(self, text: str, lacking: set[str]) -> Iterator[str | None]:
        """The font of each letter; accents and joiners stay with the letter before them."""
        path = self.path
        for c in text:
            if _needs_glyph(c) and not unicodedata.combining(c):
                path = _found[c] or self.path if c in lacking else self.path
            yield path


def _spell(c: str) -> str:
    """A symbol in words; nothing for a part of another one."""
    if _FLAG_A <= c <= "\U0001f1ff":  # two of these letters are a flag
        return chr(ord("A") + ord(c) - ord(_FLAG_A))
    if unicodedata.category(c) != "So":
        return ""
    return f"[{unicodedata.name(c, 'symbol').lower()}]"


def _find(letters: Iterable[str]) -> None:
    """Look up letters in the installed fonts, each font opened once; the answers stay in `_found`."""
    unknown = {c for c in letters if c not in _found}
    for path in installed_fonts() if unknown else ():
        has = {c for c in unknown if _has_glyph(path, c)}
        _found.update(dict.fromkeys(has, path))
        unknown -= has
        if not unknown:
            break
    _found.update(dict.fromkeys(unknown))


def _needs_glyph(c: str) -> bool:
    """Whether a letter is visible by itself: no space, joiner or variation selector."""
    return not c.isspace() and c not in JOINERS and not "\ufe00" <= c <= "\ufe0f"


@cache
def _load(path: str | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@cache
def _probe(path: str | None) -> tuple[Font, bytes] | None:
    """A font at a small size and its picture of a letter that it lacks; None where it cannot be loaded."""
    try:
        # Without shaping: a shaper may combine or replace letters.
        font = _load(None, _PROBE_SIZE) if path is None else _basic(path)
        return font, _picture(font, _UNASSIGNED)
    except (OSError, ValueError):
        return None


def _basic(path: str) -> Font:
    return ImageFont.truetype(path, _PROBE_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _picture(font: Font, c: str) -> bytes:
    mask = font.getmask(c)
    return b"%d %d " % mask.size + bytes(mask)


@cache
def _has_glyph(path: str | None, c: str) -> bool:
    probe = _probe(path)
    if probe is None:
        return False
    font, lacking = probe
    try:
        return _picture(font, c) != lacking
    except (OSError, ValueError):
        return False
