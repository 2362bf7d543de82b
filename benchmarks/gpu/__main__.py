"""The proof on a GPU, in one command: `python -m benchmarks.gpu --out DIR [--resume FILE] [--minutes 9]`.

Runs the parts that DIR/gpu.json (or FILE, read first) does not hold yet, the most telling first, each in a
process of its own, and adds each to DIR/gpu.json as it ends: machine and rates; every kernel's output; every
kernel beside torch's forms; hard inputs, masks, a second GPU, tensors past 2^31 elements; the networks beside
the published ones; where the time goes; a Predictor by torch and by TensorRT; the tests on this GPU;
schedules; compute-sanitizer's four tools; torch.compile. No part takes more than nine minutes. What failed
runs again at the next call, after what has not run yet. Where the tree is no repository, DGM4_COMMIT names
its commit. `python -m benchmarks.gpu.report FILE` makes the tables.

This proof is owed: it has not run on a GPU yet.

Exit code 1 where a part failed, 2 for a wrong argument, 4 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.gpu.checks import gpu_state
from benchmarks.gpu.parts import parts
from benchmarks.gpu.runner import DONE, FAILED, Results, run_all, select
from benchmarks.machine import describe_machine


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where gpu.json is, or is to be")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a gpu.json of an earlier call")
    parser.add_argument("--minutes", type=float, default=9.0, help="when the call ends (%(default)s)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="parts with this in their name; repeatable",
    )
    parser.add_argument("--again", action="store_true", help="run the chosen parts though they are done")
    parser.add_argument("--list", action="store_true", help="name the parts and their states, run nothing")
    options = parser.parse_args()
    if options.out is None and not options.list:
        parser.error("expected --out DIR, got none")
    if options.resume is not None and not options.resume.is_file():
        parser.error(f"--resume {options.resume}: no such file")
    return options


def _results(options: argparse.Namespace) -> Results:
    """What earlier calls left; a file that cannot be read is told of and replaced."""
    results = Results((options.out or Path()) / "gpu.json")
    for path in filter(None, (results.path if options.out else None, options.resume)):
        if path.is_file():
            try:
                results.load(path)
            except (ValueError, KeyError, TypeError, AttributeError) as failure:
                sys.stderr.write(f"{path}: not taken over, it is no record of this command: {failure}\n")
    return results


def _stop(number: int, frame: object) -> NoReturn:
    """End with the child that runs, which `finally` kills."""
    sys.exit(128 + number)


def main() -> int:
    """Run what is missing."""
    end = time.monotonic()
    options = _options()
    end += 60 * options.minutes
    chosen = select(parts(), options.only)
    results = _results(options)
    if options.list:
        for part in chosen:
            print(f"{part.name}: {results.parts.get(part.name, {}).get('state', 'not run')}")
        return 0
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks.gpu: error: no CUDA device is visible; run it on a GPU machine\n")
        return 4
    signal.signal(signal.SIGTERM, _stop)
    results.calls.append({**describe_machine(), "gpu": gpu_state()})
    results.save()
    late = run_all(results, results.pending(chosen, options.again), end)
    results.calls[-1]["gpu_after"] = gpu_state()
    results.save()
    states = {part.name: results.parts.get(part.name, {}).get("state") for part in chosen}
    failed = [name for name, state in states.items() if state == FAILED]
    done = sum(state == DONE for state in states.values())
    print(json.dumps({"done": done, "of": len(chosen), "failed": failed, "no time for": late}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
