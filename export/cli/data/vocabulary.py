"""`dgm4 data vocabulary`: choose a small vocabulary for a data folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from export.cli.arguments import Verbs
from export.cli.parser import usage_errors
from export.flags import POSITIVE
from export.output import check_output, write_whole


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4 data`."""
    parser = verbs.add_parser(
        "vocabulary",
        help="choose a small vocabulary for a data folder",
        description="Choose the word pieces that the captions and side-cars of a data folder need.",
        epilog="examples:\n  dgm4 data vocabulary --data DGM4 --out vocab.txt --size 4096",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", type=POSITIVE, default=2048, metavar="N", help="pieces (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="large vocabulary; bert-base-uncased's")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Write the vocabulary, one word piece a line; stdout tells what was written."""
    from dgm4.data.annotations import read_split
    from dgm4.data.dataset import read_sidecar
    from dgm4.data.pieces import check_size, small_vocabulary
    from dgm4.tokenizer import build_tokenizer, count_pieces, find_vocabulary

    check_output(options.out, "--out", [options.data, options.vocab])
    large = options.vocab or find_vocabulary()
    tokenizer = build_tokenizer(large, count_pieces(large))
    annotations = read_split(options.data, "train", check_pictures=False)
    texts = [sample.text for sample in annotations.usable(f"{options.data}, split train")]
    for path in sorted((options.data / "metadata").glob("*s.json")):
        if path.stem in ("captions", "explanations"):
            texts += read_sidecar(path).values()
    known = large.read_text(encoding="utf-8").splitlines()
    with usage_errors(options.parser):
        check_size(options.size, known)
    pieces = small_vocabulary(
        known, texts, lambda text: tokenizer.encode(text, add_special_tokens=False).tokens, options.size
    )
    write_whole(options.out, ("\n".join(pieces) + "\n").encode(), "--out")
    record = {"out": str(options.out), "pieces": len(pieces), "texts": len(texts), "of": str(large)}
    sys.stdout.write(json.dumps(record) + "\n")
    return 0
