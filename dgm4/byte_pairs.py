"""Byte pairs, the vocabulary of GPT-2's and RoBERTa's tokenizers: their files, and the tokenizer of them.

A text is cut by GPT-2's pattern, its UTF-8 bytes are spelled with 256 printable characters, and pairs of
pieces are merged in the order of a list (Sennrich et al., arXiv:1508.07909). No text is unknown to it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engine.errors import InputError, quoted, why_no_json

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
VOCABULARY, MERGES, TOKENIZER = "vocab.json", "merges.txt", "tokenizer.json"
EXPECTED = f"byte pairs as RoBERTa's: {VOCABULARY} and {MERGES} in one folder, or {TOKENIZER}"


@dataclass(frozen=True)
class BytePairs:
    """Pieces by their ids, and the pairs of pieces to merge, the first ones first."""

    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    def lines(self) -> str:
        """Both as text: the pieces, an empty line, the merges."""
        return "".join(
            [*(f"{piece}\n" for piece in self.pieces), "\n", *(f"{a} {b}\n" for a, b in self.merges)]
        )


def are_byte_pairs(path: Path) -> bool:
    """Whether a path can only be that of byte pairs: a folder, or a file of theirs by its name."""
    return path.is_dir() or path.suffix == ".json" or path.name == MERGES


def read_byte_pairs(path: Path) -> BytePairs:
    """Read byte pairs from a folder, one of the two files with the other beside it, or a tokenizer's file.

    Raises InputError where they are missing, or no vocabulary for every text.
    """
    folder = path if path.is_dir() else path.parent
    apart = path.name in (VOCABULARY, MERGES) if path.is_file() else (folder / VOCABULARY).is_file()
    if apart:
        vocabulary, merges = folder / VOCABULARY, _read(folder / MERGES).split("\n")
        lines = [line for line in merges if line and not line.startswith("#version")]
        return _checked(vocabulary, _read_json(vocabulary), lines)
    whole = folder / TOKENIZER if path.is_dir() else path
    model = _read_json(whole).get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise InputError(f"{whole}: expected {EXPECTED}, got a model {quoted(kind)}")
    return _checked(whole, model.get("vocab"), model.get("merges"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected {EXPECTED}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected {EXPECTED}: {why_no_json(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected {EXPECTED}, got no object")
    return content


def _checked(path: Path, ids: Any, merges: Any) -> BytePairs:
    """Both parts of a vocabulary, of which every text can be spelled; `path` is what messages call it."""
    if not isinstance(ids, dict) or not _count_up(ids.values()):
        raise InputError(
            f"{path}: expected pieces with the ids from 0 on, each once; give the published file"
        )
    if not isinstance(merges, list):
        raise InputError(f"{path}: expected {EXPECTED}, got no list of merges")
    pairs = []
    for number, merge in enumerate(merges, 1):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str(first), str(second)] if {first, second, first + second} <= ids.keys():
                pairs.append((first, second))
            case other:
                raise InputError(
                    f"{path}: expected two pieces whose union is a piece as merge {number}, got "
                    f"{quoted(other)}; give the two files of one vocabulary"
                )
    needed = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    if missing := [piece for piece in needed if piece not in ids]:
        raise InputError(f"{path}: expected {EXPECTED}, without {', '.join(missing[:5])} among the pieces")
    return BytePairs(tuple(sorted(ids, key=ids.__getitem__)), tuple(pairs))


def _count_up(ids: Collection[Any]) -> bool:
    whole = [i for i in ids if type(i) is int]
    return sorted(whole) == list(range(len(ids)))


def byte_pair_tokenizer(pairs: BytePairs) -> Tokenizer:
    """Build the tokenizer as RoBERTa's: no space in front of the text, a space is part of the next piece."""
    ids = {piece: i for i, piece in enumerate(pairs.pieces)}
    tokenizer = Tokenizer(models.BPE(ids, list(pairs.merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
