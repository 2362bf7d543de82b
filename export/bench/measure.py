"""Measure how fast the backends of this machine serve a bundle: `dgm4 bench`.

A call is `Predictor.predict_batch` of one batch of decoded images with their captions, or `predict` of a
single pair, one call after another, in a separate process for each backend (`export.bench.process`). Backends
take turns, so that a drift of the machine affects all alike; the first call of a turn finds another one's
data in the caches and is not counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from engine import Bundle
from engine.backends import known
from engine.errors import BackendError, Dgm4Error, EngineMismatchError, InputError
from engine.inputs.text import CaptionTokenizer
from export.bench.machine import describe_machine
from export.bench.process import PICTURE, Call, Server

BATCHES = (1, 8, 32)
TURNS = 5
SHARES = (50, 95, 99)
_LETTER = "q"  # a word of it has more pieces the longer it is
_LONGEST_WORD = 60

Report = Callable[[str, int], None]
Candidate = tuple[str, int | None]  # a backend and its number of threads


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: `backends` empty for all, `batches` empty for those of BATCHES that the bundle takes.

    `tokens` are those of every caption, [CLS] included; `seconds` is the time of one backend at one batch,
    without warm-up; `threads` and `device` as for Predictor. Each backend is measured with each of `counts`
    in place of `threads`, where there are any.
    """

    backends: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    tokens: int = 24
    seconds: float = 3.0
    threads: int | None = None
    device: str = "auto"
    counts: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Row:
    """One backend at one batch: percentiles in milliseconds a call, by part; pairs a second.

    `threads` is the number asked for. `pairs_per_s` is end to end, `model_pairs_per_s` counts the time of
    inference alone.
    """

    backend: str
    device: str
    threads: int | None
    batch: int
    calls: int
    total: dict[str, float]
    preprocess: dict[str, float]
    inference: dict[str, float]
    postprocess: dict[str, float]
    pairs_per_s: float
    model_pairs_per_s: float


@dataclass
class Bench:
    """All that was measured, and why the other backends were not.

    `absent` are backends that were not asked for and do not serve this bundle here, with the reason;
    `failed` the errors of those that were asked for, or that broke off.
    """

    bundle: str
    model: dict[str, str]
    options: BenchOptions
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, Dgm4Error] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            **asdict(self),
            "picture": list(PICTURE),
            "turns": TURNS,
            "failed": {name: str(error) for name, error in self.failed.items()},
        }


def bench(bundle: Bundle, options: BenchOptions, report: Report = lambda name, batch: None) -> Bench:
    """Measure; `report` hears of every turn as (backend, batch).

    Raises InputError as `check_options` does, BackendError where no backend serves the bundle, and what the
    bundle's files raise.
    """
    check_options(bundle, options)
    caption = make_caption(bundle, options.tokens)
    batches = batches_of(bundle, options)
    info = bundle.manifest.model
    model = {"name": info.name, "size": info.size, "precision": bundle.manifest.precision}
    result = Bench(str(bundle.path), model, options, describe_machine())
    with ExitStack() as stack:
        loaded = _load(bundle, result, stack)
        for batch in batches:
            result.rows += _measure(loaded, batch, caption, result, report)
    if not result.rows:
        raise _failure("nothing was measured", result)
    return result


def check_options(bundle: Bundle, options: BenchOptions) -> None:
    """Raise InputError for batches or tokens outside the bundle's limits."""
    largest, asked, spec = bundle.manifest.limits.max_batch, options.batches, bundle.manifest.preprocess
    if asked and max(asked) > largest:
        raise InputError(f"batch: expected at most {largest}, the bundle's limit, got {max(asked)}")
    if not spec.min_tokens <= options.tokens <= spec.max_tokens:
        raise InputError(
            f"tokens: expected {spec.min_tokens} to {spec.max_tokens}, the bundle's limits, "
            f"got {options.tokens}"
        )


def batches_of(bundle: Bundle, options: BenchOptions) -> list[int]:
    """The batches that will be measured."""
    return [n for n in options.batches or BATCHES if n <= bundle.manifest.limits.max_batch]


