from __future__ import annotations

import pytest
from PIL import ImageFont
from predictions import make_prediction

from engine.cards import fonts
from engine.cards.card import Piece, caption_pieces
from engine.cards.fonts import Fonts
from engine.cards.typeset import set_rows
from engine.errors import InputError

SIZE = 20


def rows_of(text, width=10_000, most=12):
    rows, leftwards = set_rows([Piece(text, None)], Fonts(None), SIZE, width, most)
    return ["".join(atom.text for atom in row) for row in rows], leftwards


def test_rows_break_at_spaces_and_fit():
    used = Fonts(None)
    rows, _ = set_rows(caption_pieces(make_prediction("word " * 50)), used, SIZE, 300, 99)
    assert len(rows) > 5
    for row in rows:
        assert used.length("".join(atom.text for atom in row), SIZE) <= 300
        assert not row[0].text.isspace() and not row[-1].text.isspace()


def test_a_long_word_is_cut_and_nothing_of_it_is_lost():
    rows, _ = rows_of("x" * 500, width=300, most=99)
    assert len(rows) > 5 and "".join(rows) == "x" * 500


def test_too_many_rows_end_with_an_ellipsis():
    rows, _ = rows_of("word " * 500, width=300, most=3)
    assert len(rows) == 3 and rows[-1].endswith(" ...")


def test_japanese_breaks_between_letters():
    text = "\u6771\u4eac\u306e\u685c" * 20
    rows, _ = rows_of(text, width=300, most=99)
    assert len(rows) > 1 and "".join(rows) == text


@pytest.mark.parametrize(
    ("text", "shown", "leftwards"),
    [
        ("a b c", "a b c", False),
        ("\u05d0 \u05d1 \u05d2", "\u05d2 \u05d1 \u05d0", True),
        ("a \u05d0 \u05d1 c", "a \u05d1 \u05d0 c", False),
        ("\u05d0 BBC News \u05d1", "\u05d1 BBC News \u05d0", True),
        ("\u05d0 12 34", "34 12 \u05d0", True),
        ("a \u05d0 12", "a \u05d0 12", False),
        ("12", "12", False),
    ],
)
def test_the_order_of_the_words_on_the_page(text, shown, leftwards):
    assert rows_of(text) == ([shown], leftwards)


def test_controls_cannot_mislead():
    (row,), _ = rows_of("pay\u202elive\u202c \u200bnow\x07")
    assert row == "paylive now\ufffd"


def test_a_letter_is_drawn_with_an_installed_font_that_has_it(tmp_path, monkeypatch):
    """Pillow's own font, written to a file, is the installed one here; the card's own lacks everything."""
    installed = tmp_path / "Plain-Regular.ttf"
    installed.write_bytes(ImageFont.load_default(SIZE).font_bytes)
    monkeypatch.setattr(fonts, "installed_fonts", lambda: (str(tmp_path / "broken.ttf"), str(installed)))
    monkeypatch.setattr(fonts, "_found", {})
    has_glyph = fonts._has_glyph
    monkeypatch.setattr(fonts, "_has_glyph", lambda path, c: path is not None and has_glyph(path, c))
    used = Fonts(None)
    ((text, font),) = used.runs("plain words", SIZE)
    assert text == "plain words" and font.path == str(installed)
    assert not used.missing
    used.runs("\u65e5", SIZE)
    assert used.missing == {"\u65e5"}


@pytest.mark.parametrize(
    ("text", "shown", "spelt"),
    [
        ("Well \U0001f44d\U0001f3fd done", "Well [thumbs up sign] done", True),
        ("\U0001f469\u200d\U0001f467\ufe0f", "[woman][girl]", True),
        ("\U0001f1eb\U0001f1f7 1\ufe0f\u20e3", "FR 1", True),
        (
            "na\u0131\u0308ve caf\xe9 \u0645\u06cc\u200c\u062e",
            "na\u0131\u0308ve caf\xe9 \u0645\u06cc\u200c\u062e",
            False,
        ),
        ("\u6771", "\u6771", False),  # a letter, whose name says nothing to most
    ],
)
def test_a_symbol_that_no_font_has_stands_in_words(text, shown, spelt, monkeypatch):
    monkeypatch.setattr(fonts, "installed_fonts", tuple)
    monkeypatch.setattr(fonts, "_found", {})
    used = Fonts(None)
    rows, _ = set_rows([Piece(text, None)], used, SIZE, 10_000, 1)
    assert ("".join(atom.text for atom in rows[0]), used.spelt) == (shown, spelt)


def test_installed_fonts_are_looked_for_in_the_usual_folders(tmp_path, monkeypatch):
    for name in ("B-Bold.ttf", "A-Italic.OTF", "C.ttc", "readme.txt", "LastResort.ttf"):
        path = tmp_path / "fonts" / "family" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(fonts.sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path}:/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = fonts.installed_fonts.__wrapped__()
    assert [path.rpartition("/")[2] for path in found] == ["C.ttc", "A-Italic.OTF", "B-Bold.ttf"]


def test_a_font_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "no.ttf").write_bytes(b"no font")
    for name in ("absent.ttf", "no.ttf", ""):
        with pytest.raises(InputError, match="font '.*': cannot be read as a TrueType font"):
            Fonts(tmp_path / name)
