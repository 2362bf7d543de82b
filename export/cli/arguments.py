"""Arguments that several verbs share, and the types of their values."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TypeAlias

from engine import Bundle
from engine.backends import known, takes, usable_cores
from engine.errors import did_you_mean, quoted
from engine.inputs.options import DECODES
from engine.scores import DECISIONS, GROUP
from export.cli.parser import Parser
from export.flags import POSITIVE, Number

Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"

_COUNT = re.compile(r"[1-9]\d{0,8}", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 with commas between them, each once, in rising order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(_COUNT.fullmatch(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1, as 1,8,32, got {quoted(text)}")
    return tuple(sorted(set(map(int, parts))))


def backend(text: str) -> str:
    """The name of a backend, installed or not, or auto."""
    return text if text == "auto" else backend_name(text, "auto or ")


def backend_name(text: str, more: str = "") -> str:
    """The name of a backend, installed or not."""
    if text not in known():
        raise argparse.ArgumentTypeError(
            f"expected {more}one of {', '.join(known())}, got {quoted(text)}{did_you_mean(text, known())}"
        )
    return text


def threads(text: str) -> int:
    """A number of this machine's cores."""
    cores = usable_cores()
    return int(Number(f"1 to {cores} threads, the usable cores", int, 1, cores)(text))


def device(text: str) -> str:
    """Where a backend runs."""
    if _DEVICE.fullmatch(text) is None:
        hint = did_you_mean(text, ("auto", "cpu", "cuda"))
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {quoted(text)}{hint}")
    return text


def threshold(text: str) -> tuple[str, float]:
    """A threshold and what it is of: NAME=P, or P for the verdict."""
    name, _, number = text.rpartition("=")
    name = name or DECISIONS[0]
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    names = (*DECISIONS, GROUP)
    if name not in names or not 0 <= value <= 1:
        expected = f"P or NAME=P with P from 0 to 1 and NAME one of {', '.join(names)}"
        hint = "" if name in names else did_you_mean(name, names)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {quoted(text)}{hint}")
    return name, value


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """Add --threshold, which may be given several times: `dict(options.thresholds)`."""
    parser.add_argument(
        "--threshold",
        dest="thresholds",
        type=threshold,
        action="append",
        default=[],
        metavar="[NAME=]P",
        help=f"score from which a pair is manipulated, or NAME is: {', '.join(DECISIONS[1:])}, or "
        f"{GROUP} for all four",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Add --decode."""
    parser.add_argument(
        "--decode",
        choices=DECODES,
        default=DECODES[0],
        help="fast reads a large JPEG at a part of its size (%(default)s)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:N or auto (%(default)s)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    parser.add_argument("--threads", type=threads, metavar="N", help="CPU threads; all cores by default")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add --backend, --device and --threads."""
    parser.add_argument(
        "--backend",
        type=backend,
        default="auto",
        metavar="NAME",
        help="as dgm4 doctor lists them (%(default)s)",
    )
    add_device(parser)
    add_threads(parser)


def check_device(options: argparse.Namespace) -> None:
    """Stop with an error of usage where --backend runs on another kind of device than --device."""
    given = getattr(options, "backend", ())
    device = getattr(options, "device", "auto")
    for name in [given] if isinstance(given, str) else given:
        if not takes(name, device):
            other = "cpu" if device.startswith("cuda") else "cuda"
            reason = f"the backend {name} runs on {other}; leave out one of --device and --backend"
            options.parser.error(f"--device {device}: {reason}")


def check_batch(options: argparse.Namespace) -> None:
    """Stop with an error of usage where --batch is above the limit of the bundle."""
    if options.batch is None:
        return
    most = Bundle.open(options.bundle).manifest.limits.max_batch
    if options.batch > most:
        options.parser.error(f"--batch: expected at most {most}, the bundle's limit, got {options.batch}")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add --data, which must be given."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="DGM4 folder, as published")


def add_annotated(parser: argparse.ArgumentParser, split: str) -> None:
    """Add what runs a bundle on annotated pairs: the data and its `split`, the backend, the report's form."""
    add = parser.add_argument
    add("bundle", type=Path)
    add_data(parser)
    add("--split", choices=("train", "val", "test"), default=split, help="(%(default)s)")
    add_backend(parser)
    add("--batch", type=POSITIVE, metavar="N", help="pairs a run; 32 or the bundle's largest")
    add(
        "--on-bad",
        choices=("skip", "raise"),
        default="skip",
        help="what an unusable record does (%(default)s)",
    )
    add("--json", action="store_true", help="print one JSON report instead of a table")
