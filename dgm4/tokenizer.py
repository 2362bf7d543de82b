"""The tokenizer that goes into a bundle: WordPiece over the vocabulary of bert-base-uncased."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from engine.errors import InputError
from engine.files import sha256_of

log = logging.getLogger(__name__)

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_PIECES = 30522
VOCABULARY = "vocab.txt"  # beside a checkpoint: its own vocabulary, as training leaves it there
_HERE = Path(__file__).resolve().parent
BERT_VOCABULARY = _HERE / "vocabularies" / "bert-base-uncased.txt"  # Google's, see NOTICE
DEMO_VOCABULARY = _HERE / "demo" / "vocab.txt"
_LONGEST_WORD = 100  # characters, as in BERT's own code


def find_vocabulary(size: int = BERT_PIECES) -> Path:
    """Return the vocabulary file of `size` pieces that ships with `dgm4`: bert-base-uncased's, or the demo's.

    Raises InputError for another size.
    """
    if size == count_pieces(DEMO_VOCABULARY):
        return DEMO_VOCABULARY
    if size != BERT_PIECES:
        raise InputError(f"no vocabulary of {size} word pieces is at hand: give its file (--vocab)")
    return BERT_VOCABULARY


def vocabulary_of(checkpoint: Path | None, size: int, digest: str | None = None) -> Path:
    """Return the vocabulary file beside a checkpoint, else one of `size` pieces as `find_vocabulary` does.

    The file beside it may belong to something else. Raises InputError where the checkpoint records another
    `digest`, and where it records none, but a vocabulary of that size is known and this is another.
    """
    beside = None if checkpoint is None else checkpoint.parent / VOCABULARY
    path = beside if beside is not None and beside.is_file() else find_vocabulary(size)
    if digest is not None:
        if vocabulary_digest(path) != digest:
            raise InputError(
                f"{path}: expected the vocabulary that the network was trained with, SHA-256 {digest}, got "
                f"{vocabulary_digest(path)}; give it (--vocab)"
            )
    elif path == beside:
        _check_known(path, size)
    return path


def _check_known(beside: Path, size: int) -> None:
    whose = {BERT_PIECES: "bert-base-uncased's", count_pieces(DEMO_VOCABULARY): "the demo's"}.get(size)
    if whose is None:
        log.warning("%s: taken as the network's vocabulary; no known one has its %d pieces", beside, size)
    elif vocabulary_digest(beside) != vocabulary_digest(find_vocabulary(size)):
        raise InputError(
            f"{beside}: expected {whose} {size} word pieces, got others; give --vocab {beside} if the "
            "network was trained with it, else move it away"
        )


def vocabulary_digest(vocabulary: Path) -> str:
    """SHA-256 (hexadecimal) of the word pieces, one a line, whatever ends the lines of the file."""
    return sha256_of("".join(f"{piece}\n" for piece in _read_pieces(vocabulary)).encode())


def count_pieces(vocabulary: Path) -> int:
    """Number of word pieces in a vocabulary file; raises InputError where it cannot be read."""
    return len(_read_pieces(vocabulary))


def _read_pieces(vocabulary: Path) -> list[str]:
    try:
        return vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{vocabulary}: expected a vocabulary with one word piece a line: {error}"
        ) from error


def build_tokenizer(vocabulary: Path, size: int) -> Tokenizer:
    """Build the uncased WordPiece tokenizer of a vocabulary with one piece a line, `size` pieces.

    Raises InputError where the file is unreadable, has another size, or lacks a special token.
    """
    pieces = _read_pieces(vocabulary)
    missing = [token for token in _SPECIAL if token not in pieces]
    if len(pieces) != size or missing:
        lacks = f", without {', '.join(missing)}" if missing else ""
        raise InputError(
            f"{vocabulary}: expected {size} word pieces, got {len(pieces)}{lacks}; give the vocabulary that "
            "the network was trained with (--vocab)"
        )
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer
