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

from dgm4.data.annotations import read_split
from engine.manifest import Weights
from engine.result import Result, Word
from export.evaluation.agreement import Case
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.evaluation.gate import check_gate
from export.evaluation.page import write_page
from export.evaluation.report import MORE_TERMS, TERMS, write_table

HOSTILE = "<script>alert('1')</script> & \"two\" <img src=x onerror=alert(1)>"
MARKS = ("none", "true", "bundle", "float32")
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
def case(data):
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

    sample = next(sample for sample in read_split(data, "test").samples if sample.id == HOSTILE)
    parts = dict.fromkeys(("score", "types", "words", "box"), 0.5)
    caption = "One, <two> three!"
    return Case(
        sample, ("2 words",), 0.5, parts, (60, 40), caption, (True, False, False), answer(1), answer(2)
    )


def with_cases(found, *cases):
    return replace(found, comparison=replace(found.comparison, worst=cases))


def test_the_page_is_self_contained_and_escaped(found, case):
    page = write_page(with_cases(found, case), [])
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
    marks = [value for name, value in parsed.attributes if name == "class" and value in MARKS]
    assert marks[-3:] == ["true", "bundle", "float32"]


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


def drawn_boxes(page):
    """The boxes over the images, (x, y, width, height) by whose they are."""
    found = re.findall(r'<rect class="box (\w+)" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>', page)
    return {name: tuple(map(float, box)) for name, *box in found}


def test_the_picture_carries_all_three_boxes(found, case):
    theirs = replace(case.theirs, box=(30.0, 10.0, 50.0, 30.0))
    sample = replace(case.sample, box=(2, 2, 12, 36))
    page = write_page(with_cases(found, replace(case, sample=sample, theirs=theirs)), None)
    assert 'viewBox="0 0 60 40"' in page
    assert drawn_boxes(page) == {
        "true": (2, 2, 10, 34),
        "bundle": (5, 5, 15, 15),
        "float32": (30, 10, 20, 20),
    }


@pytest.mark.parametrize("hidden", [{"manipulated": False}, {"detected": ("text_swap",)}, {"box": None}])
def test_a_box_that_no_reader_is_shown_is_not_drawn(found, case, hidden):
    sample = replace(case.sample, box=None)
    page = write_page(
        with_cases(found, replace(case, sample=sample, ours=replace(case.ours, **hidden))), None
    )
    assert drawn_boxes(page).keys() == {"float32"}


def test_a_picture_that_has_gone_leaves_a_line(found, case, tmp_path):
    sample = replace(case.sample, picture=tmp_path / "gone<b>.png")
    parsed = Page(write_page(with_cases(found, replace(case, sample=sample)), None))
    assert "no such file" in parsed.text and "img" not in parsed.tags and "b" not in parsed.tags


def test_without_a_reference(found):
    alone = replace(found, comparison=None, notes=("no reference was asked for",))
    page, table = write_page(alone, None), write_table(alone, None)
    Page(page)
    for text in (page, table):
        assert "no reference was asked for" in text
        assert "change" not in text and "gate of" not in text


def test_equal_answers_are_said_to_be(found):
    assert "None: a reader sees no prediction differ." in Page(write_page(with_cases(found), [])).text
    assert "largest disagreements, bundle / float32: none" in write_table(with_cases(found), [])


def test_what_is_undefined_is_a_dash(found):
    nan = float("nan")
    metrics = {**found.scores.metrics, "AUC": nan}
    intervals = {**found.scores.intervals, "AUC": (nan, nan)}
    alone = replace(
        found, comparison=None, scores=replace(found.scores, metrics=metrics, intervals=intervals)
    )
    line = next(line for line in write_table(alone, None).splitlines() if line.startswith("AUC"))
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


def test_the_record_keeps_hostile_text_as_it_is(found, case):
    record = json.loads(json.dumps(with_cases(found, case).to_dict()))
    assert HOSTILE in [case["id"] for case in record["reference"]["worst"]]


def test_every_term_is_explained(found):
    assert found.scores.metrics.keys() == TERMS.keys()
    table, page = write_table(found, []), Page(write_page(found, [])).text
    for term, meaning in {**TERMS, **MORE_TERMS}.items():
        assert re.search(rf"^{term} +{re.escape(meaning)}$", table, re.MULTILINE)
        assert meaning in page


def test_curves_are_drawn_of_every_decision(found):
    page = write_page(found, [])
    parsed = Page(page)
    assert parsed.tags.count("svg") == 3 * 6 + parsed.tags.count("img")
    labels = [value for name, value in parsed.attributes if name == "aria-label"]
    assert "ROC of manipulated: found by false alarms" in labels
    points = found.decisions["manipulated"].roc
    first = " ".join(f"{38 + 200 * x:.1f},{226 - 200 * y:.1f}" for x, y in points)
    assert f'<polyline class="curve" points="{first} "/>' in page
    used = found.decisions["manipulated"].in_use
    assert f'cx="{38 + 200 * used.false_alarm_rate.value:.1f}"' in page


def test_a_curve_that_is_not_defined_says_so(found):
    verdict = replace(found.decisions["manipulated"], roc=(), precision_recall=())
    page = write_page(replace(found, decisions={"manipulated": verdict}), [])
    assert Page(page).text.count("not defined on these pairs") == 2


def test_thresholds_in_use_are_in_the_table(found):
    row = next(line for line in write_table(found, []).splitlines() if line.startswith("manipulated "))
    used = found.decisions["manipulated"].in_use
    counts = used.found, used.missed, used.false_alarms, used.passed
    assert row.split()[:6] == ["manipulated", "0.5", *map(str, counts)]
    assert sum(counts) == found.pairs


@pytest.mark.parametrize("kind", ["demo", "drawn", "trained"])
def test_weights_that_mean_nothing_are_told_first(kind, found):
    warning = Weights(kind, "a source", None).warning
    told = replace(found, weights_warning=warning)
    assert ('class="ribbon">warning: ' in write_page(told, None)) == (kind != "trained")
    assert write_table(told, None).startswith("warning: ") == (kind != "trained")
    assert told.to_dict()["weights_warning"] == warning