def make_caption(bundle: Bundle, tokens: int) -> str:
    """A caption that the bundle's tokenizer reads as `tokens` tokens, [CLS] included; raises InputError.

    Its words are made of one letter each: how many pieces a word has depends on the vocabulary.
    """
    spec = bundle.manifest.preprocess
    tokenizer = CaptionTokenizer.of(bundle)
    words: list[str] = []
    left, places = tokens - 1, min(tokens - 1, spec.max_words)
    lengths = {len(tokenizer(_LETTER * n)[1].ids) - 1: _LETTER * n for n in range(_LONGEST_WORD, 0, -1)}
    while left and places:
        pieces = max((n for n in lengths if n <= math.ceil(left / places)), default=0)
        words.append(lengths.get(pieces, ""))
        left, places = left - pieces, places - 1
    caption = " ".join(words)
    count = len(tokenizer(caption)[1].ids)
    if count != tokens:
        raise InputError(f"tokens: no caption of {tokens} tokens exists in this vocabulary; try {count}")
    return caption


def label(backend: str, threads: int | None) -> str:
    """What a backend with a number of threads is called."""
    return backend if threads is None else f"{backend}, {threads} thread{'s' * (threads > 1)}"


def _load(bundle: Bundle, result: Bench, stack: ExitStack) -> dict[Candidate, Server]:
    """A process for each backend that serves the bundle here; the reasons of the others go to `result`."""
    options, loaded = result.options, {}
    counts = options.counts or (options.threads,)
    for name, threads in itertools.product(options.backends or known(), counts):
        try:
            server = Server(bundle.path, name, options.device, threads)
        except Dgm4Error as error:
            if options.backends or not isinstance(error, (BackendError, EngineMismatchError)):
                result.failed[name] = error
            else:
                result.absent[name] = str(error)
        else:
            stack.callback(server.close)
            loaded[name, threads] = server
    if not loaded:
        raise _failure("no backend here serves this bundle", result)
    return loaded


def _failure(what: str, result: Bench) -> Dgm4Error:
    """The error of a run without figures, of the kind of the first backend's that failed."""
    reasons = {**result.failed, **result.absent}
    kind = next((type(error) for error in result.failed.values()), BackendError)
    return kind("; ".join([what, *(f"{name}: {reason}" for name, reason in reasons.items())]))


def _measure(
    loaded: dict[Candidate, Server], batch: int, caption: str, result: Bench, report: Report
) -> Iterator[Row]:
    """One row a backend for this batch; a backend that fails leaves `loaded`, its error goes to `result`."""
    calls: dict[Candidate, list[Call]] = {one: [] for one in loaded}
    for turn in range(TURNS):
        for one in _rotate(list(loaded), turn):
            report(one[0], batch)
            try:
                if turn == 0:
                    loaded[one].warm_up(batch, result.options.tokens)
                calls[one] += loaded[one].turn(batch, caption, result.options.seconds / TURNS)
            except Dgm4Error as error:
                result.failed[one[0]] = type(error)(f"batch {batch}: {error}")
                loaded.pop(one).close()
    for one, server in loaded.items():
        yield _row(server.model, one[1], batch, calls[one])


def _rotate(names: list[Candidate], turn: int) -> list[Candidate]:
    """The names from another one on in every turn: who comes after whom should not matter."""
    start = turn % len(names) if names else 0
    return names[start:] + names[:start]


def _row(model: Mapping[str, str], threads: int | None, batch: int, calls: Sequence[Call]) -> Row:
    parts = {name: [getattr(call, name) for call in calls] for name in Call._fields}
    pairs = 1e3 * batch * len(calls)
    return Row(
        backend=model["backend"],
        device=model["device"],
        threads=threads,
        batch=batch,
        calls=len(calls),
        **{name: percentiles(values) for name, values in parts.items()},
        pairs_per_s=round(pairs / sum(parts["total"]), 2),
        model_pairs_per_s=round(pairs / sum(parts["inference"]), 2),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 by nearest rank: the smallest value that no less than that share lies at or below."""
    ranked = sorted(values)
    return {f"p{s}": round(ranked[math.ceil(len(ranked) * s / 100) - 1], 3) for s in SHARES}
