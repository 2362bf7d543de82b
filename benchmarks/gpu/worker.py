"""The child process of a part: `python -m benchmarks.gpu.worker SECONDS FILE MODULE:FUNCTION [ARGUMENT ...]`.

Calls the function and writes every row it yields to FILE, a line of JSON each, so that what was measured
before a fault is kept. Just before SECONDS have passed it writes all threads' stacks to stderr.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON lacks: None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(seconds: str, path: str, call: str, *arguments: str) -> None:
    """Run one part to its end or its fault."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(float(seconds) - 1.0, 0.1))
    module, _, function = call.partition(":")
    with Path(path).open("w") as file:
        for row in getattr(importlib.import_module(module), function)(*arguments):
            file.write(json.dumps(plain(row)) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
