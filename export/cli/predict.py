"""`dgm4 predict`: one pair or a list in; a summary, JSON lines or one HTML page out."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from engine import ImageOptions, Predictor
from engine.cards.markup import write_page
from engine.cards.render import check_plot_path
from engine.errors import Dgm4Error, InputError, quoted, shorten
from engine.inputs.boxes import box_of_text
from engine.inputs.sources import check_file
from engine.predictor import THUMBNAIL_SIDE
from engine.progress import progress_bar
from engine.registry import network_of
from engine.scoring.pairs import IMAGE_SUFFIXES, LIST_SUFFIXES, STDIN, PairList
from engine.scoring.records import Answer, Record, answers, json_line, line_record
from export.cli.answers import Answers, Maker
from export.cli.arguments import Verbs, add_backend, add_decode, add_thresholds, check_batch
from export.cli.plot import save_plot
from export.cli.summary import summary
from export.flags import POSITIVE
from export.output import check_output, open_output, printable
from export.writing import writing

_BAD_INPUT = 1
_BATCH = 8
_EPILOG = """
A list is JSON lines, a JSON array, CSV or Parquet with the columns image and caption; or a folder with
one of these as captions.jsonl, .json, .csv, .tsv or .txt, or with NAME.txt beside each image. Paths are
relative to the list. An image or a caption is judged alone beside null, an empty cell or an empty text file.
A pair may have its box, for a network that judges a given one: [x1, y1, x2, y2] in JSON and Parquet, four
numbers in a cell of a CSV.
A failed item gives a line with its error, and exit code 1.

With --list and --out the answers gather in FILE.partial, which becomes FILE at the end. A run that was
stopped goes on there with --resume, which keeps failed items too.

On a terminal the answers are summed up for reading; elsewhere, and with --json, each is a line of JSON.

examples:
  dgm4 predict my-bundle photo.jpg "What the caption says" --plot card.png
  dgm4 predict my-bundle --list pairs.csv --out answers.jsonl --resume
  dgm4 predict my-bundle --list photos/ --html --out page.html
"""


class _Sink(Protocol):
    """What answers are written to."""

    def write(self, text: str, /) -> object: ...


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "predict",
        help="classify images with captions",
        description="Classify one pair (IMAGE CAPTION), or the pairs of a list.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("bundle", type=Path)
    add("image", nargs="?", help="image file (JPEG, PNG, WebP, BMP, GIF); - for stdin")
    add("caption", nargs="?")
    add(
        "--box",
        action="append",  # to tell of a second one
        type=_box,
        metavar="X1,Y1,X2,Y2",
        help="for a network that judges a given box, where it is: pixels of the upright image",
    )
    add("--list", type=Path, metavar="FILE", help="list of pairs, or a folder of them; - for stdin")
    add("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    add("--resume", action="store_true", help="keep what a stopped run of the same list has answered")
    add("--json", action="store_true", help="JSON lines on a terminal too")
    add("--html", action="store_true", help="write a page instead of JSON lines")
    add("--plot", type=Path, metavar="FILE", help="draw the prediction of a single pair")
    add("--heatmap", action="store_true", help="keep the heat map in the JSON lines")
    add("--batch", type=POSITIVE, metavar="N", help=f"pairs a run; {_BATCH} or the bundle's largest")
    add_decode(parser)
    add_backend(parser)
    add(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="its owner must have signed the bundle; DGM4_PUBLIC_KEY",
    )
    add("--rebuild", action="store_true", help="build an engine for this GPU if there is none")
    add_thresholds(parser)
    parser.surplus = '; quote the caption: "A caption of several words"'
    parser.set_defaults(run=run, parser=parser)


def _box(text: str) -> list[float]:
    """X1,Y1,X2,Y2 as numbers; whether they fit the image the predictor checks."""
    try:
        return box_of_text(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X1,Y1,X2,Y2 in pixels, got {quoted(text)}") from None


def _usage_error(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments taken together, or None."""
    given = options.image is not None, options.caption is not None, options.list is not None
    if (form := _with_bundle(options)) is not None:
        return (
            f"BUNDLE is missing, {quoted(str(options.bundle))} is none: expected dgm4 predict {form}; "
            "demo:asap is a bundle that ships"
        )
    if given == (True, False, False) and Path(options.image).is_dir():
        return f"{options.image} is a folder: --list {options.image} answers the images in it"
    if given not in ((True, True, False), (False, False, True)):
        return "expected either IMAGE and CAPTION or --list FILE"
    if options.box and len(options.box) > 1:
        return f"--box is given {len(options.box)} times: expected one for a pair; a list has one for each"
    if options.box and options.list:
        return '--box is for a single pair; a list has them as "box"'
    if options.plot and options.list:
        return "--plot draws a single pair; use --html for a list"
    if options.html and options.json:
        return "--html and --json are two forms of the same answers: leave out one"
    if options.resume and (options.html or options.list is None or options.out is None):
        return "--resume is for JSON lines: it needs --list and --out, and goes without --html"
    return None


