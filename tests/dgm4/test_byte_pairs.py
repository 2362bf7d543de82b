"""Byte pairs as roberta-base's: an independent spelling of the algorithm, published ids, and broken files."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dgm4.byte_pairs import MERGES, SPECIAL, TOKENIZER, VOCABULARY, read_byte_pairs
from dgm4.tokenizer import (
    ROBERTA_PIECES,
    ROBERTA_VOCABULARY,
    build_tokenizer,
    count_pieces,
    find_vocabulary,
    vocabulary_digest,
    vocabulary_of,
)
from engine.errors import InputError

SMALL = 2048
# As roberta-base gives them, without <s> and </s>.
PUBLISHED = {
    "Hello world": [31414, 232],
    " the": [5],
    "hello world.": [42891, 232, 4],
    "a": [102],
    " ": [1437],
    "\n": [50118],
    "": [],
}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
WRITTEN = [
    *PUBLISHED,
    "president obama speaks in washington on monday",
    "in the 1990s he paid $5 for the 2nd",
    "don't we'll they've i'm 'd 'S",
    "  two spaces   and\ttab\n\nnew lines \r\n",
    "ångström naïve 习近平 привет नमस्ते \u00bd \u2167",
    "\U0001f600 \U0001f1fa\U0001f1f8x \u200d\ufeff\u0300 \u3000\xa0\x85\x00",
    "<s> </s> <mask> <pad> <unk> madeupword0000 <|endoftext|>",
    "\u00a3100/\u20ac2.50 50% #tag @name http://example.com/a?b=c&d=e",
]


def kind_of(character):
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":  # Python counts these four too
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def split(text):
    """GPT-2's cut of a text: contractions, runs of one kind with at most one space in front, white space."""
    at = 0
    while at < len(text):
        contraction = next((c for c in CONTRACTIONS if text.startswith(c, at)), None)
        if contraction:
            yield contraction
            at += len(contraction)
            continue
        begin = at
        if text[at] == " " and at + 1 < len(text) and kind_of(text[at + 1]) != "space":
            at += 1
        kind = kind_of(text[at])
        while at < len(text) and kind_of(text[at]) == kind:
            at += 1
        if kind == "space" and at < len(text) and at - begin > 1:
            at -= 1  # the last one belongs to what follows, or stands alone
        yield text[begin:at]


