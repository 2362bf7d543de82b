"""The HTML of a prediction and of a list, as a parser reads it; test_page.py looks at it in a browser."""

from __future__ import annotations

import dataclasses
import gc
import html.parser
import weakref

import numpy as np
import pytest
from PIL import Image
from predictions import TYPES, make_prediction

from engine.cards.markup import write_page
from engine.errors import InputError

HOSTILE = 'The <script>alert("x")</script> of \'"></style><img src=x onerror=alert(1)>\n& co. \x00\x07end'
VOID = ("img", "meta", "input")


class Document(html.parser.HTMLParser):
    """Collects tags, addresses, attributes and text, and checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.marks, self.open, self.attributes = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "mark":
            self.marks.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)
        if "mark" in self.open:
            self.marks[-1] += data

    def articles(self):
        pairs = zip(self.tags, self.attributes, strict=True)
        return [attributes for tag, attributes in pairs if tag == "article"]


def page_of(*results):
    return "".join(write_page((f"{i}.jpg", result) for i, result in enumerate(results)))


def test_the_fragment_is_self_contained_and_escaped():
    document = Document(make_prediction(HOSTILE, warnings=("odd: <b>",)).to_html())
    assert "script" not in document.tags
    assert {link[:11] for link in document.links} == {"data:image/"}
    assert not any(name.startswith("on") for attributes in document.attributes for name in attributes)
    text = "".join(document.text)
    assert HOSTILE.replace("\x00\x07", "\ufffd\ufffd") in text
    assert "odd: <b>" in text


def test_the_fragment_says_what_the_card_says():
    shown = make_prediction(marked=(1, 2), box=None, thresholds={"manipulated": 0.25})
    document = Document(shown.to_html())
    text = " ".join("".join(document.text).split())
    assert "Manipulated Manipulation score93.0 % threshold 25 %" in text
    assert "face swap weak90.0 %" in text and "Weak evidence: no face box." in text
    assert document.marks == ["mayor opens"]
    ticks = [
        attributes["style"]
        for attributes in document.attributes
        if attributes.get("title") == "threshold 25 %"
    ]
    assert ticks == ["left:25.00%"]


def test_the_box_that_was_given_stands_beside_the_networks_in_legend_and_words():
    document = Document(make_prediction(box_given=(10.0, 8.0, 60.0, 40.0)).to_html())
    classes = [attributes.get("class") for attributes in document.attributes]
    assert classes.count("layer given") == classes.count("layer box") == 1
    assert classes.count("given") == classes.count("box") == 1
    text = " ".join("".join(document.text).split())
    assert "box given 10, 8, 60, 40 network's box 25, 20, 75, 60" in text
    (alternative,) = (x["alt"] for x in document.attributes if "evidence" in x.get("alt", ""))
    assert "box given 10, 8, 60, 40; network's box 25, 20, 75, 60" in alternative
    alone = Document(make_prediction().to_html())
    assert "network's box" not in "".join(alone.text)


def test_the_scale_says_what_the_map_is_of_and_its_ends():
    heatmap = np.linspace(0.2, 0.4, 256, dtype=np.float32).reshape(16, 16)
    shown = Document(make_prediction(model={"name": "cscl"}, heatmap=heatmap).to_html())
    assert "disagreement with the caption 0.20  0.40" in "".join(shown.text)


def test_the_clean_image_stands_beside_the_one_with_evidence():
    images = lambda prediction: Document(prediction.to_html()).tags.count("img")  # noqa: E731
    assert images(make_prediction()) == 3  # the heat map is a layer
    assert images(make_prediction(heatmap=None)) == 2
    assert images(make_prediction(manipulated=False)) == 1


def test_a_fragment_without_an_image_or_a_verdict():
    bare = make_prediction(thumbnail=None, heatmap=None, manipulated=False).to_html()
    assert "Not manipulated" in bare and "not stored" in bare
    blank = make_prediction(
        manipulated=None,
        score=None,
        types=dict.fromkeys(TYPES),
        detected=(),
        box=None,
        heatmap=None,
        thumbnail=None,
    )
    text = dataclasses.replace(blank, size=None).to_html()
    assert text.count("not answered") == 5 and "<img" not in text


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (5000, 3000)])
def test_any_image_can_be_shown(size):
    assert "data:image/jpeg;base64," in make_prediction(size=size).to_html(Image.new("RGB", size))


def test_the_page_counts_and_labels_its_pairs():
    innocent = make_prediction(manipulated=False, score=0.02)
    document = Document(page_of(make_prediction(), innocent, InputError("item 2: broken"), make_prediction()))
    text = " ".join("".join(document.text).split())
    assert "4 pairs 2 manipulated 1 not manipulated 1 error " in text
    articles = document.articles()
    assert [each["data-verdict"] for each in articles] == [
        "manipulated",
        "not-manipulated",
        "error",
        "manipulated",
    ]
    assert [each["id"] for each in articles] == ["pair-1", "pair-2", "pair-3", "pair-4"]
    assert [each["data-types"] for each in articles] == [
        "face_swap text_attribute",
        "",
        "",
        "face_swap text_attribute",
    ]
    assert [each["data-score"] for each in articles] == ["0.93", "0.02", "", "0.93"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in document.attributes
    assert "Predictions" in document.text
    photos = [each for each in document.attributes if "loading" in each]
    assert len(photos) == 3 and all(each["loading"] == "lazy" for each in photos)


def test_the_page_tells_once_that_the_weights_say_nothing():
    text = page_of(*[make_prediction(model={"weights": "demo"})] * 3)
    assert text.count('<div class="banner">Demo weights') == 1
    assert text.count('<div class="ribbon">Demo weights') == 3


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("item 7 ('/data/a: b.png'): no such file; expected an image", "no such file; expected an image"),
        ("item 7: expected a pair, got None", "expected a pair, got None"),
        ("line 8: expected JSON", "expected JSON"),
        ("x" * 1000, "x" * 237 + "..."),
    ],
)
def test_an_error_is_short_and_does_not_repeat_its_heading(message, reason):
    assert f'<p class="reason">{reason}</p>' in page_of(InputError(message))


def test_a_hostile_caption_or_name_cannot_break_out_of_the_page():
    results = [(HOSTILE, make_prediction(HOSTILE)), (HOSTILE, InputError(HOSTILE))]
    document = Document("".join(write_page(results)))
    assert document.tags.count("script") == 1 and document.tags.count("style") == 1
    assert not any(name.startswith("on") for attributes in document.attributes for name in attributes)
    assert [each["data-name"] for each in document.articles()] == [
        HOSTILE.replace("\x00\x07", "\ufffd\ufffd")
    ] * 2


def test_an_empty_list_is_a_page():
    assert "<b>0</b> pairs" in page_of()


def test_two_hundred_pairs_take_less_than_5_mb():
    """Of noise, which is as hard to encode as no photograph is."""
    random = np.random.default_rng(0)
    results = []
    for _ in range(4):
        noise = Image.fromarray(random.integers(0, 256, (400, 400, 3), dtype=np.uint8))
        results.append(make_prediction("word " * 40, range(40), size=noise.size, thumbnail=noise))
    per_pair = (len(page_of(*results)) - len(page_of())) / 4
    assert len(page_of()) + 200 * per_pair < 5e6


def test_the_page_is_written_as_the_results_come_and_holds_none_of_them():
    seen = []

    def results():
        for i in range(5):
            prediction = make_prediction()
            seen.append(weakref.ref(prediction))
            yield f"{i}.jpg", prediction
            del prediction

    written = ""
    for part in write_page(results()):
        written += part
        assert len(seen) <= written.count("<article") + 1
        if "</article>" in part:
            gc.collect()
            # The one in hand, and the one that a template has just let go of.
            assert sum(reference() is not None for reference in seen) <= 2
    assert len(seen) == 5
