from __future__ import annotations

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from engine import Prediction, Word
from engine.errors import InputError
from engine.render import BOX, caption_pieces

CAPTION = 'The <script>alert("x")</script> of Obama\'s\n& co. \x00\x07end'


@pytest.fixture
def prediction():
    starts = [(match.start(), match.end()) for match in re.finditer(r"The|Obama's|end", CAPTION)]
    words = [
        Word(CAPTION[a:b], a, b, score, score >= 0.5)
        for (a, b), score in zip(starts, (0.1, 0.9, 0.6), strict=True)
    ]
    heatmap = np.zeros((16, 16), np.float32)
    heatmap[4:8, 4:8] = 1
    return Prediction(
        manipulated=True,
        score=0.93,
        types={"face_swap": 0.9, "face_attribute": 0.2, "text_swap": 0.1, "text_attribute": 0.7},
        detected=("face_swap", "text_attribute"),
        box=(25.0, 25.0, 75.0, 60.0),
        words=tuple(words),
        caption=CAPTION,
        size=(100, 80),
        warnings=("text_truncated: <kept> 50 of 73 words",),
        model={"name": "asap", "size": "tiny", "precision": "fp32", "backend": "ort", "device": "cpu"},
        heatmap=heatmap,
        timing={"total": 12.5},
        thumbnail=Image.new("RGB", (100, 80), (90, 120, 150)),
    )


class Page(html.parser.HTMLParser):
    """Collects tags, addresses and text of a fragment, and checks that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text, self.marks, self.open = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "mark":
            self.marks.append(data)


def test_json_round_trip(prediction):
    data = json.loads(prediction.to_json())
    assert data == prediction.to_dict()
    assert data["box"] == [25.0, 25.0, 75.0, 60.0]
    assert data["words"][1] == {"text": "Obama's", "start": 35, "end": 42, "score": 0.9, "manipulated": True}
    assert np.array_equal(np.array(data["heatmap"], np.float32), prediction.heatmap)
    assert "heatmap" not in prediction.to_dict(heatmap=False)
    assert "thumbnail" not in data


def test_json_holds_no_nan(prediction):
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(prediction, score=float("nan")).to_json()


def test_repr_and_equality_leave_out_the_arrays(prediction):
    assert "thumbnail" not in repr(prediction)
    assert "heatmap" not in repr(prediction)
    assert prediction == dataclasses.replace(prediction, heatmap=None, thumbnail=None, timing={})
    assert prediction != dataclasses.replace(prediction, score=0.5)


def test_pieces_join_to_the_caption(prediction):
    pieces = list(caption_pieces(prediction))
    assert "".join(piece.text for piece in pieces) == CAPTION
    assert [piece.text for piece in pieces if piece.word] == ["The", "Obama's", "end"]


def test_plot_saves_what_it_returns(prediction, tmp_path):
    card = prediction.plot(tmp_path / "out.png")
    assert card.mode == "RGB"
    with Image.open(tmp_path / "out.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(card))


def test_the_box_is_drawn_only_where_a_face_is_manipulated(prediction):
    has_box = lambda card: (np.asarray(card) == BOX).all(axis=-1).any()  # noqa: E731
    assert has_box(prediction.plot())
    assert not has_box(dataclasses.replace(prediction, manipulated=False).plot())
    assert not has_box(dataclasses.replace(prediction, detected=("text_swap",)).plot())
    assert not has_box(dataclasses.replace(prediction, box=None).plot())


def test_the_heat_map_is_drawn_where_it_is_hot(prediction):
    plain = np.asarray(dataclasses.replace(prediction, heatmap=None, box=None).plot()).astype(int)
    heated = np.asarray(dataclasses.replace(prediction, box=None).plot()).astype(int)
    changed = np.abs(plain - heated).sum(axis=-1)[28:500, 28:640]
    rows, columns = np.nonzero(changed > 100)
    height, width = 496, 620
    assert rows.mean() / height == pytest.approx(6 / 16, abs=0.03)
    assert columns.mean() / width == pytest.approx(6 / 16, abs=0.03)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (5000, 3000)])
def test_any_picture_can_be_drawn(prediction, size):
    picture = Image.new("RGB", size, (1, 2, 3))
    shaped = dataclasses.replace(
        prediction, size=size, thumbnail=None, box=(0.0, 0.0, float(size[0]), float(size[1]))
    )
    assert shaped.plot(image=picture).size[0] > 1000
    assert shaped.plot().size[0] > 1000
    assert "data:image/jpeg;base64," in shaped.to_html(picture)


@pytest.mark.parametrize(
    "caption", ["", "x" * 4000, "word " * 800, "\u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f600", "\n\n\t"]
)
def test_any_caption_can_be_drawn(prediction, caption):
    shaped = dataclasses.replace(prediction, caption=caption, words=())
    assert shaped.plot().height < 1200
    assert shaped.to_html()


def test_an_unreadable_picture_is_an_input_error(prediction):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        prediction.plot(image="nowhere.png")


def test_html_is_self_contained_and_escaped(prediction):
    fragment = prediction.to_html()
    page = Page()
    page.feed(fragment)
    page.close()
    assert page.open == []
    assert "script" not in page.tags
    assert [link[:23] for link in page.links] == ["data:image/jpeg;base64,"]
    assert page.marks == ["The", "Obama's", "end"]
    text = "".join(page.text)
    assert '<script>alert("x")</script> of Obama\'s\n& co. \ufffd\ufffdend' in text
    assert "text_truncated: <kept> 50 of 73 words" in text
    assert "Manipulated" in text


def test_html_without_the_picture(prediction):
    bare = dataclasses.replace(prediction, thumbnail=None, heatmap=None, manipulated=False)
    assert "Not manipulated" in bare.to_html()
