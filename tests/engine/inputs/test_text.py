from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dgm4.byte_pairs import read_byte_pairs
from dgm4.tokenizer import ROBERTA_PIECES, ROBERTA_VOCABULARY, build_tokenizer
from engine.errors import BundleError, InputError
from engine.inputs import text as text_module
from engine.inputs.text import CaptionTokenizer, Span, Tokens, clean_caption, read_caption
from engine.registry.record import BYTE_BPE

THOROUGH = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Mostly what the cleaning treats specially, so that its rules meet each other.
PARTS = list("aB é'İΣß-/,.!?\"()*#:;~ \t\n\r\x1c\x85\xa0\u3000<>") + ["<person>", "[SEP]", "[CLS]"]
TRICKY = st.lists(st.sampled_from(PARTS), max_size=60).map("".join)
ANY = st.text(st.characters(), max_size=80)


def published(caption: str, max_words: int = 50) -> str:
    """The data set's cleaning written plainly, without any map back."""
    caption = caption.lower()
    for mark in ",.'!?\"()*#:;~":
        caption = caption.replace(mark, "")
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    caption = re.sub(r"\s{2,}", " ", caption)
    caption = caption.rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def bare(word: str) -> str:
    """A cleaned word without what depends on its neighbours: the final sigma, the brackets of <person>."""
    return re.sub(r"[\s<>]", "", word).replace("ς", "σ")


@pytest.fixture(scope="module")
def tokenizer(bundle_dir):
    return CaptionTokenizer(bundle_dir / "tokenizer.json")


@THOROUGH
@given(TRICKY | ANY, st.sampled_from([2, 50]))
@example("<per.son> a - b", 50)
@example("ΑΣ ΑΣ. İİ-İ", 50)
@example("a \n", 50)
def test_cleaning_is_the_published_one(caption, max_words):
    assert clean_caption(caption, max_words).text == published(caption, max_words)


@THOROUGH
@given(TRICKY | ANY)
def test_spans_return_to_the_caption(caption):
    cleaned = clean_caption(caption)
    position = 0
    for span, (start, end) in zip(cleaned.spans, cleaned.bounds, strict=True):
        assert position <= span.start < span.end <= len(caption)
        assert caption[span.start : span.end] == span.text
        assert bare(published(span.text)) == bare(cleaned.text[start:end])
        position = span.end


def test_words_are_shown_as_written():
    caption = '  President Obama\'s "well-known" friend, <person>: U.S.A.!'
    words = [span.text for span in clean_caption(caption).spans]
    assert words == ["President", "Obama's", "well", "known", "friend", "person", "U.S.A"]


def test_single_tabs_and_newlines_part_words_but_not_the_published_text():
    cleaned = clean_caption("one\ttwo\nthree\xa0four")
    assert cleaned.text == "one\ttwo\nthree\xa0four"
    assert [span.text for span in cleaned.spans] == ["one", "two", "three", "four"]


def test_words_past_the_limit_are_dropped_with_a_warning():
    cleaned = clean_caption(" ".join(f"w{i}" for i in range(73)))
    assert len(cleaned.spans) == 50
    assert cleaned.warnings == ("text_truncated: kept 50 of 73 words",)


@pytest.mark.parametrize("caption", ["", "   ", "\n\t", "...", "?!-/-", "\u3000"])
def test_empty_captions_are_accepted_with_a_warning(tokenizer, caption):
    _, tokens = tokenizer(caption)
    assert tokens.ids.tolist() == [tokenizer.cls_id]
    assert tokens.words == ()
    assert [warning.split(":")[0] for warning in tokens.warnings] == ["empty_text"]


def test_a_caption_of_unreadable_characters_counts_as_empty(tokenizer):
    _, tokens = tokenizer("\u200b\x00 \ufeff")
    assert tokens.words == ()
    assert [warning.split(":")[0] for warning in tokens.warnings] == ["empty_text"]


def test_tokens_name_their_words(tokenizer):
    _, tokens = tokenizer("The President's xyz")
    assert [span.text for span in tokens.words] == ["The", "President's", "xyz"]
    # "presidents" = president + ##s; "xyz" = x ##y ##z
    assert tokens.word_of.tolist() == [-1, 0, 1, 1, 2, 2, 2]
    assert tokens.ids.dtype == np.int64
    assert len(tokens.ids) == 7


