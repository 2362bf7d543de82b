"""A small vocabulary: the word pieces that a data set needs, out of a large one."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from engine.errors import InputError
from engine.inputs.text import clean_caption

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = string.ascii_lowercase + string.digits
SPELLED = (*SPECIAL, *CHARACTERS, *(f"##{character}" for character in CHARACTERS))


def small_vocabulary(
    pieces: Sequence[str], captions: Iterable[str], split: Callable[[str], Sequence[str]], size: int
) -> list[str]:
    """Choose `size` of `pieces`, the large vocabulary in its own order, for `captions`.

    First the special tokens and every letter and digit, alone and as a continuation, so that any English
    word can be spelled; then what `split` makes of the cleaned captions, the most frequent first; then the
    large vocabulary in its own order, which in BERT's is by frequency. Raises InputError where `size` is
    too small for the first part, or larger than `pieces`.
    """
    check_size(size, pieces)
    known = set(pieces)
    missing = [piece for piece in SPELLED if piece not in known]
    if missing:
        raise InputError(f"the large vocabulary lacks {', '.join(missing[:5])}")
    counts = Counter(piece for text in captions for piece in split(clean_caption(text).text))
    used = [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    # Pieces without a letter are reserved places and foreign characters.
    common = [piece for piece in pieces if piece.removeprefix("##").isascii() and not piece.startswith("[")]
    ranked = dict.fromkeys([*SPELLED, *used, *common, *pieces])
    return list(ranked)[:size]


def check_size(size: int, pieces: Sequence[str]) -> None:
    """Raise InputError for a size that `small_vocabulary` cannot choose of the large vocabulary `pieces`."""
    if not len(SPELLED) <= size <= len(pieces):
        raise InputError(f"size: expected {len(SPELLED)} to {len(pieces)} word pieces, got {size}")
