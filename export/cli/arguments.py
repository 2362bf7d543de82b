"""Types of command-line values, and verbs whose code is imported when they are called."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")

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


def backend(text: str) -> str:
    """The name of a backend, installed or not, or auto."""
    from engine.backends import known

    if text not in ("auto", *known()):
        raise argparse.ArgumentTypeError(f"expected auto or one of {', '.join(known())}, got {text!r}")
    return text


def device(text: str) -> str:
    """Where a backend runs."""
    if _DEVICE.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def kept_layers(text: str) -> int | str:
    """A number of layers, or "auto"."""
    return text if text == "auto" else whole(text)


def smoothing(text: str) -> float | str:
    """Off, auto, or a number from 0 to 1."""
    if text in ("off", "auto"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected off, auto or a number from 0 to 1, got {text!r}")
    return value


def verb(module: str, function: str) -> Verb:
    """A verb whose code is imported when it is called, since most verbs do not need torch."""

    def run(options: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(module), function)(options)
        return code

    return run


def as_option(message: str) -> str:
    """A message that begins with the name of a field, as the command line calls it."""
    name, colon, rest = message.partition(":")
    return f"--{name.replace('_', '-')}{colon}{rest}" if name.isidentifier() else message


def export_usage(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments of export taken together, or None."""
    if options.calibration and options.precision not in ("int8", "fp8"):
        return "--calibration is for --precision int8 or fp8"
    if not options.calibration and (options.calibration_method, options.calibration_pairs) != ("minmax", 512):
        return "--calibration-method and --calibration-pairs say how --calibration DIR is read: give that too"
    if not options.calibration and options.smooth != "off":
        return "--smooth looks at the pairs of --calibration DIR: give that too"
    if options.data is None and options.split != "test":
        return "--split is of the data to judge on: give --data DIR too"
    if options.target and options.precision == "fp8" and not options.calibration:
        return "--target: an engine in fp8 needs calibrated scales: give --calibration DIR too"
    if options.target is None and _says_how_to_build(options):
        return "--profiles and what else says how the engine is built need one: leave out --target none"
    if options.triton_repository and options.precision in ("bf16", "fp8"):
        return "--triton-repository is for a precision with an ONNX graph: fp32, fp16 or int8"
    return None


def _says_how_to_build(options: argparse.Namespace) -> bool:
    given = (options.profiles, options.workspace, options.hardware_compatible)
    return any(given) or options.strip_weights or options.version_compatible
