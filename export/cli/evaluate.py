"""`dgm4 evaluate`: the metrics of a bundle beside those of the float32 network, and the gate between them."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from typing import TYPE_CHECKING

from engine.errors import BackendError, NumericalError, VerificationError
from export.output import open_output

if TYPE_CHECKING:
    from export.evaluation.evaluate import Evaluation
    from export.evaluation.gate import GateFailure

_NEEDED = ("torch", "safetensors")


def run(options: argparse.Namespace) -> int:
    """Evaluate and write the answer; raises VerificationError where --gate was given and the gate failed."""
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendError(
            f"evaluate needs {', '.join(missing)}: pip install -e '.[export]' in a clone of the project"
        )
    from export.evaluation.gate import check_gate
    from export.evaluation.report import write_page, write_table

    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open_output(options.out))
        page = stack.enter_context(open_output(options.html, None, "--html")) if options.html else None
        found = _evaluate(options)
        _report_problems(found)
        failures = None
        if found.comparison is not None:
            reference = found.comparison.scores.metrics
            failures = check_gate(found.model["precision"], found.scores.metrics, reference)
        out.write(_json(found, failures) if options.json else write_table(found, failures))
        if page is not None:
            page.write(write_page(found, failures))
    if options.gate and failures:
        raise VerificationError(f"the accuracy gate failed: {'; '.join(map(str, failures))}")
    return 0


def _evaluate(options: argparse.Namespace) -> Evaluation:
    from export.evaluation.evaluate import EvaluateOptions, evaluate

    settings = EvaluateOptions(
        split=options.split,
        limit=options.limit,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        batch=options.batch,
        reference="required" if options.gate and options.reference == "auto" else options.reference,
        checkpoint=options.checkpoint,
        on_bad=options.on_bad,
    )
    try:
        return evaluate(options.bundle, options.data, settings, progress=sys.stderr.isatty())
    except NumericalError as error:
        if options.gate:
            raise VerificationError(f"the accuracy gate failed: {error}") from error
        raise


def _json(found: Evaluation, failures: list[GateFailure] | None) -> str:
    gate = None if failures is None else {"passed": not failures, "failures": [str(f) for f in failures]}
    return json.dumps({**found.to_dict(), "gate": gate}, allow_nan=False) + "\n"


def _report_problems(found: Evaluation) -> None:
    """Count on stderr what was left out."""
    if found.problems:
        kinds = ", ".join(f"{kind} {count}" for kind, count in found.problems.items())
        left_out = sum(found.problems.values())
        sys.stderr.write(
            f"dgm4: {left_out} bad records were left out ({kinds}); {found.pairs} pairs answered\n"
        )
