"""`dgm4 data describe`: write ASAP's side-cars of a data folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dgm4.places import check_data
from engine.progress import progress_bar
from export.cli.arguments import Verbs, add_data, add_device
from export.flags import POSITIVE
from export.writing import writing


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4 data`."""
    parser = verbs.add_parser(
        "describe",
        help="write the texts that ASAP trains with",
        description="Write DIR/metadata/captions.json and explanations.json with local models of the "
        "transformers library; nothing is downloaded. Texts that are there already are kept.",
        epilog="Without --instructor only captions.json is written, without --captioner only "
        "explanations.json; images without a caption are then explained by their news caption alone. "
        "One run at a time may write a folder."
        "\n\nexamples:\n  dgm4 data describe --data DGM4 --captioner blip/ --instructor flan-t5/",
    )
    add_data(parser)
    parser.add_argument(
        "--captioner", type=Path, metavar="DIR", help="model that captions an image: BLIP, GIT, LLaVA, ..."
    )
    parser.add_argument(
        "--instructor", type=Path, metavar="DIR", help="language model that follows instructions, T5 included"
    )
    parser.add_argument("--split", nargs="+", choices=("train", "val", "test"), default=["train"])
    parser.add_argument("--batch", type=POSITIVE, default=8, metavar="N", help="pairs at once (%(default)s)")
    parser.add_argument("--limit", type=POSITIVE, metavar="N", help="only the first N images")
    add_device(parser)
    parser.add_argument("--redo", action="store_true", help="replace the texts that are there")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Write the side-cars; stdout tells what became of the images."""
    if not options.captioner and not options.instructor:
        options.parser.error("expected --captioner DIR, --instructor DIR or both")
    check_data(options.data)
    from dgm4.data import describe as library
    from dgm4.data.language import Captioner, Instructor

    _hush_transformers()
    samples = library.read_pictures(options.data, options.split, options.limit)
    pace = library.Pace(batch=options.batch, redo=options.redo)
    # A model that cannot be loaded should fail before the other one has worked for hours.
    captioner = Captioner(options.captioner, options.device) if options.captioner else None
    instructor = Instructor(options.instructor, options.device) if options.instructor else None
    record: dict[str, Any] = {"data": str(options.data), "pictures": len(samples)}
    with writing(options.data / "metadata", "--data"):
        if captioner:
            with progress_bar("captions", len(samples), "images", not options.quiet) as bar:
                done = library.write_captions(options.data, samples, captioner, pace, bar.update)
            record["captions"] = vars(done)
        if instructor:
            with progress_bar("explanations", len(samples), "images", not options.quiet) as bar:
                done = library.write_explanations(options.data, samples, instructor, pace, bar.update)
            record["explanations"] = vars(done)
    sys.stdout.write(json.dumps(record) + "\n")
    return 0


def _hush_transformers() -> None:
    """Keep transformers' own progress and advice out of stderr; its errors stay."""
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
