"""The tokenizer that goes into a bundle: WordPiece as bert-base-uncased's, byte pairs as roberta-base's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dgm4.byte_pairs import are_byte_pairs, byte_pair_tokenizer, read_byte_pairs
from engine.errors import InputError
from engine.files import sha256_of
from engine.registry.record import BYTE_BPE, WORDPIECE

log = logging.getLogger(__name__)

_CALLED = {spec.kind: spec.pieces for spec in (WORDPIECE, BYTE_BPE)}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_PIECES = 30522
VOCABULARY = "vocab.txt"  # beside a checkpoint: its own vocabulary, as training leaves it there
_HERE = Path(__file__).resolve().parent
BERT_VOCABULARY = _HERE / "vocabularies" / "bert-base-uncased.txt"  # Google's, see NOTICE
DEMO_VOCABULARY = _HERE / "demo" / "vocab.txt"
ROBERTA_PIECES = 50265
ROBERTA_VOCABULARY = _HERE / "vocabularies" / "roberta-base.json"  # Facebook's, see NOTICE
_SHIPPED = {
    (WORDPIECE.kind, BERT_PIECES): BERT_VOCABULARY,
    (WORDPIECE.kind, 2048): DEMO_VOCABULARY,
    (BYTE_BPE.kind, ROBERTA_PIECES): ROBERTA_VOCABULARY,
    (BYTE_BPE.kind, 2048): _HERE / "vocabularies" / "roberta-first-merges.json",
}
_LONGEST_WORD = 100  # characters, as in BERT's own code


def find_vocabulary(size: int = BERT_PIECES, kind: str = WORDPIECE.kind) -> Path:
    """Return the vocabulary file of `size` pieces that ships with `dgm4`.

    Of kind "wordpiece" there are bert-base-uncased's and the demo's; of kind "byte_bpe" roberta-base's and,
    for networks of size tiny, that of its first merges. Raises InputError for another size.
    """
    if (kind, size) not in _SHIPPED:
        raise InputError(f"no vocabulary of {size} {_CALLED[kind]} is at hand: give its file (--vocab)")
    return _SHIPPED[kind, size]


def vocabulary_of(
    checkpoint: Path | None, size: int, digest: str | None = None, kind: str = WORDPIECE.kind
) -> Path:
    """Return the word pieces beside a checkpoint, else what `find_vocabulary` does for `size` and `kind`.

    The file beside it may belong to something else. Raises InputError where the checkpoint records another
    `digest`, and where it records none, but a vocabulary of that size is known and this is another.
    """
    beside = None if checkpoint is None or kind != WORDPIECE.kind else checkpoint.parent / VOCABULARY
    path = beside if beside is not None and beside.is_file() else find_vocabulary(size, kind)
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
    whose = {BERT_PIECES: "bert-base-uncased's", 2048: "the demo's"}.get(size)
    if whose is None:
        log.warning("%s: taken as the network's vocabulary; no known one has its %d pieces", beside, size)
    elif vocabulary_digest(beside) != vocabulary_digest(find_vocabulary(size)):
        raise InputError(
            f"{beside}: expected {whose} {size} word pieces, got others; give --vocab {beside} if the "
            "network was trained with it, else move it away"
        )


def vocabulary_digest(vocabulary: Path) -> str:
    """SHA-256 (hexadecimal) of the pieces, one a line, whatever the layout and the line ends of the file.

    After byte pairs follow an empty line and the merges, one a line.
    """
    if are_byte_pairs(vocabulary):
        return sha256_of(read_byte_pairs(vocabulary).lines().encode())
    return sha256_of("".join(f"{piece}\n" for piece in _read_pieces(vocabulary)).encode())


def count_pieces(vocabulary: Path) -> int:
    """Number of pieces in a vocabulary of either kind; raises InputError where it cannot be read."""
    if are_byte_pairs(vocabulary):
        return len(read_byte_pairs(vocabulary).pieces)
    return len(_read_pieces(vocabulary))


def _read_pieces(vocabulary: Path) -> list[str]:
    try:
        return vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{vocabulary}: expected a vocabulary with one word piece a line: {error}"
        ) from error


def build_tokenizer(vocabulary: Path, size: int, kind: str = WORDPIECE.kind) -> Tokenizer:
    """Build the tokenizer of a vocabulary with `size` pieces: uncased WordPiece, or byte pairs ("byte_bpe").

    Word pieces are in a file, one a line; byte pairs where `dgm4.byte_pairs` reads them. Raises InputError
    where the vocabulary is unreadable, of the other kind, has another size, or lacks a special token.
    """
    if kind == BYTE_BPE.kind:
        pairs = read_byte_pairs(vocabulary)
        _check_size(vocabulary, size, len(pairs.pieces), kind)
        return byte_pair_tokenizer(pairs)
    pieces = _read_pieces(vocabulary)
    missing = [token for token in _SPECIAL if token not in pieces]
    _check_size(vocabulary, size, len(pieces), kind, missing)
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def _check_size(vocabulary: Path, size: int, found: int, kind: str, missing: Sequence[str] = ()) -> None:
    if found != size or missing:
        lacks = f", without {', '.join(missing)}" if missing else ""
        raise InputError(
            f"{vocabulary}: expected {size} {_CALLED[kind]}, got {found}{lacks}; give the vocabulary that "
            "the network was trained with (--vocab)"
        )
