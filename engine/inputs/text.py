"""Captions: the published cleaning with a map back to the user's string, and tokenisation.

The networks were trained on captions cleaned as the data set's are: lower case, without most punctuation, at
most 50 words. Here each remaining character has its position in the user's caption, so that a word is shown
as the user wrote it, punctuation inside it included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import BundleError, InputError
from engine.layout import TOKENIZER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from engine.bundle import Bundle

MAX_CHARACTERS = 4096
_BYTES_PER_CHARACTER = 4
_DELETED = frozenset(",.'!?\"()*#:;~")
_SPACED = frozenset("-/")
_PERSON = "<person>"
_WHITE_RUN = re.compile(r"\s{2,}")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Runs between what BERT's normaliser turns into a space; it deletes other control characters.
_WORD = re.compile("[^ \t\n\r\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


@dataclass(frozen=True)
class Span:
    """One word: `text` is `caption[start:end]`, in characters of the user's caption."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class CleanCaption:
    """A caption as the networks read it.

    `text` is the cleaned string, `spans` the words in the user's caption, and `bounds` the (start,
    end) of each of these words in `text`.
    """

    text: str
    spans: tuple[Span, ...]
    bounds: tuple[tuple[int, int], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Tokens:
    """Token ids of one caption: int64 [n], [CLS] first and no [SEP].

    `word_of` [n] names each token's word, -1 for [CLS]; `words` holds the words that got a token.
    """

    ids: np.ndarray
    word_of: np.ndarray
    words: tuple[Span, ...]
    warnings: tuple[str, ...]


def read_caption(caption: str | bytes, max_characters: int = MAX_CHARACTERS) -> tuple[str, tuple[str, ...]]:
    """Return (the caption as clean text of at most `max_characters` characters, warnings).

    Bytes are decoded as UTF-8; what cannot be decoded and lone surrogates become U+FFFD.
    Raises InputError where `caption` is neither str nor bytes.
    """
    if isinstance(caption, (bytes, bytearray)):
        head = bytes(caption[: _BYTES_PER_CHARACTER * (max_characters + 1)])
        text = head.decode("utf-8", errors="replace")
        damaged = "\ufffd" in text[:max_characters]
    elif isinstance(caption, str):
        text = caption[: max_characters + 1]
        text, replaced = _SURROGATE.subn("\ufffd", text)
        damaged = replaced > 0
    else:
        raise InputError(f"expected a caption as str (or UTF-8 bytes), got {type(caption).__name__}")
    warnings = []
    if len(text) > max_characters:
        text = text[:max_characters]
        warnings.append(f"text_truncated: read the first {max_characters} characters")
    if damaged:
        warnings.append("text_replaced: characters that are not valid Unicode were read as U+FFFD")
    return text, tuple(warnings)


def clean_caption(caption: str, max_words: int = 50) -> CleanCaption:
    """Clean `caption` as the training data was, and keep its first `max_words` words.

    The words counted are the published ones, split on ' '; the words reported are split at every
    white space that the tokenizer splits at, which differs only around a single tab or newline.
    """
    text, origin = _strip(*_collapse(*_name_person(*_delete(caption))))
    published = text.split(" ") if text else []
    warnings = []
    if len(published) > max_words:
        within = f" in the first {MAX_CHARACTERS} characters" if len(caption) >= MAX_CHARACTERS else ""
        warnings.append(f"text_truncated: kept {max_words} of {len(published)} words{within}")
        text = " ".join(published[:max_words])
    bounds = tuple(match.span() for match in _WORD.finditer(text))
    spans = []
    for start, end in bounds:
        first, last = origin[start], origin[end - 1] + 1
        spans.append(Span(caption[first:last], first, last))
    if not spans:
        warnings.append("empty_text: the caption holds no word")
    return CleanCaption(text, tuple(spans), bounds, tuple(warnings))


def _delete(caption: str) -> tuple[str, list[int]]:
    """Lower-case, delete punctuation and space out '-' and '/'; return (text, origin of each character)."""
    lowered = caption.lower()
    # One character may become several; only the final sigma looks at its neighbours, and it stays one.
    origin = [i for i, character in enumerate(caption) for _ in character.lower()]
    remaining = [
        (" " if c in _SPACED else c, i) for c, i in zip(lowered, origin, strict=True) if c not in _DELETED
    ]
    return "".join(c for c, _ in remaining), [i for _, i in remaining]


def _name_person(text: str, origin: list[int]) -> tuple[str, list[int]]:
    """Drop the angle brackets of '<person>'."""
    dropped: set[int] = set()
    start = text.find(_PERSON)
    while start >= 0:
        end = start + len(_PERSON)
        dropped.update((start, end - 1))
        start = text.find(_PERSON, end)
    remaining = [i for i in range(len(text)) if i not in dropped] if dropped else range(len(text))
    return "".join(text[i] for i in remaining), [origin[i] for i in remaining]


def _collapse(text: str, origin: list[int]) -> tuple[str, list[int]]:
    """Make one space of every run of two or more white spaces."""
    parts: list[str] = []
    remaining: list[int] = []
    position = 0
    for match in _WHITE_RUN.finditer(text):
        parts += [text[position : match.start()], " "]
        remaining += origin[position : match.start() + 1]
        position = match.end()
    return "".join(parts) + text[position:], remaining + origin[position:]


def _strip(text: str, origin: list[int]) -> tuple[str, list[int]]:
    """Strip newlines on the right, then spaces on both sides, as published."""
    text = text.rstrip("\n").rstrip(" ")
    start = len(text) - len(text.lstrip(" "))
    return text[start:], origin[start : len(text)]


class CaptionTokenizer:
    """WordPiece ids of captions, as bert-base-uncased gives them without [SEP]."""

    def __init__(
        self, path: str | Path, max_words: int = 50, max_tokens: int = 127, content: bytes | None = None
    ):
        """Read the `tokenizer.json` at `path`; raises BundleError where it is not one or lacks [CLS].

        With `content`, that of the file, `path` is only what messages call it.
        """
        self._tokenizer = _load_tokenizer(Path(path), content)
        self._max_words = max_words
        self._max_tokens = max_tokens
        cls_id = self._tokenizer.token_to_id("[CLS]")
        if cls_id is None:
            raise BundleError(f"{path}: the vocabulary has no [CLS]; expected that of bert-base-uncased")
        self.cls_id: int = cls_id
        self._unknown_id: int | None = self._tokenizer.token_to_id("[UNK]")

    @classmethod
    def of(cls, bundle: Bundle) -> CaptionTokenizer:
        """The tokenizer of a bundle, made of the very bytes that were hashed; raises BundleError."""
        spec = bundle.manifest.preprocess
        return cls(bundle.path / TOKENIZER, spec.max_words, spec.max_tokens, bundle.read(TOKENIZER))

    def __call__(self, caption: str | bytes) -> tuple[str, Tokens]:
        """Return (the caption that the words' spans refer to, its tokens); raises InputError."""
        text, read_warnings = read_caption(caption)
        cleaned = clean_caption(text, self._max_words)
        tokens = self.encode(cleaned)
        warnings = read_warnings + tokens.warnings
        return text, Tokens(tokens.ids, tokens.word_of, tokens.words, warnings)

    def encode(self, cleaned: CleanCaption) -> Tokens:
        """Tokenise a cleaned caption into at most `max_tokens` ids, [CLS] included.

        A word without a token (control characters alone, or past `max_tokens`) is left out of `words`.
        """
        encoding = self._tokenizer.encode(cleaned.text, add_special_tokens=False)
        room = self._max_tokens - 1
        warnings = list(cleaned.warnings)
        if len(encoding.ids) > room:
            warnings.append(f"text_truncated: kept {room} of {len(encoding.ids)} word pieces")
        starts = np.array([start for start, _ in encoding.offsets[:room]], dtype=np.int64)
        word_starts = np.array([start for start, _ in cleaned.bounds], dtype=np.int64)
        word_of = np.searchsorted(word_starts, starts, side="right") - 1
        read, renumbered = np.unique(word_of, return_inverse=True)
        if cleaned.spans and not len(read):
            warnings.append("empty_text: the caption holds no character that the tokenizer knows")
        known = [token != self._unknown_id for token in encoding.ids[:room]]
        unknown = len(read) - len(np.unique(word_of[known]))
        if unknown:
            warnings.append(f"unknown_words: {unknown} of {len(read)} are not in the network's vocabulary")
        return Tokens(
            ids=np.array([self.cls_id, *encoding.ids[:room]], dtype=np.int64),
            word_of=np.concatenate([[-1], renumbered]).astype(np.int64),
            words=tuple(cleaned.spans[i] for i in read),
            warnings=tuple(warnings),
        )


def _load_tokenizer(path: Path, content: bytes | None) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes() if content is None else content)
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{path}: not a tokenizer file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "[SEP]" typed by a user is text; lower-casing hides it already, this holds for any added token.
    tokenizer.encode_special_tokens = True
    return tokenizer