def test_word_pieces_past_the_limit_are_dropped_with_their_words(tokenizer):
    _, tokens = tokenizer(" ".join(["abcdefghij"] * 40))
    assert len(tokens.ids) == 127
    assert len(tokens.words) == 13
    assert tokens.warnings == ("text_truncated: kept 126 of 400 word pieces",)


@pytest.mark.parametrize("text", ["[SEP]", "[CLS] a [PAD]", "a[MASK]b", "[ SEP ]", "[sep][cls]"])
def test_special_tokens_in_the_text_stay_text(tokenizer, special_ids, text):
    _, tokens = tokenizer(text)
    assert not special_ids & set(tokens.ids[1:].tolist())


def test_special_tokens_stay_text_even_if_the_vocabulary_adds_them_in_lower_case(bundle_dir, tmp_path):
    from tokenizers import Tokenizer

    changed = Tokenizer.from_file(str(bundle_dir / "tokenizer.json"))
    changed.add_special_tokens(["obama"])
    changed.add_special_tokens(["[sep]"])
    special = changed.token_to_id("[sep]")
    changed.save(str(tmp_path / "tokenizer.json"))
    _, tokens = CaptionTokenizer(tmp_path / "tokenizer.json")("a [sep] b")
    assert special not in tokens.ids


@THOROUGH
@given(st.text(max_size=100) | st.binary(max_size=100) | TRICKY)
def test_any_text_gives_valid_tokens(tokenizer, special_ids, caption):
    text, tokens = tokenizer(caption)
    assert 1 <= len(tokens.ids) <= 127
    assert len(tokens.word_of) == len(tokens.ids)
    assert not special_ids & set(tokens.ids[1:].tolist())
    assert sorted(set(tokens.word_of[1:].tolist())) == list(range(len(tokens.words)))
    for span in tokens.words:
        assert text[span.start : span.end] == span.text
    text.encode("utf-8")


def test_lone_surrogates_are_replaced_with_a_warning():
    text, warnings = read_caption("a\ud800b")
    assert text == "a\ufffdb"
    assert warnings == ("text_replaced: characters that are not valid Unicode were read as U+FFFD",)


def test_bytes_are_decoded():
    assert read_caption("été".encode()) == ("été", ())
    text, warnings = read_caption(b"a\xff b")
    assert text == "a\ufffd b"
    assert len(warnings) == 1


@pytest.mark.parametrize("caption", [None, 3, 1.5, ["a"], ("a",), {}, np.array("a")])
def test_other_types_are_refused(caption):
    with pytest.raises(InputError, match=f"got {type(caption).__name__}"):
        read_caption(caption)


@pytest.mark.parametrize(
    "caption", ["word " * 1_000_000, "x" * 1_000_000, b"\xff" * 1_000_000, "\n" * 1_000_000]
)
def test_long_captions_are_cut_before_any_work(tokenizer, caption, monkeypatch):
    """Counted in the characters that the first step of reading, the cleaning and the tokenizer get."""
    surrogates, worked_on = text_module._SURROGATE, []

    def spy(step):
        return lambda *x: (
            worked_on.append(len(next(a for a in x if isinstance(a, str) and len(a) > 1))) or step(*x)
        )

    monkeypatch.setattr(text_module, "_SURROGATE", SimpleNamespace(subn=spy(surrogates.subn)))
    monkeypatch.setattr(text_module, "clean_caption", spy(clean_caption))
    text, tokens = tokenizer(caption)
    assert 1 <= len(worked_on) <= 2
    assert max(worked_on) <= 4097
    assert len(text) == 4096
    assert "text_truncated: read the first 4096 characters" in tokens.warnings


def test_words_are_counted_in_what_was_read(tokenizer):
    _, tokens = tokenizer("man " * 10_000)
    assert "text_truncated: kept 50 of 1024 words in the first 4096 characters" in tokens.warnings


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": 3}'])
def test_a_damaged_tokenizer_file_is_a_bundle_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        CaptionTokenizer(path)


@pytest.fixture(scope="module")
def byte_pairs():
    content = build_tokenizer(ROBERTA_VOCABULARY, ROBERTA_PIECES, "byte_bpe").to_str().encode()
    return CaptionTokenizer("tokenizer.json", content=content, spec=BYTE_BPE)


