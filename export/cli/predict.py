"""`dgm4 predict`: one pair or a JSON-lines list in, JSON lines or one HTML page out."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from engine import Prediction, Predictor
from engine.errors import Dgm4Error, InputError
from engine.markup import write_page
from engine.predictor import THUMBNAIL_SIDE
from engine.render import check_plot_path
from export.cli.arguments import Verbs, add_backend, add_thresholds
from export.flags import POSITIVE
from export.output import check_output, open_output

Record = dict[str, Any]

_BAD_INPUT = 1
_SHOWN = 60  # characters of a faulty line that a message repeats


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "predict",
        help="classify images with captions",
        description="Classify one pair (IMAGE CAPTION), or the pairs of a JSON-lines list.",
        epilog='A line of the list: {"image": "photo.jpg", "caption": "..."} ("text" does for "caption"; '
        "paths are relative to the list). A failed item gives a line with its error, and exit code 1.",
    )
    add = parser.add_argument
    add("bundle", type=Path)
    add("image", nargs="?", help="image file (JPEG, PNG, WebP, BMP, GIF)")
    add("caption", nargs="?")
    add("--list", type=Path, metavar="FILE", help="JSON-lines list of pairs; - for stdin")
    add("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    add("--html", action="store_true", help="write a page instead of JSON lines")
    add("--plot", type=Path, metavar="FILE", help="draw the prediction of a single pair")
    add("--heatmap", action="store_true", help="keep the heat map in the JSON lines")
    add("--batch", type=POSITIVE, default=8, metavar="N", help="pairs a run (%(default)s)")
    add_backend(parser)
    add("--rebuild", action="store_true", help="build an engine for this GPU if there is none")
    add_thresholds(parser)
    parser.set_defaults(run=run, parser=parser)


def _usage_error(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments taken together, or None."""
    given = options.image is not None, options.caption is not None, options.list is not None
    if given not in ((True, True, False), (False, False, True)):
        return "expected either IMAGE and CAPTION or --list FILE"
    if options.plot and options.list:
        return "--plot draws a single pair; use --html for a list"
    return None


def run(options: argparse.Namespace) -> int:
    """Predict the pairs; exit code 1 if any of them failed."""
    if (wrong := _usage_error(options)) is not None:
        options.parser.error(wrong)
    inputs = [options.list, None if options.image is None else Path(options.image)]
    if options.plot:
        check_plot_path(options.plot)
        check_output(options.plot, "--plot", inputs)
        if options.out is not None and options.out.absolute() == options.plot.absolute():
            raise InputError("--out and --plot name the same file; choose two")
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(_open_list(options.list)) if options.list else None
        out = stack.enter_context(open_output(options.out, inputs))
        predictor = stack.enter_context(_predictor(options))
        if lines is not None:
            return _predict_list(predictor, lines, out, options)
        # The bytes as the shell gave them: with a locale that is not UTF-8, Python has misread them.
        prediction = predictor.predict(options.image, os.fsencode(options.caption))
        _write(out, options, [({"image": options.image}, prediction)])
        if options.plot:
            _plot(prediction, options.plot)
        return 0


def _plot(prediction: Prediction, path: Path) -> None:
    """Draw the prediction; raises InputError where it cannot be written."""
    try:
        prediction.plot(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--plot {path}: cannot be written: {reason}; choose another place") from error


def _predictor(options: argparse.Namespace) -> Predictor:
    return Predictor(
        options.bundle,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        rebuild=options.rebuild,
        thumbnail=THUMBNAIL_SIDE if options.html or options.plot else 0,
        thresholds=dict(options.thresholds),
    )


class _Reader:
    """Pairs of a list for `Predictor.stream`; keeps what the record of each prediction starts with.

    `pending` holds, for every pair that was handed over and has no prediction yet, the line's number, image
    and id, and what was wrong with the line.
    """

    def __init__(self, lines: Iterable[bytes], base: Path) -> None:
        self.lines, self.base = lines, base
        self.pending: deque[tuple[Record, InputError | None]] = deque()

    def __iter__(self) -> Iterator[object]:
        for number, line in enumerate(self.lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = _parse(line, number)
            except InputError as error:
                self.pending.append(({"line": number, "image": None}, error))
                yield None  # no pair: the predictor returns an error in its place
            else:
                head: Record = {name: record[name] for name in ("image", "id") if name in record}
                self.pending.append(({"line": number, **head}, None))
                yield self.base / record["image"], record["caption"]


def _predict_list(
    predictor: Predictor, lines: Iterable[bytes], out: IO[str], options: argparse.Namespace
) -> int:
    """Stream the list through the predictor, one record a line, in order."""
    reader = _Reader(lines, Path.cwd() if str(options.list) == "-" else options.list.parent)
    failed = done = 0

    from tqdm import tqdm

    def predictions() -> Iterator[tuple[Record, Prediction | Dgm4Error]]:
        nonlocal failed, done
        pairs = cast(Iterable[Any], reader)
        stream = predictor.stream(pairs, batch_size=options.batch, on_error="return")
        for result in tqdm(stream, unit="pair", disable=not sys.stderr.isatty()):
            head, wrong = reader.pending.popleft()
            failed += isinstance(wrong or result, Dgm4Error)
            done += 1
            yield head, wrong or result

    _write(out, options, predictions())
    if failed:
        sys.stderr.write(f"dgm4: {failed} of {done} pairs failed; their lines hold the error\n")
    return _BAD_INPUT if failed else 0


def _parse(line: bytes, number: int) -> Record:
    """Read one line of a list: {"image", "caption", "id"?}; raises InputError naming its number."""
    shown = line.decode(errors="replace").strip()[:_SHOWN]
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or numbers and nesting past reason
        raise InputError(f"line {number} of the list: expected JSON in UTF-8, got {shown!r}") from error
    if isinstance(record, dict) and "caption" not in record:
        record["caption"] = record.get("text")
    if not isinstance(record, dict) or not all(isinstance(record.get(n), str) for n in ("image", "caption")):
        raise InputError(
            f'line {number} of the list: expected {{"image": path, "caption": text}}, got {shown!r}'
        )
    return record


def _write(
    out: IO[str], options: argparse.Namespace, results: Iterable[tuple[Record, Prediction | Dgm4Error]]
) -> None:
    """Write each prediction as it comes."""
    if options.html:
        named = ((head["image"] or f"line {head['line']}", result) for head, result in results)
        for part in write_page(named):
            out.write(part)
        return
    for head, result in results:
        out.write(_json_line(head, result, options.heatmap))


def _json_line(head: Record, result: Prediction | Dgm4Error, heatmap: bool) -> str:
    if isinstance(result, Prediction):
        body = result.to_dict(heatmap)
    else:
        body = {"error": str(result), "kind": type(result).__name__}
    return json.dumps({**head, **body}, allow_nan=False) + "\n"


@contextlib.contextmanager
def _open_list(path: Path) -> Iterator[Iterable[bytes]]:
    """Open the list; raises InputError where it cannot be read."""
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot read the list: {error.strerror}") from error
    with file:
        yield file
