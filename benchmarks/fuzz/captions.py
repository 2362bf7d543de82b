"""Odd captions: pieces of every script and of none, lone surrogates, broken UTF-8, and very long words."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import numpy as np

from engine.bundle import Bundle
from engine.errors import InputError
from engine.inputs.text import CaptionTokenizer, Tokens

BUNDLE = "demo:asap"
_PIECES = (
    *[
        "a",
        "the",
        "President",
        "smiles",
        "[SEP]",
        "[CLS]",
        "[MASK]",
        "[UNK]",
        "##ing",
        "<person>",
        "don't",
        "U.S.",
        "3.5%",
        "e-mail",
        "a/b",
    ],
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\x00",
        "\x07",
        "\x7f",
        "\x85",
        "\u200b",
        "\ufeff",
        "\u2028",
        "\u00a0",
        "\u3000",
    ),
    *("\ud800", "\udfff", "\ufffd", "\uffff", "\U0010ffff", "\u202e", "\u0301", "\u0345", "\u1ab0"),
    *("é", "ß", "ſ", "İ", "ǆ", "Ω", "ﬁ", "ﷺ", "中文", "日本語", "한국어", "עברית", "العربية", "हिन्दी", "ไทย"),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "👍🏽",
        "½",
        "²",
        "™",
        "!",
        "?!",
        "...",
        '"',
        "'",
        "()",
        "#",
        "~",
        "-",
        "/",
    ),
)
_LENGTHS = (0, 1, 2, 5, 20, 60, 300)


class TriedCaption(NamedTuple):
    """What became of one caption: the reason why it was refused, or what is wrong with its tokens, or "".

    seconds: of this thread's CPU time.
    """

    refused: str
    wrong: str
    seconds: float


def caption(seed: int) -> str | bytes:
    """The caption of a seed; a quarter of them are bytes, some of which are not UTF-8."""
    random = np.random.default_rng([2, seed])
    count = int(random.choice(_LENGTHS))
    pieces = [_PIECES[i] for i in random.integers(len(_PIECES), size=count)]
    if random.random() < 0.3:  # any code point
        pieces += [chr(code) for code in random.integers(0, 0x110000, size=int(random.integers(1, 40)))]
    if random.random() < 0.05:  # longer than is read
        pieces.append("x" * int(random.integers(1, 20_000)))
    random.shuffle(pieces)
    text = random.choice(["", " "]).join(pieces)
    if random.random() < 0.75:
        return text
    data = bytearray(text.encode("utf-8", errors="surrogatepass"))
    for _ in range(int(random.integers(0, 4)) if data else 0):
        data[random.integers(len(data))] = random.integers(256)
    return bytes(data)


@functools.cache
def _tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.of(Bundle.open(BUNDLE))


def try_caption(seed: int) -> TriedCaption:
    """Tokenise the caption of a seed; whatever that raises but InputError is raised."""
    given, tokenizer = caption(seed), _tokenizer()
    begun = time.thread_time()
    try:
        text, tokens = tokenizer(given)
    except InputError as error:
        return TriedCaption(str(error), "", time.thread_time() - begun)
    return TriedCaption("", _wrong(given, text, tokens, tokenizer.cls_id), time.thread_time() - begun)


def _wrong(given: str | bytes, text: str, tokens: Tokens, cls_id: int) -> str:
    """What is wrong with the tokens of a caption: spans that are not its own, special tokens, other text."""
    if (
        isinstance(given, str)
        and not any("\ud800" <= c <= "\udfff" for c in given)
        and not given.startswith(text)
    ):
        return "the text is not the beginning of the caption"
    if len(tokens.ids) != len(tokens.word_of) or tokens.ids[0] != cls_id:
        return "the tokens do not begin with [CLS], or not each has a word"
    if cls_id in tokens.ids[1:]:
        return "text became [CLS]"
    if any(text[word.start : word.end] != word.text for word in tokens.words):
        return "a word is not its span of the caption"
    if tokens.word_of.max(initial=-1) >= len(tokens.words):
        return "a token's word is missing"
    return ""
