"""Reading annotations: the published layout, every way a record can be bad, and speed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dgm4.data.annotations import clip_box, read_annotations, read_split
from engine.errors import InputError

QUIET = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PARTS = list("aB7_é'İß-/,.!\"# \t\n\r\x1c\xa0<>") + ["<person>", "word ", "\ud800"]
TRICKY = st.lists(st.sampled_from(PARTS), max_size=150).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WIDTH, HEIGHT = 80, 60


def published_words(caption):
    """The words of the data set's cleaning without its limit, written plainly."""
    caption = caption.lower()
    for mark in ",.'!?\"()*#:;~":
        caption = caption.replace(mark, "")
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return caption.split(" ") if caption else []


def record(**changes):
    return {
        "id": 4711,
        "image": "DGM4/manipulation/simswap/1.jpg",
        "text": "A minister, well-known, smiles",
        "fake_cls": "face_swap&text_attribute",
        "fake_image_box": [10, 5, 40, 45],
        "fake_text_pos": [4],
        "mtcnn_boxes": [[10, 5, 40, 45]],
        **changes,
    }


PRISTINE = {"fake_cls": "orig", "fake_image_box": [], "fake_text_pos": []}
FACE = {"fake_cls": "face_swap", "fake_text_pos": []}
TEXT = {"fake_cls": "text_swap", "fake_image_box": []}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "DGM4"
    for name in ("manipulation/simswap", "origin/bbc/0001", "metadata"):
        (folder / name).mkdir(parents=True)
    picture = Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 30))
    picture.save(folder / "manipulation/simswap/1.jpg")
    picture.save(folder / "origin/bbc/0001/2.jpg")
    Image.effect_noise((64, 64), 80).convert("RGB").save(folder / "origin/cut.jpg")
    whole = (folder / "origin/cut.jpg").read_bytes()
    (folder / "origin/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "origin/text.jpg").write_bytes(b"no picture")
    (folder / "origin/empty.jpg").write_bytes(b"")
    return folder


@pytest.fixture
def read(data, tmp_path):
    """Write records to a file and read them."""

    def write_and_read(*records, **options):
        file = tmp_path / "list.json"
        file.write_text(json.dumps(records), encoding="utf-8")
        return read_annotations([file], data, **options)

    return write_and_read


def test_a_published_record_is_read(read, data):
    answer = read(record())
    assert answer.problems == ()
    (sample,) = answer.usable("list")
    assert sample.id == "4711"
    assert sample.picture == (data / "manipulation/simswap/1.jpg").resolve()
    assert sample.image == "DGM4/manipulation/simswap/1.jpg"
    assert sample.text == "A minister, well-known, smiles"
    assert sample.types == ("face_swap", "text_attribute")
    assert sample.fake_cls == "face_swap&text_attribute"
    assert sample.manipulated
    assert sample.box == (10, 5, 40, 45)
    assert sample.fake_words == (4,)  # a minister well known smiles


def test_a_pristine_record_has_no_types(read):
    (sample,) = read(record(image="origin/bbc/0001/2.jpg", id="x", **PRISTINE)).samples
    assert (sample.types, sample.box, sample.fake_words) == ((), None, ())
    assert (sample.id, sample.fake_cls, sample.manipulated) == ("x", "orig", False)


@pytest.mark.parametrize("image", [r"DGM4\manipulation\simswap\1.jpg", r"manipulation\simswap/1.jpg"])
def test_a_path_written_on_windows_is_read(image, read, data):
    (sample,) = read(record(image=image)).samples
    assert (sample.picture, sample.image) == ((data / "manipulation/simswap/1.jpg").resolve(), image)


def test_a_file_with_a_backslash_in_its_name_is_read(read, data):
    file = data / r"origin/a\b.jpg"
    file.write_bytes((data / "origin/bbc/0001/2.jpg").read_bytes())
    (sample,) = read(record(image=r"origin/a\b.jpg", **PRISTINE)).samples
    assert sample.picture == file
    file.unlink()


def test_none_usable_says_of_how_many_and_why(read):
    annotations = read(*[record(id=i, image=f"origin/absent{i}.jpg") for i in range(7)], [])
    with pytest.raises(InputError) as caught:
        annotations.usable("DGM4, split test")
    start = "DGM4, split test: expected annotated pairs, got none of 8 usable, most often picture_missing: "
    assert str(caught.value).startswith(f"{start}record 0: expected the picture")


def test_types_come_in_one_order(read):
    (sample,) = read(record(fake_cls="text_attribute&face_swap")).samples
    assert sample.fake_cls == "face_swap&text_attribute"


BAD = {
    "not_an_object": [[], "text", None, 3],
    "field_missing": [{k: v for k, v in record().items() if k != name} for name in list(record())[:6]],
    "field_type": [
        record(id=None),
        record(id=True),
        record(id=1.5),
        record(image=3),
        record(text=None),
        record(fake_cls=["orig"]),
        record(fake_image_box=None),
        record(fake_image_box={"x": 1}),
        record(fake_text_pos="4"),
    ],
    "class_unknown": [record(fake_cls=c) for c in ("", "fake", "Face_swap", "orig&face_swap", "face_swap&")],
    "class_forbidden": [
        record(fake_cls="face_swap&face_attribute"),
        record(fake_cls="text_swap&text_attribute"),
        record(fake_cls="face_swap&face_swap"),
        record(fake_cls="face_swap&text_swap&text_attribute"),
    ],
    "box_missing": [record(fake_image_box=[])],
    "box_unclaimed": [record(**{**PRISTINE, "fake_image_box": [1, 2, 3, 4]})],
    "box_malformed": [
        record(fake_image_box=box)
        for box in (
            [1, 2, 3],
            [1, 2, 3, 4, 5],
            [1, 2, 3, "4"],
            [1, 2, 3, None],
            [False, 2, 3, True],
            [1, 2, 3, float("nan")],
            [1, 2, float("inf"), 4],
            [float("-inf"), 2, 3, 4],
            [1, 2, 3, 10**400],
            [[1, 2, 3, 4]],
        )
    ],
    "box_degenerate": [record(fake_image_box=box) for box in ([9, 5, 9, 45], [9, 5, 40, 5], [40, 5, 9, 45])],
    "box_outside": [
        record(fake_image_box=box)
        for box in (
            [-1.5, 5, 40, 45],
            [10, -2, 40, 45],
            [10, 5, WIDTH + 1.01, 45],
            [10, 5, 40, HEIGHT + 2],
            [WIDTH, 5, WIDTH + 1, 45],
            [-1, 5, 0, 45],
            [10, HEIGHT, 40, HEIGHT + 1],
        )
    ],
    "words_missing": [record(fake_text_pos=[])],
    "words_unclaimed": [record(**{**FACE, "fake_text_pos": [1]})],
    "word_index": [record(fake_text_pos=p) for p in ([5], [0, 99], [-1], [1.0], [True], ["1"], [None], [[1]])]
    + [record(fake_text_pos=[0], text=" .- ")],
    "path_outside": [
        record(image=path)
        for path in (
            "",
            "../1.jpg",
            "DGM4/../../1.jpg",
            "origin/../../1.jpg",
            "/etc/hosts",
            "a\0b",
            "DGM4/",
            "..",
            r"..\..\etc\passwd",
            r"origin\..\..\x.jpg",
        )
    ],
    "picture_missing": [
        record(image=path) for path in ("DGM4/origin/none.jpg", "origin/" + "x" * 5000, "origin/\ud800.jpg")
    ],
    "picture_unreadable": [record(image=f"origin/{n}") for n in ("text.jpg", "empty.jpg", "bbc")],
}


@pytest.mark.parametrize(("kind", "bad"), [(kind, bad) for kind, rows in BAD.items() for bad in rows])
def test_a_bad_record_is_reported_and_left_out(read, tmp_path, kind, bad):
    good = [record(text="one two three four five"), record(text="six seven eight nine ten")]
    answer = read(good[0], bad, good[1])
    assert [sample.text for sample in answer.samples] == [good[0]["text"], good[1]["text"]]
    (problem,) = answer.problems
    assert problem.kind == kind
    assert problem.file == tmp_path / "list.json"
    assert problem.id == ("4711" if isinstance(bad, dict) and type(bad.get("id")) is int else "")
    assert problem.message.startswith("record 1: ")
    assert answer.counts() == {kind: 1}
    with pytest.raises(InputError, match=r"list\.json.*record 1: "):
        read(good[0], bad, good[1], on_error="raise")


def test_the_error_names_file_id_and_record(read, tmp_path):
    with pytest.raises(InputError) as caught:
        read(record(fake_cls="fake"), on_error="raise")
    assert str(caught.value).startswith(f"{tmp_path / 'list.json'} (id 4711): record 0: expected fake_cls of")


def test_the_problems_are_named_and_counted_in_the_log(read, caplog):
    with caplog.at_level(logging.WARNING):
        answer = read(record(), record(fake_cls="a"), [], record(fake_cls="b"))
    assert answer.counts() == {"class_unknown": 2, "not_an_object": 1}
    *named, line = caplog.messages
    assert line == "left out 3 bad records or files, kept 1 records (class_unknown 2, not_an_object 1)"
    assert "(id 4711): record 1: expected fake_cls" in named[0]
    assert ": record 2: expected an object" in named[1]
    assert "(id 4711): record 3: expected fake_cls" in named[2]
    caplog.clear()
    read(record())
    assert caplog.messages == []


def test_the_log_names_twenty_and_all_on_request(read, caplog):
    with caplog.at_level(logging.DEBUG):
        read(*[record(fake_cls="a")] * 22)
    assert len(caplog.messages) == 23
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 20 + ["DEBUG"] * 2 + ["WARNING"]


def test_a_pair_may_come_once(read, data, tmp_path):
    other = record(image="DGM4/origin/bbc/0001/2.jpg")
    again = record(image="DGM4/manipulation/../manipulation/simswap/1.jpg", id=1)
    answer = read(record(), other, record(text="a b c d e f"), again)
    assert len(answer.samples) == 3  # the id is that of the news item; several pairs share it
    assert [(p.kind, p.id) for p in answer.problems] == [("duplicate", "1")]
    file = tmp_path / "list.json"
    assert read_annotations([file, str(file)], data).counts() == {"duplicate": 1 + 4}


def test_a_bad_record_does_not_make_the_next_one_a_duplicate(read):
    answer = read(record(fake_image_box=[10, 5, 400, 45]), record())
    assert answer.counts() == {"box_outside": 1}
    assert len(answer.samples) == 1


# Boxes


def test_a_pixel_of_overhang_is_clipped(read):
    (sample,) = read(record(fake_image_box=[-1, -0.5, WIDTH + 1, HEIGHT + 0.25])).samples
    assert sample.box == (0, 0, WIDTH, HEIGHT)
    (sample,) = read(record(fake_image_box=[-1, 0.5, 40, 45]), check_pictures=False).samples
    assert sample.box == (0, 0.5, 40, 45)


def test_a_box_is_clipped_to_its_picture():
    assert clip_box((3, 4, 20, 30), 20, 30) == (3, 4, 20, 30)
    assert clip_box((3, 4, 21, 31), 20, 30) == (3, 4, 20, 30)
    assert clip_box((3, 4, 21.5, 30), 20, 30) is None
    assert clip_box((20, 4, 21, 30), 20, 30) is None


# Words


def test_words_behind_the_limit_are_dropped(read):
    text = " ".join(f"w{i}" for i in range(60))
    (sample,) = read(record(text=text, fake_text_pos=[59, 3, 49, 50, 3])).samples
    assert sample.fake_words == (3, 49)
    (sample,) = read(record(text=text, **{**TEXT, "fake_text_pos": [55]})).samples
    assert (sample.fake_words, sample.types) == ((), ("text_swap",))
    assert read(record(text=text, fake_text_pos=[60])).counts() == {"word_index": 1}


def test_words_behind_the_longest_caption_are_dropped(read):
    text = "x" * 4095 + " y z"
    (sample,) = read(record(text=text, fake_text_pos=[0, 1, 2])).samples
    assert sample.fake_words == (0,)
    assert read(record(text=text, fake_text_pos=[3])).counts() == {"word_index": 1}


@QUIET
@given(TRICKY, st.integers(0, 70))
@example("a\tb c", 1)
@example("a\tb c", 2)
@example("- -", 0)
@example("\n \n", 0)
@example(". . " * 30 + "a", 1)
def test_an_index_counts_the_published_words(read, text, index):
    answer = read(record(text=text, fake_text_pos=[index]), check_pictures=False)
    count = len(published_words(text))
    assert [p.kind for p in answer.problems] == (["word_index"] if index >= count else [])
    if index < count:
        assert answer.samples[0].fake_words == ((index,) if index < 50 else ())


# Files and folders


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "file_not_json"),
        (b"[{]", "file_not_json"),
        (b'["\xff"]', "file_not_json"),
        (b"[" * 100_000, "file_not_json"),
        (b"[" + b"9" * 5000 + b"]", "file_not_json"),
        (b'{"id": 1}', "file_not_a_list"),
        (b'"text"', "file_not_a_list"),
    ],
    ids=range(7),
)
def test_a_bad_file_is_reported(data, tmp_path, content, kind):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_bytes(content)
    good.write_bytes(b"\xef\xbb\xbf" + json.dumps([record()]).encode())
    answer = read_annotations([bad, good], data)
    assert [(p.file, p.id, p.kind) for p in answer.problems] == [(bad, "", kind)]
    assert len(answer.samples) == 1
    with pytest.raises(InputError, match=r"bad\.json: expected "):
        read_annotations(bad, data, on_error="raise")


