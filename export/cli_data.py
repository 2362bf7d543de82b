"""`dgm4 data`: the sample set."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm


def make(options: argparse.Namespace) -> int:
    """Write the sample set; stdout tells how many pairs of each class there are."""
    from dgm4.data.make import make_sample_set

    with tqdm(total=options.pairs, unit="pair", file=sys.stderr, disable=None) as bar:
        counts = make_sample_set(options.out, options.pairs, options.seed, bar.update)
    sys.stdout.write(json.dumps({"out": str(options.out), "counts": counts}) + "\n")
    return 0


def vocabulary(options: argparse.Namespace) -> int:
    """Write a small vocabulary for the captions and side-cars of a data folder, one word piece a line."""
    from dgm4.data.annotations import read_split
    from dgm4.data.dataset import read_sidecar
    from dgm4.data.pieces import small_vocabulary
    from export.tokenizer import build_tokenizer, count_pieces, find_vocabulary

    large = options.vocab or find_vocabulary()
    tokenizer = build_tokenizer(large, count_pieces(large))
    texts = [sample.text for sample in read_split(options.data, "train", check_pictures=False).samples]
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
