"""`dgm4 data vocabulary`: choose a small vocabulary for a data folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import InputError
from export.cli.arguments import Verbs
from export.flags import POSITIVE


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4 data`."""
    parser = verbs.add_parser("vocabulary", help="choose a small vocabulary for a data folder")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", type=POSITIVE, default=2048, metavar="N", help="pieces (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="large vocabulary; bert-base-uncased's")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Write the vocabulary of the folder's captions and side-cars, one word piece a line."""
    from dgm4.data.annotations import read_split
    from dgm4.data.dataset import read_sidecar
    from dgm4.data.pieces import small_vocabulary
    from dgm4.tokenizer import build_tokenizer, count_pieces, find_vocabulary

    if not options.out.resolve().parent.is_dir():
        raise InputError(f"{options.out}: its folder does not exist; create it, or choose another --out")
    large = options.vocab or find_vocabulary()
    tokenizer = build_tokenizer(large, count_pieces(large))
    annotations = read_split(options.data, "train", check_pictures=False)
    texts = [sample.text for sample in annotations.usable(f"{options.data}, split train")]
    for path in sorted((options.data / "metadata").glob("*s.json")):
        if path.stem in ("captions", "explanations"):
            texts += read_sidecar(path).values()
    pieces = small_vocabulary(
        large.read_text(encoding="utf-8").splitlines(),
        texts,
        lambda text: tokenizer.encode(text, add_special_tokens=False).tokens,
        options.size,
    )
    options.out.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return 0
