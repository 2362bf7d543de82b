"""`dgm4 predict`: one pair or a JSON-lines list in, JSON lines or one HTML page out."""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import os
import secrets
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from tqdm import tqdm

from engine import Prediction, Predictor
from engine.errors import Dgm4Error, InputError

_BAD_INPUT = 1
_PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dgm4 predict</title></head><body>
"""
_PAGE_TAIL = "</body></html>\n"


def run(options: argparse.Namespace) -> int:
    """Judge the pairs; exit code 1 if any of them failed."""
    _check(options)
    single = options.list is None
    with contextlib.ExitStack() as stack:
        lines = [] if single else stack.enter_context(_open_list(options.list))
        predictor = stack.enter_context(
            Predictor(
                options.bundle,
                backend=options.backend,
                device=options.device,
                threads=options.threads,
                thumbnail=1024 if options.html or options.plot else 0,
            )
        )
        out = stack.enter_context(_open_output(options.out))
        if single:
            answer = predictor.predict(options.image, options.caption)
            _write(out, options, [(options.image, answer)])
            if options.plot:
                answer.plot(options.plot)
            return 0
        return _judge_list(predictor, lines, out, options)


def _check(options: argparse.Namespace) -> None:
    """Raise InputError where the arguments name no input or two."""
    pair = options.image is not None and options.caption is not None
    if pair == (options.list is not None) or (options.image is not None and options.caption is None):
        raise InputError("predict: expected IMAGE and CAPTION, or --list FILE")
    if options.batch < 1:
        raise InputError(f"--batch: expected at least 1, got {options.batch}")
    if options.plot and options.list:
        raise InputError("--plot draws a single pair; use --html for a list")


class _Reader:
    """Pairs of a list for `Predictor.stream`, with the name of each and what was wrong with its line."""

    def __init__(self, lines: Iterable[str], base: Path) -> None:
        self.lines, self.base = lines, base
        self.pending: deque[tuple[str, InputError | None]] = deque()

    def __iter__(self) -> Iterator[object]:
        for number, line in enumerate(self.lines, start=1):
            if not line.strip():
                continue
            try:
                name, caption = _parse(line, number)
            except InputError as error:
                self.pending.append((f"line {number}", error))
                yield None  # no pair: the predictor answers with an error, in its place
            else:
                self.pending.append((name, None))
                yield self.base / name, caption


def _judge_list(predictor: Predictor, lines: Iterable[str], out: IO[str], options: argparse.Namespace) -> int:
    """Stream the list through the predictor, one record a line, in order."""
    reader = _Reader(lines, Path.cwd() if str(options.list) == "-" else options.list.parent)
    failed = done = 0

    def answers() -> Iterator[tuple[str, Prediction | Dgm4Error]]:
        nonlocal failed, done
        pairs = cast(Iterable[Any], reader)
        stream = predictor.stream(pairs, batch_size=options.batch, on_error="return")
        for answer in tqdm(stream, unit="pair", disable=not sys.stderr.isatty()):
            name, wrong = reader.pending.popleft()
            found = wrong or answer
            failed += isinstance(found, Dgm4Error)
            done += 1
            yield name, found

    _write(out, options, answers())
    if failed:
        sys.stderr.write(f"dgm4: {failed} of {done} pairs failed; their lines hold the error\n")
    return _BAD_INPUT if failed else 0


def _parse(line: str, number: int) -> tuple[str, str]:
    """Read one line of a list; raises InputError naming its number."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"line {number} of the list: expected JSON, got {line.strip()[:60]!r}") from error
    caption = record.get("caption", record.get("text")) if isinstance(record, dict) else None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("image"), str)
        or not isinstance(caption, str)
    ):
        raise InputError(
            f'line {number} of the list: expected {{"image": path, "caption": text}}, got {line[:60]!r}'
        )
    return record["image"], caption


def _write(
    out: IO[str], options: argparse.Namespace, answers: Iterable[tuple[str, Prediction | Dgm4Error]]
) -> None:
    """Write each answer as it comes."""
    if options.html:
        out.write(_PAGE_HEAD)
    for name, answer in answers:
        out.write(_fragment(name, answer) if options.html else _json_line(name, answer, options.heatmap))
    if options.html:
        out.write(_PAGE_TAIL)


def _json_line(name: str, answer: Prediction | Dgm4Error, heatmap: bool) -> str:
    record: dict[str, Any] = {"image": name}
    if isinstance(answer, Prediction):
        record |= answer.to_dict(heatmap)
    else:
        record |= {"error": str(answer), "kind": type(answer).__name__}
    return json.dumps(record, allow_nan=False) + "\n"


def _fragment(name: str, answer: Prediction | Dgm4Error) -> str:
    heading = f"<h2>{html.escape(name)}</h2>\n"
    if isinstance(answer, Prediction):
        return heading + answer.to_html()
    return f"{heading}<p>{html.escape(str(answer))}</p>\n"


@contextlib.contextmanager
def _open_list(path: Path) -> Iterator[Iterable[str]]:
    """Open the list; raises InputError where it cannot be read as UTF-8."""
    try:
        if str(path) == "-":
            yield sys.stdin
        else:
            with path.open(encoding="utf-8-sig") as file:
                yield file
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot read the list: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a JSON-lines list in UTF-8: {error}") from error


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[IO[str]]:
    """stdout, or a file that appears whole or not at all."""
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
