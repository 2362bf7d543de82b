"""`dgm4 predict`: one pair or a JSON-lines list in, JSON lines or one HTML page out."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import html
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from tqdm import tqdm

from engine import Prediction, Predictor
from engine.errors import Dgm4Error, InputError
from engine.predictor import THUMBNAIL_SIDE
from engine.render import check_plot_path
from export.output import open_output

Record = dict[str, Any]

_BAD_INPUT = 1
_SHOWN = 60  # characters of a faulty line that a message repeats
_PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dgm4 predict</title></head><body>
"""
_PAGE_TAIL = "</body></html>\n"


def run(options: argparse.Namespace) -> int:
    """Judge the pairs; exit code 1 if any of them failed."""
    if options.plot:
        check_plot_path(options.plot)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(_open_list(options.list)) if options.list else None
        out = stack.enter_context(open_output(options.out, options.list))
        predictor = stack.enter_context(_predictor(options))
        if lines is not None:
            return _judge_list(predictor, lines, out, options)
        # The bytes as the shell gave them: with a locale that is not UTF-8, Python has misread them.
        answer = predictor.predict(options.image, os.fsencode(options.caption))
        _write(out, options, [({"image": options.image}, answer)])
        if options.plot:
            _plot(answer, options.plot)
        return 0


def _plot(answer: Prediction, path: Path) -> None:
    """Draw the answer; raises InputError where the picture cannot be written."""
    try:
        answer.plot(path)
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
        thresholds=None if options.threshold is None else {"manipulated": options.threshold},
    )


class _Reader:
    """Pairs of a list for `Predictor.stream`; keeps what each answer's record starts with.

    `pending` holds, for every pair that was handed over and not yet answered, the line's number, picture
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
                yield None  # no pair: the predictor answers with an error, in its place
            else:
                head: Record = {name: record[name] for name in ("image", "id") if name in record}
                self.pending.append(({"line": number, **head}, None))
                yield self.base / record["image"], record["caption"]


def _judge_list(
    predictor: Predictor, lines: Iterable[bytes], out: IO[str], options: argparse.Namespace
) -> int:
    """Stream the list through the predictor, one record a line, in order."""
    reader = _Reader(lines, Path.cwd() if str(options.list) == "-" else options.list.parent)
    failed = done = 0

    def answers() -> Iterator[tuple[Record, Prediction | Dgm4Error]]:
        nonlocal failed, done
        pairs = cast(Iterable[Any], reader)
        stream = predictor.stream(pairs, batch_size=options.batch, on_error="return")
        for answer in tqdm(stream, unit="pair", disable=not sys.stderr.isatty()):
            head, wrong = reader.pending.popleft()
            found = wrong or answer
            failed += isinstance(found, Dgm4Error)
            done += 1
            yield head, found

    _write(out, options, answers())
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
    out: IO[str], options: argparse.Namespace, answers: Iterable[tuple[Record, Prediction | Dgm4Error]]
) -> None:
    """Write each answer as it comes."""
    if options.html:
        out.write(_PAGE_HEAD)
    for head, answer in answers:
        out.write(_fragment(head, answer) if options.html else _json_line(head, answer, options.heatmap))
    if options.html:
        out.write(_PAGE_TAIL)


def _json_line(head: Record, answer: Prediction | Dgm4Error, heatmap: bool) -> str:
    if isinstance(answer, Prediction):
        body = answer.to_dict(heatmap)
    else:
        body = {"error": str(answer), "kind": type(answer).__name__}
    return json.dumps({**head, **body}, allow_nan=False) + "\n"


def _fragment(head: Record, answer: Prediction | Dgm4Error) -> str:
    name = head["image"] or f"line {head['line']}"
    heading = f"<h2>{html.escape(name)}</h2>\n"
    if isinstance(answer, Prediction):
        return heading + answer.to_html()
    return f"{heading}<p>{html.escape(str(answer))}</p>\n"


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
