"""`dgm4 evaluate`: the metrics of a bundle beside those of the float32 network, and the gate between them."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dgm4.places import check_checkpoint, check_data
from engine.bundle import Bundle
from engine.errors import NumericalError, VerificationError
from engine.logs import warn_once
from engine.packages import require
from export.cli.arguments import Verbs, add_annotated, add_decode, add_thresholds, check_batch
from export.flags import POSITIVE, read_options
from export.output import open_output

if TYPE_CHECKING:
    from export.evaluation.evaluate import Evaluation
    from export.evaluation.gate import Failures

log = logging.getLogger(__name__)

_NEEDED = ("jinja2", "sklearn")
_NEEDED_TO_COMPARE = ("torch", "safetensors")


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "evaluate",
        help="measure a bundle on annotated pairs",
        description="The task's metrics of a bundle, beside those of the float32 network on the same pairs.",
        epilog="With --gate, exit code 3 where AUC, mAP, IoUmean or text_F1 lies further from float32 than "
        "the precision may: 1 point for int8 and fp8, 0.2 for fp16 and bf16, 0.02 for fp32.\n\n"
        "examples:\n"
        "  dgm4 evaluate my-bundle --data DGM4 --gate\n"
        "  dgm4 evaluate my-bundle --data DGM4 --limit 1000 --html report.html",
    )
    add = parser.add_argument
    add_annotated(parser, "test")
    add("--limit", type=POSITIVE, metavar="N", help="draw N pairs of the split")
    add_decode(parser)
    add(
        "--reference",
        choices=("auto", "none"),
        default="auto",
        help="compare with float32 torch, or not (%(default)s)",
    )
    add_thresholds(parser)
    add("--checkpoint", type=Path, metavar="FILE", help="the reference's weights; else the bundle's own")
    add("--gate", action="store_true", help="fail where accuracy is lost")
    add("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    add("--html", type=Path, metavar="FILE", help="write a page with images too")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate and write the report; raises VerificationError where --gate was given and the gate failed."""
    if (wrong := _usage_error(options)) is not None:
        options.parser.error(wrong)
    check_batch(options)
    needed = _NEEDED if options.reference == "none" else (*_NEEDED, *_NEEDED_TO_COMPARE)
    require("dgm4 evaluate", *needed)
    check_data(options.data)
    if options.checkpoint is not None:
        check_checkpoint(options.checkpoint)
    bundle = Bundle.open(options.bundle)
    from export.evaluation.gate import find_failures
    from export.evaluation.page import write_page
    from export.evaluation.report import write_table

    html = open_output(options.html, [options.data], "--html") if options.html else contextlib.nullcontext()
    with open_output(options.out, [options.data]) as out:
        with html as page:  # nothing else is written in it, so that an error is the page's
            result = _evaluate(options, bundle)
            _report_problems(result)
            failures = find_failures(result)
            if page is not None:
                page.write(write_page(result, failures))
        out.write(_json(result, failures) if options.json else write_table(result, failures))
    if options.gate and failures:
        raise VerificationError(f"the accuracy gate failed: {'; '.join(map(str, failures))}")
    return 0


def _usage_error(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments taken together, or None."""
    if options.reference == "none" and (options.gate or options.checkpoint):
        return "--gate and --checkpoint need the reference that --reference none leaves out"
    if options.out and options.html and options.out.absolute() == options.html.absolute():
        return "--out and --html name the same file"
    return None


def _evaluate(options: argparse.Namespace, bundle: Bundle) -> Evaluation:
    from export.evaluation.evaluate import EvaluateOptions, evaluate

    reference = "required" if options.gate and options.reference == "auto" else options.reference
    settings = read_options(
        EvaluateOptions, options, reference=reference, thresholds=dict(options.thresholds)
    )
    if (warning := bundle.manifest.weights.warning) is not None:
        warn_once(log, warning)
    try:
        return evaluate(bundle, options.data, settings, progress=not options.quiet)
    except NumericalError as error:
        if options.gate:
            raise VerificationError(f"the accuracy gate failed: {error}") from error
        raise


def _json(result: Evaluation, failures: Failures) -> str:
    gate = None if failures is None else {"passed": not failures, "failures": [str(f) for f in failures]}
    return json.dumps({**result.to_dict(), "gate": gate}, allow_nan=False) + "\n"


def _report_problems(result: Evaluation) -> None:
    """Count on stderr what was left out."""
    if result.problems:
        kinds = ", ".join(f"{kind} {count}" for kind, count in result.problems.items())
        left_out = sum(result.problems.values())
        sys.stderr.write(
            f"dgm4: {left_out} bad records were left out ({kinds}); {result.pairs} pairs answered\n"
        )