def _with_bundle(options: argparse.Namespace) -> str | None:
    """The arguments with BUNDLE before an image or a list that stands in its place; None where none does."""
    given, suffix = options.bundle, options.bundle.suffix.lower()
    if given.is_dir() or not (given == STDIN or suffix in (*IMAGE_SUFFIXES, *LIST_SUFFIXES)):
        return None
    if options.list is None and suffix not in LIST_SUFFIXES:
        caption = "CAPTION" if options.image is None else shlex.quote(shorten(options.image))
        return f"BUNDLE {shlex.quote(shorten(str(given)))} {caption}"
    return f"BUNDLE --list {shlex.quote(shorten(str(options.list or given)))}"


def run(options: argparse.Namespace) -> int:
    """Predict the pairs; exit code 1 if any of them failed."""
    if (wrong := _usage_error(options)) is not None:
        options.parser.error(wrong)
    check_batch(options)
    if options.list is not None:
        return _predict_list(options)
    image = None if options.image == str(STDIN) else Path(options.image)
    if options.plot:
        check_plot_path(options.plot)
        check_output(options.plot, "--plot", [image])
        if options.out is not None and options.out.absolute() == options.plot.absolute():
            raise InputError("--out and --plot name the same file; choose two")
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open_output(options.out, [image]))
        if image is not None:
            check_file(image, quoted(options.image), ImageOptions())  # before the network is loaded
        predictor = stack.enter_context(_predictor(options))
        if options.box is None and network_of(predictor.manifest.model.config).box is not None:
            options.parser.error(
                "--box X1,Y1,X2,Y2 is missing: this network judges a given box, in pixels of the upright "
                "image, as a face detector finds it"
            )
        # The bytes as the shell gave them: with a locale that is not UTF-8, Python has misread them.
        caption = os.fsencode(options.caption)
        picture = sys.stdin.buffer.read() if image is None else options.image
        prediction = predictor.predict(picture, caption, options.box and options.box[0])
        _write(out, options, [(options.image, {"image": options.image}, prediction)])
        if options.plot:
            save_plot(prediction, options.plot)
    return 0


def _predictor(options: argparse.Namespace) -> Predictor:
    return Predictor(
        options.bundle,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        rebuild=options.rebuild,
        image_options=ImageOptions(decode=options.decode),
        public_key=options.public_key,
        thumbnail=THUMBNAIL_SIDE if options.html or options.plot else 0,
        thresholds=dict(options.thresholds),
    )


def _predict_list(options: argparse.Namespace) -> int:
    """Stream the list through the predictor, one record a line, in order."""
    pairs = PairList(options.list)
    inputs = [] if options.list == STDIN or options.list.is_dir() else [options.list]
    if options.out is not None:
        check_output(options.out, "--out", inputs)
    total = pairs.count(options.out)
    failed = done = 0
    entries = iter(pairs)
    with contextlib.ExitStack() as stack:
        out: _Sink
        if options.out is None or options.html:
            out = stack.enter_context(open_output(options.out, inputs))
        else:
            stack.enter_context(writing(options.out, "--out"))
            out = stack.enter_context(Answers(options.out))
        predictor = stack.enter_context(_predictor(options))
        if options.resume and isinstance(out, Answers):
            done, failed = out.keep(entries, _maker(predictor))
        stream = answers(predictor, entries, pairs.base, options.batch or _BATCH)
        # Answers on a terminal show by themselves how far it is.
        shown = not options.quiet and (options.out is not None or not sys.stdout.isatty())
        bar = stack.enter_context(progress_bar("predict", total, "pairs", shown, initial=done))

        def predictions() -> Iterator[tuple[str, Record, Answer]]:
            nonlocal failed, done
            for entry, answer in stream:
                failed += isinstance(answer, Dgm4Error)
                done += 1
                bar.update()
                yield entry.name, entry.head(), answer

        _write(out, options, predictions())
    if failed:
        where = "cards" if options.html else "lines"
        again = "; leave out --resume to try them again" if options.resume else ""
        sys.stderr.write(f"dgm4: {failed} of {done} pairs failed; their {where} hold the error{again}\n")
    return _BAD_INPUT if failed else 0


def _maker(predictor: Predictor) -> Maker:
    """What answers of the same run have in common."""
    model = {name: predictor.model[name] for name in ("name", "size", "precision")}
    return {"model": model, "thresholds": vars(predictor.manifest.thresholds)}


def _write(out: _Sink, options: argparse.Namespace, results: Iterable[tuple[str, Record, Answer]]) -> None:
    """Write each prediction as it comes: its name, what its record begins with, and the result."""
    if options.html:
        for part in write_page((name, result) for name, _, result in results):
            out.write(part)
        return
    for name, head, result in results:
        out.write(_text(name, head, result, options))


def _text(name: str, head: Record, result: Answer, options: argparse.Namespace) -> str:
    """A prediction or an error for reading on a terminal, or as a line of JSON."""
    if options.json or options.out is not None or not sys.stdout.isatty():
        return json_line(line_record(head, result, options.heatmap))
    if isinstance(result, Dgm4Error):
        return printable(f"error: {result}") + "\n"
    return summary(name, result.to_dict(options.heatmap))
