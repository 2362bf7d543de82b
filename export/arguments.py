"""Types of command-line values, and verbs whose code is imported when they are called."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

Verb = Callable[[argparse.Namespace], int]


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Integers from 1 with commas between them, each once, in rising order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1, as 1,8,32, got {text!r}")
    return tuple(sorted(set(map(int, parts))))


def seconds(text: str) -> float:
    """A number of seconds above 0, a day at most."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, a day at most, got {text!r}")
    return value


def verb(module: str, function: str) -> Verb:
    """A verb whose code is imported when it is called, since most verbs do not need torch."""

    def run(options: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(module), function)(options)
        return code

    return run
