from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from PIL import Image, features
from predictions import TYPES, make_prediction

from engine.cards import fonts
from engine.cards.card import Bar
from engine.cards.fonts import Fonts
from engine.cards.render import AMBER, BOX, annotate, choose_layout, draw_bar, fit_photo
from engine.cards.sheet import INK, SCALE, WHITE, Sheet
from engine.errors import InputError

PHOTO = (90, 120, 150)  # the colour of the predictions' plain image


def share(card, color):
    return (np.asarray(card) == color).all(axis=-1).mean()


def test_plot_saves_what_it_returns(tmp_path):
    card = make_prediction().plot(tmp_path / "out.png")
    assert card.mode == "RGB"
    with Image.open(tmp_path / "out.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(card))


def test_the_box_is_drawn_only_where_a_face_is_manipulated():
    assert share(make_prediction().plot(), BOX) > 0
    for fields in ({"manipulated": False}, {"detected": ("text_swap",)}, {"box": None}):
        assert share(make_prediction(**fields).plot(), BOX) == 0


def test_the_heat_map_is_drawn_where_it_is_hot():
    photo = Image.new("RGB", (640, 512), PHOTO)
    heated = np.asarray(annotate(make_prediction(box=None), photo)).astype(int)
    rows, columns = np.nonzero(np.abs(heated - PHOTO).sum(axis=-1) > 100)
    assert rows.mean() / 512 == pytest.approx(6 / 16, abs=0.03)
    assert columns.mean() / 640 == pytest.approx(6 / 16, abs=0.03)
    assert share(photo, PHOTO) == 1  # untouched: it is shown beside


def test_a_low_map_is_as_readable_as_a_high_one():
    photo, high = Image.new("RGB", (64, 64), PHOTO), make_prediction(box=None)
    drawn = np.asarray(annotate(high, photo)).astype(int)
    lowered = np.asarray(annotate(dataclasses.replace(high, heatmap=0.13 + 0.2 * high.heatmap), photo))
    assert np.abs(drawn - PHOTO).max() > 100 and np.abs(drawn - lowered).max() <= 1


def test_the_box_that_was_given_is_dashed_and_named():
    given = make_prediction(box_given=(5.0, 5.0, 95.0, 75.0), heatmap=None)
    marked = np.asarray(annotate(given, Image.new("RGB", (400, 320), PHOTO)))
    top = marked[20, 30:370]
    assert {tuple(pixel) for pixel in top} == {WHITE, INK}
    assert (top == WHITE).all(axis=-1).mean() == pytest.approx(0.5, abs=0.1)
    assert share(marked, BOX) > 0  # beside the network's own
    assert given.plot().height > make_prediction(heatmap=None).plot().height  # the legend
    assert share(make_prediction(box_given=(5.0, 5.0, 95.0, 75.0), manipulated=False).plot(), BOX) == 0


@pytest.mark.parametrize("box", [(0, 0, 100, 80), (99.5, 0, 100, 80), (0, 0, 1e-9, 1e-9)])
def test_any_box_can_be_drawn(box):
    assert make_prediction(box_given=tuple(map(float, box))).plot()


@pytest.mark.parametrize(
    ("size", "count", "beside", "across"),
    [
        ((400, 1600), 2, True, True),
        ((400, 1600), 1, True, None),
        ((1600, 1000), 2, False, True),
        ((4000, 400), 2, False, False),
        ((4000, 400), 1, False, None),
    ],
)
def test_tall_images_stand_beside_the_panel_and_wide_ones_above(size, count, beside, across):
    layout = choose_layout(size, count)
    assert layout.beside == beside
    assert across is None or layout.across == across


@pytest.mark.parametrize("size", [(400, 1000), (1000, 1000), (1000, 750), (1000, 400)])
def test_the_images_fill_the_card_and_a_clean_one_is_among_them(size):
    thumbnail = Image.new("RGB", size, PHOTO)
    card = make_prediction(size=size, heatmap=None, thumbnail=thumbnail).plot()
    assert share(card, (255, 255, 255)) < 0.7
    # The image twice, one of them with a box.
    assert share(card, PHOTO) > 0.25


def test_a_small_image_is_not_enlarged_into_a_blur():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    tiny = Image.fromarray(pixels)
    shown = fit_photo(tiny, (1000, 1000))
    assert shown.width >= 300
    assert set(shown.get_flattened_data()) == set(tiny.get_flattened_data())
    assert fit_photo(Image.new("RGB", (300, 200)), (2000, 2000)).size == (600, 400)
    assert fit_photo(Image.new("RGB", (3000, 2000)), (900, 900)).size == (900, 600)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4000), (4000, 1), (5000, 3000)])
