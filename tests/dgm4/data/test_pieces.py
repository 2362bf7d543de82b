"""The small vocabulary: what is in it, in which order, and that it spells every word."""

from __future__ import annotations

import json
import random
import string

import pytest

from dgm4.data.pieces import SPECIAL, small_vocabulary
from dgm4.tokenizer import DEMO_VOCABULARY, build_tokenizer, find_vocabulary
from engine.errors import InputError
from export import cli

SPELLED = 5 + 2 * 36


@pytest.fixture(scope="module")
def large():
    return find_vocabulary().read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def split():
    tokenizer = build_tokenizer(find_vocabulary(), 30522)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).tokens


def tokenizer_of(pieces, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return build_tokenizer(path, len(pieces))


def assert_spells(tokenizer, count=300):
    draw = random.Random(1)
    words = [
        "".join(draw.choices(string.ascii_lowercase + string.digits, k=draw.randrange(1, 20)))
        for _ in range(count)
    ]
    for word in [*words, *string.ascii_lowercase, *string.digits]:
        tokens = tokenizer.encode(word, add_special_tokens=False).tokens
        assert "[UNK]" not in tokens
        assert "".join(token.removeprefix("##") for token in tokens) == word


@pytest.mark.parametrize("size", [SPELLED, 300, 2048])
def test_size_and_spelling(size, large, split, tmp_path):
    pieces = small_vocabulary(large, ["A minister's well-known dog!", "a dog"], split, size)
    assert len(pieces) == len(set(pieces)) == size
    assert tuple(pieces[:5]) == SPECIAL
    assert set(pieces) <= set(large)
    assert_spells(tokenizer_of(pieces, tmp_path))


def test_the_captions_pieces_come_first_the_frequent_ones_before(large, split, tmp_path):
    captions = ["The Dog, the dog; THE cat", "the unaffable (dog)"]
    pieces = small_vocabulary(large, captions, split, SPELLED + 7)
    assert pieces[SPELLED:] == ["the", "dog", "##ble", "##ffa", "cat", "una", pieces[-1]]
    frequent = [
        piece for piece in large if piece.isascii() and not piece.startswith("[") and piece not in pieces[:-1]
    ]
    assert pieces[-1] == frequent[0]
    small = tokenizer_of(pieces, tmp_path)
    assert small.encode("the unaffable cat").tokens == ["[CLS]", *split("the unaffable cat"), "[SEP]"]


def test_the_whole_vocabulary_can_be_asked_for(large, split):
    assert sorted(small_vocabulary(large, [], split, len(large))) == sorted(large)


def test_sizes_that_cannot_be(large, split):
    for size in (0, SPELLED - 1, len(large) + 1):
        with pytest.raises(
            InputError, match=rf"size: expected {SPELLED} to {len(large)} word pieces, got {size}"
        ):
            small_vocabulary(large, [], split, size)
    with pytest.raises(InputError, match=r"the large vocabulary lacks \[MASK\], q"):
        small_vocabulary([p for p in large if p not in ("q", "[MASK]")], [], split, 300)


def test_the_shipped_vocabulary(large):
    pieces = DEMO_VOCABULARY.read_text(encoding="utf-8").splitlines()
    assert len(pieces) == len(set(pieces)) == 2048
    assert set(pieces) <= set(large)
    assert tuple(pieces[:5]) == SPECIAL
    assert_spells(build_tokenizer(DEMO_VOCABULARY, 2048))


def test_the_command_reads_captions_and_side_cars(tmp_path):
    """Records whose pictures are not there count too; explanations and captions of the folder as well."""
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    record = {
        "id": 1,
        "image": "DGM4/origin/1.jpg",
        "text": "Zebra",
        "fake_cls": "orig",
        "fake_image_box": [],
        "fake_text_pos": [],
    }
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "1.jpg").touch()
    (metadata / "train.json").write_text(json.dumps([record]))
    (metadata / "captions.json").write_text(json.dumps({"a": "giraffe"}))
    (metadata / "explanations.json").write_text(json.dumps({"a": "elephant"}))
    (metadata / "others.json").write_text(json.dumps({"a": "crocodile"}))
    out = tmp_path / "vocab.txt"
    assert cli.main(["data", "vocabulary", "--data", str(tmp_path), "--size", "90", "--out", str(out)]) == 0
    pieces = out.read_text().splitlines()
    assert len(pieces) == 90
    assert {"zebra", "elephant"} < set(pieces)
    assert pieces[SPELLED:][:3] == sorted(pieces[SPELLED:][:3])
    assert "crocodile" not in pieces
    assert cli.main(["data", "vocabulary", "--data", str(tmp_path), "--size", "20", "--out", str(out)]) == 1
