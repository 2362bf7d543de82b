"""Result files that outlive a failing case: what was measured is written, and what failed beside it."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

Row = dict[str, Any]


class ResultFile:
    """A benchmark's JSON: the machine, what was measured, and "failures" if a case failed.

    A failure is {"case": [name, ...], "error": str}; `exit_code` is 1 while there is any.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures: list[Row] = []

    @property
    def exit_code(self) -> int:
        """0, or 1 if a case failed, be it in an earlier call."""
        return 1 if self.failures else 0

    def load(self, field: str) -> list[Row]:
        """The rows that an earlier call wrote under `field`, none without a file; its failures are kept."""
        if not self.path.exists():
            return []
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        self.failures = stored.get("failures", [])
        return stored[field]

    @contextmanager
    def case(self, *names: str) -> Iterator[None]:
        """Measure one case inside the block: an exception ends the case and becomes a failure.

        The traceback goes to stderr. The caller saves afterwards.
        """
        self.failures = [failure for failure in self.failures if failure["case"] != list(names)]
        try:
            yield
        except Exception as error:  # whatever breaks one case must not lose the hours spent on the others
            traceback.print_exc()
            self.fail(*names, error=f"{type(error).__name__}: {error}")

    def fail(self, *names: str, error: str) -> None:
        """Record that a case failed."""
        sys.stderr.write(f"{' '.join(names)}: failed: {error}\n")
        self.failures.append({"case": list(names), "error": error})

    def save(self, record: Row) -> None:
        """Write the machine, `record` and the failures."""
        whole = {"machine": describe_machine(), **record}
        if self.failures:
            whole["failures"] = self.failures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
