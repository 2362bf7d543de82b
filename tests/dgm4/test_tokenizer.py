"""The bundle's tokenizer against transformers', string by string."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dgm4.tokenizer import (
    DEMO_VOCABULARY,
    VOCABULARY,
    build_tokenizer,
    find_vocabulary,
    vocabulary_digest,
    vocabulary_of,
)
from engine.errors import InputError

SIZE = 30522
WRITTEN = [
    "",
    " ",
    "Barack Obama speaks in Washington on Monday",
    "the president's wife, who is well-known; isn't she?",
    "Ångström naïve café São Paulo Zürich Łódź",
    "习近平 in Beijing 北京",
    "Привет мир, Ελλάδα, مرحبا, नमस्ते, 日本語テキスト",
    "emoji \U0001f600 and \U0001f1fa\U0001f1f8 flags",
    "tab\tnew\nline\r\nnull\x00 zero\u200bwidth bom\ufeff nbsp\u00a0here \u2028 separator",
    "x" * 99,
    "y" * 100,
    "z" * 101,
    "unaffable antidisestablishmentarianism supercalifragilisticexpialidocious",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [unused1] [cls]",
    "$5,000.00 50% #tag @name http://example.com/a?b=c&d=e",
    "e\u0301 decomposed and \u00e9 composed \ufb01 ligature \u0130 dotted",
    "1234567890 3.14 2021-03-04 10:45",
]


def generated(count):
    """Strings of ordinary words, of word parts, and of any characters."""
    draw = random.Random(0)
    words = ["man", "woman", "protest", "police", "obama", "election", "stadium", "crying", "the", "of", "in"]
    letters = "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789 -'.,/éüñß中文дж"
    for i in range(count):
        if i % 3 == 0:
            yield " ".join(draw.choices(words, k=draw.randrange(1, 30)))
        elif i % 3 == 1:
            yield "".join(draw.choices(letters, k=draw.randrange(1, 80)))
        else:
            yield "".join(
                chr(draw.choice([*range(32, 127), *range(160, 0x500)])) for _ in range(draw.randrange(1, 60))
            )


@pytest.fixture(scope="module")
def ours():
    return build_tokenizer(find_vocabulary(), SIZE)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_bytes(find_vocabulary().read_bytes())
    return transformers.BertTokenizer.from_pretrained(folder, local_files_only=True, do_lower_case=True)


def test_ids_are_those_of_transformers(ours, theirs):
    strings = [*WRITTEN, *generated(450)]
    assert theirs.vocab_size == SIZE
    for text in strings:
        assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)


def test_special_tokens_are_berts(ours):
    ids = {token: ours.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    assert ids == {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    encoding = ours.encode("Obama")
    assert (encoding.ids[0], encoding.ids[-1]) == (101, 102)


def test_it_survives_its_file(ours, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(ours.to_str(), encoding="utf-8")
    again = Tokenizer.from_file(str(path))
    assert all(again.encode(text).ids == ours.encode(text).ids for text in WRITTEN)
    assert again.truncation is None
    assert again.padding is None


def test_another_size_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]), encoding="utf-8")
    assert build_tokenizer(path, 6).get_vocab_size() == 6
    with pytest.raises(InputError, match="expected 7 word pieces, got 6"):
        build_tokenizer(path, 7)


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\nword", encoding="utf-8")
    with pytest.raises(InputError, match=r"without \[CLS\], \[SEP\], \[MASK\]"):
        build_tokenizer(path, 3)


def test_an_unreadable_vocabulary_is_refused(tmp_path):
    binary = tmp_path / "vocab.bin"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "absent.txt", tmp_path, binary):
        with pytest.raises(InputError, match="expected a vocabulary with one word piece a line"):
            build_tokenizer(path, SIZE)


def test_the_vocabulary_is_the_one_that_was_published():
    notice = (Path(__file__).resolve().parents[2] / "NOTICE").read_text(encoding="utf-8")
    digest = hashlib.sha256(find_vocabulary().read_bytes()).hexdigest()
    assert digest == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    assert f"{find_vocabulary().name}, SHA-256 {digest}" in " ".join(notice.split())


@pytest.fixture
def beside(tmp_path):
    """Write the demo's pieces, or others, beside a checkpoint, and return the checkpoint."""

    def write(pieces):
        (tmp_path / VOCABULARY).write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
        return tmp_path / "checkpoint_best.pth"

    return write


def demo_pieces():
    return DEMO_VOCABULARY.read_text(encoding="utf-8").splitlines()


def test_the_known_vocabulary_beside_a_checkpoint_is_taken(beside, tmp_path, caplog):
    assert vocabulary_of(beside(demo_pieces()), 2048) == tmp_path / VOCABULARY
    assert vocabulary_of(beside(find_vocabulary().read_text(encoding="utf-8").splitlines()), SIZE).exists()
    assert caplog.text == ""


@pytest.mark.parametrize("size", [2048, SIZE])
def test_another_vocabulary_of_a_known_size_has_to_be_asked_for(size, beside):
    pieces = find_vocabulary(size).read_text(encoding="utf-8").splitlines()
    with pytest.raises(InputError, match=rf"'s {size} word pieces, got others; give --vocab .*vocab\.txt if"):
        vocabulary_of(beside(reversed(pieces)), size)


def test_the_vocabulary_that_a_checkpoint_records_is_the_only_right_one(beside, tmp_path):
    checkpoint = beside(reversed(demo_pieces()))
    digest = vocabulary_digest(tmp_path / VOCABULARY)
    assert vocabulary_of(checkpoint, 2048, digest) == tmp_path / VOCABULARY
    beside(demo_pieces())
    with pytest.raises(InputError, match=f"that the network was trained with, SHA-256 {digest}, got"):
        vocabulary_of(checkpoint, 2048, digest)


def test_a_vocabulary_of_an_unknown_size_is_named(beside, tmp_path, caplog):
    assert vocabulary_of(beside(demo_pieces()[:1500]), 1500) == tmp_path / VOCABULARY
    assert f"{tmp_path / VOCABULARY}: taken as the network's vocabulary" in caplog.text