def test_any_image_can_be_drawn(size):
    image = Image.new("RGB", size, (1, 2, 3))
    shaped = make_prediction(size=size, thumbnail=None)
    for card in (shaped.plot(image=image), shaped.plot()):
        assert 1000 < card.width < 2200 and card.height < 3000


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "x" * 4000,
        "word " * 800,
        "\u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f600",
        "\n\n\t",
        "\x00\u202e",
    ],
)
def test_any_caption_can_be_drawn(caption):
    assert make_prediction(caption, words=()).plot().height < 2600


def test_a_pair_without_an_image_or_a_verdict_can_be_drawn():
    unanswered = {"manipulated": None, "score": None, "types": dict.fromkeys(TYPES), "detected": ()}
    assert make_prediction(**unanswered).plot()
    blank = make_prediction(**unanswered, thumbnail=None, box=None, heatmap=None)
    assert dataclasses.replace(blank, size=None).plot()
    assert make_prediction(thresholds={}, model={}, timing={}).plot()


def test_an_unreadable_image_is_an_input_error():
    with pytest.raises(InputError, match=r"nowhere\.png"):
        make_prediction().plot(image="nowhere.png")


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.8, 1.0])
def test_the_threshold_is_a_tick_on_the_bar(threshold):
    sheet = Sheet(400, Fonts(None))
    draw_bar(sheet, Bar("", 0.1, threshold, False), named=False)
    pixels = np.asarray(sheet.cut())
    columns = np.nonzero((pixels == INK).all(axis=-1).any(axis=0))[0]
    assert columns.mean() == pytest.approx(400 * SCALE * threshold, abs=4)


def test_no_bar_is_green_and_none_says_by_its_colour_who_is_guilty():
    bars = []
    for manipulated in (True, False):
        sheet = Sheet(400, Fonts(None))
        draw_bar(sheet, Bar("", 0.9, 0.5, manipulated), named=True)
        bars.append(np.asarray(sheet.cut()).astype(int))
    assert np.array_equal(*bars)
    red, green, blue = np.moveaxis(bars[0], -1, 0)
    assert not ((green > red + 30) & (green > blue + 30)).any()


def test_a_ribbon_crosses_the_card_of_weights_that_say_nothing():
    for weights, shown in (("demo", True), ("drawn", True), ("trained", False)):
        card = make_prediction(model={"weights": weights}).plot()
        corners = card.getpixel((0, 0)), card.getpixel((card.width - 1, 0))
        assert [corner == AMBER for corner in corners] == [shown, shown]


def test_letters_that_no_font_has_are_told_on_the_card_and_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(fonts, "installed_fonts", lambda: ())
    monkeypatch.setattr(fonts, "_found", {})
    plain = make_prediction("plain").plot()
    with caplog.at_level(logging.WARNING, logger="engine.cards.render"):
        card = make_prediction("\u65e5\u672c").plot()
    assert "such as U+65E5 U+672C: install a font" in caplog.text
    assert card.height > plain.height


def test_right_to_left_letters_that_cannot_be_joined_are_told(monkeypatch, caplog):
    monkeypatch.setattr(features, "check", lambda feature: False)
    make_prediction("\u05e9\u05dc\u05d5\u05dd").plot()
    assert "built without raqm" in caplog.text