def spell(data):
    """The printable character that stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in names]
    return [{**names, **{byte: chr(256 + i) for i, byte in enumerate(others)}}[byte] for byte in data]


def encode(text, ids, ranks):
    """Ids of a text by repeated merging of the pair that comes first in the list, everywhere it stands."""
    found = []
    for part in split(text):
        pieces = spell(part.encode())
        while True:
            pairs = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]
            if not pairs:
                break
            best, merged = min(pairs, key=ranks.__getitem__), []
            while pieces:
                width = 2 if tuple(pieces[:2]) == best else 1
                merged.append("".join(pieces[:width]))
                pieces = pieces[width:]
            pieces = merged
        found += [ids[piece] for piece in pieces]
    return found


@pytest.fixture(scope="module", params=[ROBERTA_PIECES, SMALL])
def built(request):
    """(tokenizer, ids by piece, ranks of the merges) of each vocabulary that ships."""
    path = find_vocabulary(request.param, "byte_bpe")
    raw = json.loads(path.read_text(encoding="utf-8"))["model"]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(raw["merges"])}
    tokenizer = build_tokenizer(path, request.param, "byte_bpe")
    tokenizer.encode_special_tokens = True
    return tokenizer, raw["vocab"], ranks


def generated(count):
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz      0123456789'$&<>\t\n\xa0éüß中\U0001f600"
    for _ in range(count):
        yield "".join(draw.choices(letters, k=draw.randrange(1, 60)))


def test_ids_are_those_of_the_algorithm_spelled_out(built):
    tokenizer, ids, ranks = built
    for text in [*WRITTEN, *generated(200)]:
        expected = encode(text, ids, ranks)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, repr(text)


def test_known_ids_of_roberta():
    tokenizer = build_tokenizer(ROBERTA_VOCABULARY, ROBERTA_PIECES, "byte_bpe")
    for text, ids in PUBLISHED.items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert [tokenizer.token_to_id(piece) for piece in SPECIAL] == [0, 1, 2, 3, 50264]
    assert tokenizer.encode("Hello").ids == [0, 31414, 2]


def test_its_own_settings_are_the_published_ones():
    """The published file itself, whose settings ours are."""
    theirs = Tokenizer.from_file(str(ROBERTA_VOCABULARY))
    ours = build_tokenizer(ROBERTA_VOCABULARY, ROBERTA_PIECES, "byte_bpe")
    ours.encode_special_tokens = theirs.encode_special_tokens = True
    for text in WRITTEN:
        assert ours.encode(text).ids == theirs.encode(text).ids, repr(text)
    assert ours.get_vocab() == theirs.get_vocab()


def test_the_vocabulary_is_the_one_that_was_published():
    notice = (Path(__file__).resolve().parents[2] / "NOTICE").read_text(encoding="utf-8")
    digest = hashlib.sha256(ROBERTA_VOCABULARY.read_bytes()).hexdigest()
    assert digest == "847bbeab6174d66a88898f729d52fa8d355fafe1bea101cf960dd404581df70e"
    assert f"{ROBERTA_VOCABULARY.name}, SHA-256 {digest}" in " ".join(notice.split())


def test_the_small_vocabulary_is_the_first_merges_of_the_large_one():
    small = read_byte_pairs(find_vocabulary(SMALL, "byte_bpe"))
    large = read_byte_pairs(ROBERTA_VOCABULARY)
    assert small.merges == large.merges[: SMALL - len(SPECIAL) - 256]
    letters = [piece for piece in large.pieces if len(piece) == 1]
    assert small.pieces == (*SPECIAL[:4], *letters, *map("".join, small.merges), SPECIAL[4])


@pytest.fixture(scope="module")
def small_file():
    return json.loads(find_vocabulary(SMALL, "byte_bpe").read_text(encoding="utf-8"))


@pytest.fixture
def write(tmp_path, small_file):
    """Write the small vocabulary in one of its layouts, changed; the path for --vocab."""

    def write(layout, ids=None, merges=None, **model):
        ids = small_file["model"]["vocab"] if ids is None else ids
        merges = small_file["model"]["merges"] if merges is None else merges
        if layout == TOKENIZER:
            content = {"model": {"type": "BPE", "vocab": ids, "merges": merges} | model}
            (tmp_path / TOKENIZER).write_text(json.dumps(content), encoding="utf-8")
            return tmp_path / TOKENIZER
        (tmp_path / VOCABULARY).write_text(json.dumps(ids), encoding="utf-8")
        (tmp_path / MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        return tmp_path if layout == "folder" else tmp_path / layout

    return write


@pytest.mark.parametrize("layout", ["folder", VOCABULARY, MERGES, TOKENIZER])
def test_every_layout_of_the_files_is_the_same_vocabulary(write, layout):
    path, shipped = write(layout), find_vocabulary(SMALL, "byte_bpe")
    assert read_byte_pairs(path) == read_byte_pairs(shipped)
    assert vocabulary_digest(path) == vocabulary_digest(shipped)
    assert count_pieces(path) == SMALL
    assert build_tokenizer(path, SMALL, "byte_bpe").get_vocab_size() == SMALL


def test_merges_in_pairs_and_a_folder_with_a_tokenizer_are_read(write, small_file, tmp_path):
    pairs = [merge.split(" ") for merge in small_file["model"]["merges"]]
    write(TOKENIZER, merges=pairs)
    assert read_byte_pairs(tmp_path) == read_byte_pairs(find_vocabulary(SMALL, "byte_bpe"))


def test_the_digest_sees_the_order_of_the_merges(write, small_file):
    digest = vocabulary_digest(write("folder"))
    merges = small_file["model"]["merges"]
    assert vocabulary_digest(write("folder", merges=[merges[1], merges[0], *merges[2:]])) != digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "WordPiece"}, "got a model 'WordPiece'"),
        ({"vocab": [1]}, "expected pieces with the ids from 0 on"),
        ({"vocab": {"<s>": 0, "a": 0}}, "expected pieces with the ids from 0 on"),
        ({"vocab": {"<s>": 0, "a": "1"}}, "expected pieces with the ids from 0 on"),
        ({"merges": 3}, "got no list of merges"),
        ({"merges": ["a zzz"]}, r"as merge 1, got \['a', 'zzz'\]; give the two files"),
        ({"merges": ["t h", "t"]}, r"as merge 2, got \['t'\]"),
        ({"merges": [None]}, "as merge 1, got None"),
        ({"merges": [[1, 2]]}, r"as merge 1, got \[1, 2\]"),
        ({"vocab": {"<s>": 0, "a": 1}, "merges": []}, "without <pad>, </s>, <unk>, <mask>, ! among"),
    ],
)
def test_a_broken_vocabulary_is_one_line(write, change, message):
    path = write(TOKENIZER, **change)
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{message}") as caught:
        build_tokenizer(path, SMALL, "byte_bpe")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"model": 3}', b"[" * 100_000])
def test_a_file_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / TOKENIZER).write_bytes(content)
    with pytest.raises(InputError, match=r"expected byte pairs as RoBERTa's: vocab\.json and merges\.txt"):
        count_pieces(tmp_path / TOKENIZER)


def test_a_folder_without_them_and_a_missing_half_are_named(tmp_path, write):
    with pytest.raises(InputError, match=rf"{tmp_path / TOKENIZER}: expected byte pairs"):
        count_pieces(tmp_path)
    path = write(VOCABULARY)
    (tmp_path / MERGES).unlink()
    with pytest.raises(InputError, match=rf"{tmp_path / MERGES}: expected byte pairs"):
        count_pieces(path)


def test_a_vocabulary_of_the_other_kind_or_size_is_refused():
    words, pairs = find_vocabulary(), find_vocabulary(SMALL, "byte_bpe")
    with pytest.raises(InputError, match="expected byte pairs as RoBERTa's"):
        build_tokenizer(words, SMALL, "byte_bpe")
    with pytest.raises(InputError, match=r"2048 word pieces, got .* without \[PAD\]"):
        build_tokenizer(pairs, SMALL)
    with pytest.raises(InputError, match="expected 50265 byte pairs, got 2048; give the vocabulary"):
        build_tokenizer(pairs, ROBERTA_PIECES, "byte_bpe")
    with pytest.raises(InputError, match="no vocabulary of 300 byte pairs is at hand"):
        find_vocabulary(300, "byte_bpe")


def test_word_pieces_beside_a_checkpoint_are_not_taken_for_byte_pairs(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    assert vocabulary_of(tmp_path / "best.pth", ROBERTA_PIECES, kind="byte_bpe") == ROBERTA_VOCABULARY
