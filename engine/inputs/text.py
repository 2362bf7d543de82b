"""Captions: the published cleaning with a map back to the user's string, and tokenisation.

The networks were trained on captions cleaned as the data set's are: lower case, without most punctuation, at
most 50 words. Here each remaining character has its position in the user's caption, so that a word is shown
as the user wrote it, punctuation inside it included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import BundleError, InputError
from engine.layout import TOKENIZER
from engine.registry import network_of
from engine.registry.record import WORDPIECE, TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from engine.bundle import Bundle

MAX_CHARACTERS = 4096
_BYTES_PER_CHARACTER = 4
_MODELS = {"wordpiece": "WordPiece", "byte_bpe": "BPE"}  # the library's names of the kinds
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

    `word_of` [n] names each token's word; -1 for [CLS], and for white space that is a token of its own.
    `words` holds the words that got a token.
    """

    ids: np.ndarray
    word_of: np.ndarray
    words: tuple[Span, ...]
    warnings: tuple[str, ...]

    def by_word(self, values: np.ndarray) -> np.ndarray:
        """For each word the largest of its tokens' `values`, [n - 1] without [CLS], numbers or bool."""
        word_of = self.word_of[1:]
        lowest = False if values.dtype == bool else -np.inf
        largest = np.full(len(self.words), lowest, dtype=values.dtype)
        np.maximum.at(largest, word_of[word_of >= 0], values[word_of >= 0])
        return largest

    def by_token(self, flags: np.ndarray) -> np.ndarray:
        """For each token but [CLS] whether its word is flagged, bool [n - 1], of bool [words]."""
        return np.append(flags, False)[self.word_of[1:]]


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
    """Ids of captions as a network's own tokenizer gives them, without its last special token."""

    def __init__(
        self,
        path: str | Path,
        max_words: int = 50,
        max_tokens: int = 127,
        content: bytes | None = None,
        spec: TokenizerSpec = WORDPIECE,
    ):
        """Read the `tokenizer.json` at `path`; raises BundleError where it is not one of the kind of `spec`.

        With `content`, that of the file, `path` is only what messages call it.
        """
        self._tokenizer = _load_tokenizer(Path(path), content)
        self._max_words = max_words
        self._max_tokens = max_tokens
        model, cls_id = type(self._tokenizer.model).__name__, self._tokenizer.token_to_id(spec.cls)
        if model != _MODELS[spec.kind] or cls_id is None:
            found = f"{model} {'without' if cls_id is None else 'with'} {spec.cls}"
            raise BundleError(
                f"{path}: expected a tokenizer of kind {_MODELS[spec.kind]} with {spec.cls}, got {found}; "
                "export or copy the bundle again"
            )
        self.cls_id: int = cls_id
        unknown_id = None if spec.unknown is None else self._tokenizer.token_to_id(spec.unknown)
        self._unknown_id = -1 if unknown_id is None else unknown_id

    @classmethod
    def of(cls, bundle: Bundle) -> CaptionTokenizer:
        """The tokenizer of a bundle, made of the very bytes that were hashed; raises BundleError."""
        limits = bundle.manifest.preprocess
        spec = network_of(bundle.manifest.model.config).tokenizer
        content = bundle.read(TOKENIZER)
        return cls(bundle.path / TOKENIZER, limits.max_words, limits.max_tokens, content, spec)

    def __call__(self, caption: str | bytes) -> tuple[str, Tokens]:
        """Return (the caption that the words' spans refer to, its tokens); raises InputError."""
        text, read_warnings = read_caption(caption)
        cleaned = clean_caption(text, self._max_words)
        tokens = self.encode(cleaned)
        warnings = read_warnings + tokens.warnings
        return text, Tokens(tokens.ids, tokens.word_of, tokens.words, warnings)

    def encode(self, cleaned: CleanCaption) -> Tokens:
        """Tokenise a cleaned caption into at most `max_tokens` ids, [CLS] included.

        A word without a token (control characters alone, or past `max_tokens`) is left out of `words`. A
        caption without a word has no token but [CLS].
        """
        encoding = self._tokenizer.encode(cleaned.text if cleaned.spans else "", add_special_tokens=False)
        room = self._max_tokens - 1
        warnings = list(cleaned.warnings)
        if len(encoding.ids) > room:
            warnings.append(f"text_truncated: kept {room} of {len(encoding.ids)} word pieces")
        ids = np.array(encoding.ids[:room], dtype=np.int64)
        word_of = _words_of(encoding.offsets[:room], cleaned.bounds)
        read, renumbered = np.unique(word_of[word_of >= 0], return_inverse=True)
        if cleaned.spans and not len(read):
            warnings.append("empty_text: the caption holds no character that the tokenizer knows")
        known = word_of[(word_of >= 0) & (ids != self._unknown_id)]
        unknown = len(read) - len(np.unique(known))
        if unknown:
            warnings.append(f"unknown_words: {unknown} of {len(read)} are not in the network's vocabulary")
        word_of[word_of >= 0] = renumbered
        return Tokens(
            ids=np.concatenate([[self.cls_id], ids]),
            word_of=np.concatenate([[-1], word_of]),
            words=tuple(cleaned.spans[i] for i in read),
            warnings=tuple(warnings),
        )


def _words_of(offsets: Sequence[tuple[int, int]], bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The word of each token by its last character, since byte pairs have a space in front; int64 [tokens].

    Both have (start, end) in the cleaned text. -1 for a token of white space alone.
    """
    starts, ends = np.array([(0, 0), *bounds], dtype=np.int64).T  # an empty word, in front of all
    last = np.array([max(start, end - 1) for start, end in offsets], dtype=np.int64)
    word_of = np.searchsorted(starts[1:], last, side="right")
    return np.where(last < ends[word_of], word_of, 0) - 1


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
