from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from engine.result import Result, Word
from export.evaluation.agreement import Case
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.evaluation.gate import check_gate
from export.evaluation.report import write_page, write_table

HOSTILE = "<script>alert('1')</script> & \"two\" <img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks the nesting."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def data(annotated):
    record = {"id": HOSTILE, "image": 'DGM4/origin/a"><b>.png', "text": HOSTILE, "fake_cls": "face_swap"}
    data = annotated(4, records=[{**record, "fake_image_box": [4, 5, 30, 28], "fake_text_pos": []}])
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data / "origin" / 'a"><b>.png')
    return data


@pytest.fixture(scope="module")
def found(bundle, data):
    return evaluate(bundle("asap", "int8").path, data, EvaluateOptions(repeats=20, threads=1))


@pytest.fixture
def case(found):
    """A pair whose answers are known: three words, one true, one of the bundle, one of float32."""

    def answer(*fake):
        words = [("One", 0, 3), ("<two>", 5, 10), ("three", 11, 16)]
        return Result(
            manipulated=True,
            score=0.75,
            types={"face_swap": 0.5},
            detected=("face_swap",),
            box=(5.0, 5.0, 20.0, 20.0),
            words=tuple(Word(*word, 0.9 if i in fake else 0.1, i in fake) for i, word in enumerate(words)),
            size=(60, 40),
        )

    sample = next(case.sample for case in found.comparison.worst if case.sample.id == HOSTILE)
    parts = dict.fromkeys(("score", "types", "words", "box"), 0.5)
    caption = "One, <two> three!"
    return Case(sample, 0.5, parts, (60, 40), caption, (True, False, False), answer(1), answer(2))


def with_cases(found, *cases):
    return replace(found, comparison=replace(found.comparison, worst=cases))


def test_the_page_is_self_contained_and_escaped(found):
    page = write_page(found, [])
    parsed = Page(page)
    assert not {"script", "b", "link", "iframe", "a"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "href"]
    assert all(
        value.startswith("data:image/jpeg;base64,") for name, value in parsed.attributes if name == "src"
    )
    assert "http" not in page and "url(" not in page
    assert HOSTILE in parsed.text


def test_the_page_shows_what_the_table_shows(found):
    failures = check_gate("int8", found.scores.metrics, found.comparison.scores.metrics)
    text = Page(write_page(found, failures)).text
    for line in write_table(found, failures).splitlines():
        for cell in re.split(r"\s{2,}", line.strip()):
            if re.fullmatch(r"[\d.+-]+( to [\d.+-]+)?", cell):
                assert cell in text


def test_the_caption_is_kept_whole_and_its_words_marked(found, case):
    parsed = Page(write_page(with_cases(found, case), None))
    assert case.caption in parsed.text
    styles = [
        dict(s.split(":", 1) for s in v.split(";"))
        for n, v in parsed.attributes
        if n == "style" and "border-top:" in v and "background" in v
    ]
    true, ours, theirs = styles[-3:]
    drawn = lambda style, name: "transparent" not in style[name]  # noqa: E731
    for style, expected in ((true, (1, 0, 0)), (ours, (0, 1, 0)), (theirs, (0, 0, 1))):
        assert tuple(drawn(style, n) for n in ("border-bottom", "background", "border-top")) == expected


def picture_of(page):
    (encoded,) = re.findall(r"base64,([^\"]+)", page)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)


def test_the_picture_is_shown_as_stored(found, case, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees; annotations do not
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    sample = replace(case.sample, picture=tmp_path / "turned.jpg")
    assert picture_of(write_page(with_cases(found, replace(case, sample=sample)), None)).shape == (
        347,
        520,
        3,
    )


def test_the_picture_carries_all_three_boxes(found, case):
    theirs = replace(case.theirs, box=(30.0, 10.0, 50.0, 30.0))
    sample = replace(case.sample, box=(2, 2, 12, 36))
    drawn = picture_of(write_page(with_cases(found, replace(case, sample=sample, theirs=theirs)), None))
    assert drawn.shape == (347, 520, 3)
    # Colours are those of JPEG, in the middle of each box's left edge.
    for x, y, color in ((2, 18, (64, 200, 80)), (5, 12, (0, 229, 255)), (30, 20, (255, 160, 0))):
        column, row = round(x * 520 / 60) + 1, round(y * 347 / 40)
        assert np.abs(drawn[row, column] - color).max() < 40


def test_a_picture_that_has_gone_leaves_a_line(found, case, tmp_path):
    sample = replace(case.sample, picture=tmp_path / "gone<b>.png")
    parsed = Page(write_page(with_cases(found, replace(case, sample=sample)), None))
    assert "no such file" in parsed.text and "img" not in parsed.tags and "b" not in parsed.tags


def test_without_a_reference(found):
    alone = replace(found, comparison=None, note="no reference was asked for")
    page, table = write_page(alone, None), write_table(alone, None)
    Page(page)
    for text in (page, table):
        assert "no reference was asked for" in text
        assert "change" not in text and "gate" not in text


def test_equal_answers_are_said_to_be(found):
    assert "all predictions are the same" in Page(write_page(with_cases(found), [])).text


def test_what_is_undefined_is_a_dash(found):
    nan = float("nan")
    metrics = {**found.scores.metrics, "AUC": nan}
    intervals = {**found.scores.intervals, "AUC": (nan, nan)}
    alone = replace(
        found, comparison=None, scores=replace(found.scores, metrics=metrics, intervals=intervals)
    )
    (line,) = [line for line in write_table(alone, None).splitlines() if line.startswith("AUC")]
    assert line.split() == ["AUC", "-", "-"]
    assert "nan" not in write_page(alone, None).lower().replace("nance", "")


def test_a_hostile_name_stays_on_its_line(found, case):
    sample = replace(case.sample, id="a\x1b[31m\nb")
    table = write_table(with_cases(found, replace(case, sample=sample)), None)
    assert "\x1b" not in table
    assert "a\ufffd[31m\ufffdb" in table


def test_the_gate_is_told(found):
    failures = check_gate(
        "int8", dict.fromkeys(found.scores.metrics, 0.0), dict.fromkeys(found.scores.metrics, 0.5)
    )
    for text in (write_table(found, failures), Page(write_page(found, failures)).text):
        assert "gate of int8: failed" in text
        assert "AUC: expected within 1 % points of 50.00, got 0.00" in text
    assert "gate of int8: passed" in write_table(found, [])


def test_the_record_keeps_hostile_text_as_it_is(found):
    record = json.loads(json.dumps(found.to_dict()))
    assert HOSTILE in [case["id"] for case in record["reference"]["worst"]]