def test_a_split_is_a_file_of_the_folder(data):
    file = data / "metadata/val.json"
    file.write_text(json.dumps([record()]), encoding="utf-8")
    assert len(read_split(data, "val").samples) == 1
    assert len(read_split(str(data), "val").samples) == 1
    with pytest.raises(InputError, match="unknown split 'dev': expected one of train, val, test"):
        read_split(data, "dev")
    with pytest.raises(InputError, match=r"test\.json: cannot read the annotations: No such file"):
        read_split(data, "test")
    with pytest.raises(InputError, match="expected the data folder"):
        read_split(data / "none", "test")
    with pytest.raises(InputError, match="on_error: expected one of skip, raise"):
        read_split(data, "val", on_error="ignore")


def test_only_the_header_of_a_picture_is_read(read, monkeypatch):
    def fail(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    (sample,) = read(record(image="origin/cut.jpg")).samples
    assert sample.box == (10, 5, 40, 45)


def test_pictures_need_not_be_there(read):
    (sample,) = read(record(image="origin/none.jpg"), check_pictures=False).samples
    assert sample.picture.name == "none.jpg"


def test_a_link_is_no_reason_to_refuse(read, data, tmp_path):
    (data / "linked").symlink_to(data / "origin", target_is_directory=True)
    assert len(read(record(image="DGM4/linked/bbc/0001/2.jpg")).samples) == 1
    (data / "linked").unlink()


@QUIET
@given(JSON | st.fixed_dictionaries({name: JSON | st.just(value) for name, value in record().items()}))
def test_any_record_is_read_or_reported(read, value):
    answer = read(value)
    assert len(answer.samples) + len(answer.problems) == 1
    if answer.problems and isinstance(value, dict):
        assert answer.problems[0].kind in BAD


def test_the_work_grows_with_the_records_and_no_faster(data, tmp_path, count_calls):
    calls = []
    for count in (500, 1000):
        file = tmp_path / f"{count}.json"
        file.write_text(json.dumps([record(id=i, text=f"a b c d e {i}") for i in range(count)]))
        answer, work = count_calls(lambda file=file: read_annotations(file, data))
        assert len(answer.samples) == count
        calls.append(work)
    assert calls[1] < 2.1 * calls[0]
    assert calls[1] < 1000 * 500  # 382 a record
    assert isinstance(answer.samples[0].picture, Path)
