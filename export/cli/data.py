"""`dgm4 data`: the sample set, ASAP's side-cars, vocabularies."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tqdm import tqdm

from engine.errors import InputError


def make(options: argparse.Namespace) -> int:
    """Write the sample set; stdout tells how many pairs of each class there are."""
    from dgm4.data.make import make_sample_set

    with tqdm(total=options.pairs, unit="pair", file=sys.stderr, disable=None) as bar:
        counts = make_sample_set(options.out, options.pairs, options.seed, bar.update)
    sys.stdout.write(json.dumps({"out": str(options.out), "counts": counts}) + "\n")
    return 0


def describe(options: argparse.Namespace) -> int:
    """Write ASAP's side-cars of a data folder; stdout tells what became of its pictures."""
    from dgm4.data import describe as library
    from dgm4.data.language import Captioner, Instructor

    _hush_transformers()
    samples = library.read_pictures(options.data, options.split, options.limit)
    pace = library.Pace(batch=options.batch, redo=options.redo)
    # A model that cannot be loaded is to be known before the other one has worked for hours.
    captioner = Captioner(options.captioner, options.device) if options.captioner else None
    instructor = Instructor(options.instructor, options.device) if options.instructor else None
    found: dict[str, Any] = {"data": str(options.data), "pictures": len(samples)}
    if captioner:
        with _bar(len(samples), "captions") as bar:
            done = library.write_captions(options.data, samples, captioner, pace, bar.update)
        found["captions"] = vars(done)
    if instructor:
        with _bar(len(samples), "explanations") as bar:
            done = library.write_explanations(options.data, samples, instructor, pace, bar.update)
        found["explanations"] = vars(done)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _bar(total: int, name: str) -> Any:
    return tqdm(total=total, desc=name, unit="picture", file=sys.stderr, disable=None)


def _hush_transformers() -> None:
    """Keep transformers' own progress and advice out of stderr; its errors stay."""
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def vocabulary(options: argparse.Namespace) -> int:
    """Write a small vocabulary for the captions and side-cars of a data folder, one word piece a line."""
    from dgm4.data.annotations import read_split
    from dgm4.data.dataset import read_sidecar
    from dgm4.data.pieces import small_vocabulary
    from dgm4.tokenizer import build_tokenizer, count_pieces, find_vocabulary

    if not options.out.resolve().parent.is_dir():
        raise InputError(f"{options.out}: its folder does not exist; create it, or choose another --out")
    large = options.vocab or find_vocabulary()
    tokenizer = build_tokenizer(large, count_pieces(large))
    texts = [sample.text for sample in read_split(options.data, "train", check_pictures=False).samples]
    if not texts:
        raise InputError(f"{options.data}: the split 'train' holds no usable caption to count the words of")
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
