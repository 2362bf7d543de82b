"""Lists of pairs in every form: the same pairs, with the error of a line in its place."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.scoring.pairs import STDIN, PairList

PAIRS = [("a.jpg", "A man, smiling"), ("b/é.png", 'He said "no"\nand left'), ("c.webp", "Zoë 你好")]


def found(path):
    return [(entry.image, entry.caption) for entry in PairList(path)]


def csv_of(delimiter, header, end="\n"):
    quoted = ('"' + caption.replace('"', '""') + '"' for _, caption in PAIRS)
    rows = [delimiter.join([image, caption]) for (image, _), caption in zip(PAIRS, quoted, strict=True)]
    return end.join([*([delimiter.join(header)] if header else []), *rows, ""]).encode()


FORMS = {
    "list.jsonl": "".join(json.dumps({"image": i, "text": c}) + "\r\n" for i, c in PAIRS).encode(),
    "list.json": json.dumps([{"image": i, "caption": c} for i, c in PAIRS], indent=1).encode(),
    "array": json.dumps([{"file_name": i, "caption": c} for i, c in PAIRS]).encode(),
    "lines": b"\n" + "".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in PAIRS).encode(),
    "list.csv": csv_of(",", ("image", "caption")),
    "bom.csv": b"\xef\xbb\xbf" + csv_of(",", ("Image", " Caption ")),
    "excel.csv": csv_of(";", ("file_name", "text"), "\r\n"),
    "no-header.csv": csv_of(",", None),
    "list.tsv": csv_of("\t", ("image", "caption")),
    "captions.txt": csv_of("\t", None),
    "flickr.txt": csv_of(",", ("image", "caption")),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_pairs(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    assert found(path) == PAIRS
    assert PairList(path).count(None) == 3
    assert PairList(path).base == tmp_path
    if "." not in name or name.startswith(("list", "bom", "excel")):  # stdin has no suffix to go by
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FORMS[name])))
        assert found(STDIN) == PAIRS
        assert PairList(STDIN).count(None) is None


def test_a_number_that_json_does_not_have_is_named(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "caption": "x", "score": NaN}\n')
    (entry,) = PairList(tmp_path / "list.jsonl")
    assert str(entry.error).endswith(": NaN is not a JSON number")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_lacks_is_named_in_an_array_too(tmp_path, number):
    (tmp_path / "list.json").write_text(f'[{{"image": "a.jpg", "caption": "x", "box": [1, 2, {number}, 4]}}]')
    with pytest.raises(InputError, match=f": {number} is not a JSON number"):
        list(PairList(tmp_path / "list.json"))


def test_every_form_holds_boxes(tmp_path):
    """Four numbers in JSON and Parquet, a cell of four numbers in a table; others are refused later."""
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "caption": "one", "box": [1, 2.5, 30, 40]}\n')
    (tmp_path / "list.csv").write_text('image,box,caption\na.jpg,"1, 2.5, 30, 40",one\n')
    (tmp_path / "list.tsv").write_text(
        "box\timage\tcaption\n1 2.5 30 40\ta.jpg\tone\n\tb.jpg\tx\nface\tc.jpg\tx\n"
    )
    assert [entry.box for entry in PairList(tmp_path / "list.tsv")] == [[1, 2.5, 30, 40], None, "face"]
    parquet = pytest.importorskip("pyarrow.parquet")
    pairs = [{"image": "a.jpg", "caption": "one", "box": [1.0, 2.5, 30.0, 40.0]}]
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(pairs), tmp_path / "list.parquet")
    for name in ("list.jsonl", "list.csv", "list.parquet"):
        assert [entry.box for entry in PairList(tmp_path / name)] == [[1, 2.5, 30, 40]], name


def test_columns_in_any_order_and_ids(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("id,source,caption,image\n7,x,one,a.jpg\n\n9,x,caf\xe9,b.jpg\n", "latin-1")
    first, latin = PairList(path)
    assert first.head() == {"line": 2, "image": "a.jpg", "id": "7"}
    assert str(latin.error) == "line 4 ('b.jpg'): expected UTF-8, got 'caf\\udce9'; save the list as UTF-8"
    assert latin.head() == {"line": 4, "image": "b.jpg", "id": "9"}


@pytest.mark.parametrize("header", ["image,caption\n", ""])
@pytest.mark.parametrize(("row", "fields"), [("b.jpg,A man, smiling, waves", 4), ("b.jpg", 1)])
def test_a_row_of_other_fields_fails(header, row, fields, tmp_path):
    """A comma that was not quoted would cut the caption in silence."""
    path = tmp_path / "list.csv"
    path.write_text(f'{header}a.jpg,one\n{row}\nc.jpg,"x, y"\n')
    first, wrong, last = PairList(path)
    assert (first.caption, last.caption) == ("one", "x, y")
    assert str(wrong.error) == (
        f"line {wrong.number} ('b.jpg'): expected 2 fields, got {fields}; "
        "quote a caption that holds the delimiter ','"
    )


@pytest.mark.parametrize(
    ("content", "known"),
    [
        ("id,image,caption\n7,b.jpg,A man, smiling\n", ("b.jpg", "7")),
        ("id,caption,image\n7,A man, smiling,b.jpg\n", ("b.jpg", "7")),
        ("caption,image,id\nA man, smiling,b.jpg,7\n", ("b.jpg", "7")),
        ("caption,image\nA man\n", (None, None)),
        ('image,caption,id\nb.jpg,"two\nc.jpg,three,8\n', ("b.jpg", None)),
        ('{"image": "b.jpg", "caption": 7, "id": "7"}\n', ("b.jpg", "7")),
        ('{"image": 3, "caption": "words", "id": "7"}\n', (None, "7")),
        ('[{"image": "b.jpg", "caption": {}, "id": 7}]', ("b.jpg", 7)),
    ],
)
def test_what_is_known_of_a_pair_that_fails_is_kept(content, known, tmp_path):
    path = tmp_path / ("list.csv" if content[0] not in "{[" else "list")
    path.write_text(content)
    (entry,) = PairList(path)
    assert entry.error is not None
    assert (entry.image, entry.id) == known
    assert entry.head()["image"] == known[0]
    assert (f"({known[0]!r})" in str(entry.error)) == (known[0] is not None)


def test_a_quote_that_is_never_closed_fails(tmp_path):
    """It would make one caption of the lines after it."""
    path = tmp_path / "list.csv"
    path.write_text('image,caption\na.jpg,one\nb.jpg,"two\nc.jpg,three\n')
    first, wrong = PairList(path)
    assert (first.caption, wrong.number) == ("one", 3)
    assert "close the quotes" in str(wrong.error)


def test_lines_of_a_quoted_caption_count(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('image,caption\na.jpg,"one\ntwo"\nb.jpg,three\n')
    assert [entry.number for entry in PairList(path)] == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "picture,words,more\n", "expected a header with the columns image and caption"),
        ("list.csv", "url,text\na.jpg,x\n", ".*got 'url,text'; add the column image, .*or give it this name"),
        (
            "list.csv",
            "image;title\n",
            ".*got 'image;title'; add the column caption, whose cells may be empty",
        ),
        ("list.csv", "image\na.jpg\n", ".*got 'image'; add the column caption, whose cells may be empty"),
        ("list.tsv", "Photo\tHead line\na.jpg\tx\n", ".*; give its columns these names, or put image,"),
        ("list.csv", "a.jpg,one, two\n", ".*; quote a caption that holds the delimiter"),
        ("list.json", '[{"image": "a"', "expected a JSON array of pairs in UTF-8"),
    ],
)
def test_a_list_that_is_none(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        list(PairList(tmp_path / name))


def test_items_of_an_array_that_are_no_pairs(tmp_path):
    (tmp_path / "list.json").write_text('[3, {"id": 1}, {"image": "a.jpg", "caption": "x"}]')
    number, neither, pair = PairList(tmp_path / "list.json")
    assert str(number.error).startswith("item 1: expected {") and str(number.error).endswith("got '3'")
    assert str(neither.error).startswith("item 2: expected {")
    assert pair.error is None


@pytest.mark.parametrize(
    ("name", "content", "pairs"),
    [
        ("list.jsonl", '{"image": "a.jpg"}\n{"image": null, "text": "x"}', [("a.jpg", None), (None, "x")]),
        ("list.json", '[{"file_name": "a.jpg", "caption": null}]', [("a.jpg", None)]),
        ("list.csv", "image,caption\na.jpg,\n,x\n", [("a.jpg", None), (None, "x")]),
        ("list.tsv", 'image\tcaption\na.jpg\t""\n""\tx\n', [("a.jpg", None), (None, "x")]),
        ("list.csv", 'a.jpg,"  "\n\n"",x\n', [("a.jpg", None), (None, "x")]),
        ("list.jsonl", '{"image": "a.jpg", "text": ""}', [("a.jpg", "")]),  # said to be empty
    ],
)
def test_half_a_pair_is_one(name, content, pairs, tmp_path):
    (tmp_path / name).write_text(content)
    assert [entry.error for entry in PairList(tmp_path / name)] == [None] * len(pairs)
    assert found(tmp_path / name) == pairs


def test_two_empty_cells_are_no_pair(tmp_path):
    (tmp_path / "list.csv").write_text("image,caption,id\na.jpg,x,1\n\n , ,2\n,,\n")
    pair, named, blank = PairList(tmp_path / "list.csv")
    assert pair.error is None
    assert str(named.error) == "line 4: expected an image or a caption, got two empty cells"
    assert (named.head(), blank.number) == ({"line": 4, "image": None, "id": "2"}, 5)


def test_an_empty_text_beside_an_image_is_no_caption(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"image")
    (tmp_path / "a.txt").write_text(" \n")
    assert found(tmp_path) == [("a.jpg", None)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("list.csv", "\n\n"), ("head.csv", "image,caption\n"), ("list.jsonl", ""), ("list.json", "[]")],
)
def test_an_empty_list_is_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: expected at least one pair, got an empty list"):
        list(PairList(tmp_path / name))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("image,caption\na.jpg,x\n".encode("utf-16"), "UTF-16"),
        ('{"image": "a.jpg", "caption": "x"}'.encode("utf-16-be"), "a binary file"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF,\0\n\n\xff", "a binary file"),
        (b"PK\x03\x04\x14\0,\n" * 100, "a binary file"),
    ],
)
def test_a_list_that_is_no_text_is_one_error(content, kind, suffix, tmp_path):
    path = tmp_path / f"list.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"expected a list as text in UTF-8, got {kind}"):
        list(PairList(path))


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\0", b"%PDF-1.4\n", b"photo.jpg\nother.jpg\n"])
def test_a_list_that_begins_like_none_is_one_error(content, tmp_path):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(InputError, match="list: expected JSON lines, a JSON array, or CSV"):
        list(PairList(tmp_path / "list"))


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "list")
    pairs = PairList(tmp_path / "list")
    assert (pairs.count(None), pairs.base) == (None, Path.cwd())


def test_a_folder_with_a_list_of_captions(tmp_path):
    (tmp_path / "captions.csv").write_bytes(FORMS["list.csv"])
    (tmp_path / "other.jpg").write_bytes(b"no one asks for it")
    assert found(tmp_path) == PAIRS
    assert PairList(tmp_path).base == tmp_path
    (tmp_path / "captions.jsonl").write_bytes(FORMS["list.jsonl"])
    with pytest.raises(
        InputError, match=r"expected one list of captions, got captions.csv and captions.jsonl"
    ):
        list(PairList(tmp_path))


def test_a_folder_with_a_text_beside_each_image(tmp_path):
    for name in ("b.JPG", "a.png", "c.webp", "notes.md", "a.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf a caption \n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    a, b, c = PairList(tmp_path)
    assert (a.image, a.caption) == ("a.png", "a caption")
    assert (b.image, b.caption) == ("b.JPG", "caf\ufffd")
    assert (c.image, str(c.error)) == (
        "c.webp",
        "item 3 ('c.webp'): no caption; expected it in c.txt beside the image",
    )


def test_texts_without_an_image_are_told_once(tmp_path, caplog):
    for name in ("a.jpg", "a.txt", "b.txt", "c.txt", "captions.md"):
        (tmp_path / name).write_bytes(b"x")
    for _ in range(2):
        assert [entry.image for entry in PairList(tmp_path)] == ["a.jpg"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: b.txt and 1 more left out: expected an image of the same name beside it"
    )


def test_a_field_that_is_given_twice_is_a_fault_of_its_line(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "image": "b.jpg"}\n{"caption": "a"}\n')
    first, second = PairList(tmp_path / "list.jsonl")
    assert "line 1: expected JSON" in str(first.error) and second.error is None
    (tmp_path / "list.json").write_text('[{"caption": "a", "caption": "b"}]')
    with pytest.raises(InputError, match="expected a JSON array of pairs in UTF-8: an object names a field"):
        list(PairList(tmp_path / "list.json"))


def test_a_folder_with_neither(tmp_path):
    with pytest.raises(InputError, match="expected captions.csv or another list of captions, or images"):
        list(PairList(tmp_path))


def test_an_image_of_the_list_is_not_overwritten(tmp_path):
    (tmp_path / "list.csv").write_text("image,caption\na.jpg,x\n")
    (tmp_path / "a.jpg").write_bytes(b"image")
    with pytest.raises(InputError, match="would overwrite an input, the image of line 2 of the list"):
        PairList(tmp_path / "list.csv").count(tmp_path / "a.jpg")
    assert PairList(tmp_path / "list.csv").count(tmp_path / "new.jsonl") == 1


def test_an_image_in_base64_is_not_repeated_whole(tmp_path):
    data = "data:image/png;base64," + "iVBORw0KGgo" * 2000
    (tmp_path / "list.json").write_text(json.dumps([{"image": data, "caption": "A man"}]))
    (entry,) = PairList(tmp_path / "list.json")
    assert entry.image == data
    assert len(entry.head()["image"]) <= 120