# What a caption gives: its ids by the published tokenizer, without </s>; the words of its tokens; the words.
BYTE_PAIRS = {
    "Hello, world!": ([0, 42891, 232], [-1, 0, 1], ["Hello", "world"]),
    "In the 1990s": ([0, 179, 5, 4525, 29], [-1, 0, 1, 2, 2], ["In", "the", "1990s"]),
    "2nd $5": ([0, 176, 1187, 68, 245], [-1, 0, 0, 1, 1], ["2nd", "$5"]),
    "a\U0001f600b": ([0, 102, 18636, 7471, 428], [-1, 0, 0, 0, 0], ["a\U0001f600b"]),
    "the\t(the)": ([0, 627, 50117, 627], [-1, 0, -1, 1], ["the", "the"]),
    "": ([0], [-1], []),
    " \t\u3000 ...": ([0], [-1], []),
}


@pytest.mark.parametrize("caption", BYTE_PAIRS)
def test_byte_pairs_name_their_words(byte_pairs, caption):
    ids, word_of, words = BYTE_PAIRS[caption]
    text, tokens = byte_pairs(caption)
    assert tokens.ids.tolist() == ids and tokens.ids.dtype == np.int64
    assert tokens.word_of.tolist() == word_of
    assert [word.text for word in tokens.words] == words
    assert [text[word.start : word.end] for word in tokens.words] == words
    assert tokens.warnings == (() if words else ("empty_text: the caption holds no word",))


@THOROUGH
@given(st.text(max_size=100) | st.binary(max_size=100) | TRICKY)
@example("<s> </s> <mask>")
@example("\u00e9\U0001f468\u200d\U0001f469 e\u0301")
def test_each_token_lies_in_the_span_of_its_word(byte_pairs, caption):
    """Spelled back, the tokens of a word are the cleaned word; the others are white space."""
    text, tokens = byte_pairs(caption)
    cleaned = clean_caption(text)
    assert set(tokens.ids[1:].tolist()).isdisjoint(range(4)) and tokens.ids[0] == 0
    spelled = dict.fromkeys(range(-1, len(tokens.words)), b"")
    for token, word in zip(tokens.ids[1:].tolist(), tokens.word_of[1:].tolist(), strict=True):
        spelled[word] += SPELLED[token]
    whole = not any(warning.startswith("text_truncated") for warning in tokens.warnings)
    bounds = dict(zip(cleaned.spans, cleaned.bounds, strict=True))
    for number, span in enumerate(tokens.words[: None if whole else -1]):
        start, end = bounds[span]
        assert spelled[number].decode().lstrip(" ") == cleaned.text[start:end]
    assert spelled[-1].decode().strip() == ""
    assert tokens.words == (cleaned.spans if whole else cleaned.spans[: len(tokens.words)])


def _bytes_of_pieces():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    characters |= {chr(256 + i): byte for i, byte in enumerate(others)}
    pieces = read_byte_pairs(ROBERTA_VOCABULARY).pieces
    return [bytes(characters[character] for character in piece) for piece in pieces]


SPELLED = _bytes_of_pieces()


def test_byte_pairs_past_the_limit_are_dropped_with_their_words(byte_pairs):
    _, tokens = byte_pairs(" ".join(["zqxjkvbw"] * 50))
    assert len(tokens.ids) == 127 and len(tokens.ids) == len(tokens.word_of)
    assert 1 < len(tokens.words) < 50
    assert [warning.split(":")[0] for warning in tokens.warnings] == ["text_truncated"]


def test_values_go_from_tokens_to_words_and_back():
    """The third token is white space: its value is nobody's."""
    words = (Span("a", 0, 1), Span("b", 2, 3))
    tokens = Tokens(np.arange(5), np.array([-1, 0, -1, 1, 1]), words, ())
    assert tokens.by_word(np.array([-2.0, 9.0, 0.5, -1.0])).tolist() == [-2.0, 0.5]
    assert tokens.by_word(np.array([False, True, False, False])).tolist() == [False, False]
    assert tokens.by_token(np.array([False, True])).tolist() == [False, False, True, True]


def test_a_tokenizer_of_another_kind_is_a_bundle_error(bundle_dir):
    with pytest.raises(
        BundleError, match=r"expected a tokenizer of kind BPE with <s>, got WordPiece without <s>"
    ):
        CaptionTokenizer(bundle_dir / "tokenizer.json", spec=BYTE_BPE)
