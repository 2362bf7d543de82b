"""`dgm4 bench`: latency and throughput of a bundle for every backend that serves it here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backends import serving
from engine.progress import progress_bar
from export.cli.arguments import Verbs, add_device, add_threads, backend_name, counts
from export.cli.parser import usage_errors
from export.flags import POSITIVE, SECONDS, read_options

if TYPE_CHECKING:
    from export.bench.measure import Bench
    from export.output import Rows

_HEAD = (
    *("backend", "device", "threads", "batch", "calls", "p50 ms", "p95 ms", "p99 ms", "pairs/s"),
    *("model p50", "p95", "p99", "model pairs/s", "preprocess", "postprocess"),
)


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "bench",
        help="measure how fast a bundle is served here",
        description="Latency percentiles and throughput of every backend that serves the bundle, end to end "
        "(decoded image and caption in, prediction out) and of the model alone, one call after another.",
        epilog="The backends take turns. Columns after 'model' are the time of inference alone, then the "
        "medians of what comes before and after it. With torch on a GPU the resize counts as inference.\n\n"
        "examples:\n"
        "  dgm4 bench my-bundle\n"
        "  dgm4 bench my-bundle --backend ort --backend torch --batch 1,32 --seconds 10\n"
        "  dgm4 bench my-bundle --choose",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--backend",
        action="append",
        type=backend_name,
        default=[],
        metavar="NAME",
        help="again for another; all that serve it",
    )
    parser.add_argument(
        "--batch", type=counts, default=(), metavar="N[,N]", help="batch sizes; 1,8,32 within its limit"
    )
    parser.add_argument(
        "--tokens", type=POSITIVE, default=24, metavar="N", help="tokens of a caption (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=SECONDS, default=3.0, metavar="S", help="for a backend at a batch (%(default)g)"
    )
    add_threads(parser)
    add_device(parser)
    parser.add_argument(
        "--choose",
        action="store_true",
        help="on the CPU, and have backend auto take the fastest for this bundle from now on (--batch 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON report instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Measure and write the figures; the exit code is that of the first backend that failed."""
    from engine import Bundle
    from engine.backends import choice
    from export.bench.choose import choose, thread_counts
    from export.bench.measure import TURNS, BenchOptions, batches_of, bench, check_options, label
    from export.output import open_output

    if options.choose and options.device not in ("auto", "cpu"):
        options.parser.error(f"--choose measures the CPU, not {options.device}: leave --device out")

    batches = options.batch or ((1,) if options.choose else ())
    backends = tuple(dict.fromkeys(options.backend))
    settings = read_options(BenchOptions, options, backends=backends, batches=batches, counts=())
    bundle = Bundle.open(options.bundle)
    with usage_errors(options.parser):
        check_options(bundle, settings)
    names = settings.backends or [name for name, need in serving(bundle).items() if need is None]
    turns = TURNS * len(batches_of(bundle, settings)) * len(names)
    turns *= len(thread_counts()) if options.choose and options.threads is None else 1
    with open_output(options.out) as out:
        with progress_bar("bench", turns, "turns", not options.quiet) as bar:

            def report(name: str, batch: int) -> None:
                bar.set_postfix_str(f"{name}, batch {batch}", refresh=False)
                bar.update()

            if options.choose:
                result, chosen = choose(bundle, settings, report)
                path = choice.write(chosen)
            else:
                result = bench(bundle, settings, report)
        record, text = result.to_dict(), table(result)
        if options.choose:
            record["choice"] = {**chosen.to_dict(), "path": str(path)}
            text += f"chosen: {label(chosen.backend, chosen.threads)}; recorded in {path}\n"
        out.write(json.dumps(record, allow_nan=False) + "\n" if options.json else text)
    for name, error in result.failed.items():
        sys.stderr.write(f"dgm4: {name} was not measured: {error}\n")
    return next((error.exit_code for error in result.failed.values()), 0)


def table(result: Bench) -> str:
    """The measurements as lines of text, milliseconds a call."""
    from export.bench.process import PICTURE
    from export.output import align

    machine, options = result.machine, result.options
    processor = machine["processor"].get("model name", machine["system"])
    lines = [
        f"{' '.join(result.model.values())}: {options.tokens} tokens, images of {PICTURE[0]} x {PICTURE[1]}",
        f"{processor}, {machine['cores']} cores, load {machine['load']:g} at the start",
        *machine["gpus"],
        "",
        *align(_rows(result), left=2),
    ]
    lines += [f"{name}: not measured: {reason}" for name, reason in result.absent.items()]
    return "\n".join(lines) + "\n"


def _rows(result: Bench) -> Rows:
    rows: Rows = [_HEAD]
    for row in result.rows:
        threads = str(row.threads or result.machine["cores"])
        head = (row.backend, row.device, threads, str(row.batch), str(row.calls))
        end_to_end, model = (
            [*(f"{part[name]:.1f}" for name in ("p50", "p95", "p99")), f"{rate:.1f}"]
            for part, rate in ((row.total, row.pairs_per_s), (row.inference, row.model_pairs_per_s))
        )
        rows.append(
            (*head, *end_to_end, *model, *(f"{p['p50']:.1f}" for p in (row.preprocess, row.postprocess)))
        )
    return rows
