"""Parts of a long measurement: each in a process of its own, all records in one file, which calls resume.

A record: `state` ("done"; "failed": it raised, was killed or passed its own limit; "cut": the call's time
ended), `rows`, and of what is not done the `tail` of its output. The file is written anew after every part.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.files import replacing

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000  # characters of a failed part's output that its record keeps
DONE, FAILED, CUT = "done", "failed", "cut"
RESERVE_S = 2.0  # of a call's time, to end a child and to write

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """`call`, "module:function" that yields rows, in a child that is ended after `limit_s`.

    It is not started with less than `needs_s` left.
    """

    name: str
    call: str
    arguments: tuple[str, ...] = ()
    limit_s: float = 150.0
    needs_s: float = 20.0


@dataclass
class Results:
    """The records of all parts in one file, and facts of every call that added to them."""

    path: Path
    parts: dict[str, Record] = field(default_factory=dict)
    calls: list[Record] = field(default_factory=list)

    def load(self, path: Path) -> None:
        """Take over what another file holds; a part that is done here stays."""
        stored = json.loads(path.read_text())
        self.calls += stored["calls"]
        for name, record in stored["parts"].items():
            if self.parts.get(name, {}).get("state") != DONE:
                self.parts[name] = record

    def save(self) -> None:
        """Write the file whole, or leave the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            partial.write_text(json.dumps({"calls": self.calls, "parts": self.parts}, indent=1) + "\n")

    def pending(self, parts: Iterable[Part], again: bool = False) -> list[Part]:
        """What is still to run, in order; what failed before comes last. `again`: all of them."""
        parts = list(parts)
        if again:
            return parts
        states = {part.name: self.parts.get(part.name, {}).get("state") for part in parts}
        fresh = [part for part in parts if states[part.name] not in (DONE, FAILED)]
        return fresh + [part for part in parts if states[part.name] == FAILED]


def select(parts: Sequence[Part], patterns: Sequence[str]) -> list[Part]:
    """Parts whose name matches one of the shell patterns, or has it as a piece; all without patterns."""
    if not patterns:
        return list(parts)
    return [part for part in parts if any(fnmatch.fnmatch(part.name, f"*{p}*") for p in patterns)]


def run_part(part: Part, left_s: float) -> Record:
    """Run one part for its limit or what is left of the call, whichever is less."""
    seconds = min(part.limit_s, left_s)
    record: Record = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "rows", Path(folder) / "output"
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.worker", str(seconds), str(rows), part.call]
        with output.open("wb") as sink:
            code = _wait([*command, *part.arguments], sink, seconds)
        lines = rows.read_text().splitlines() if rows.is_file() else []
        tail = output.read_text(errors="replace")[-TAIL:]
    record |= {"seconds": round(time.monotonic() - start, 1), "code": code}
    record["state"] = DONE if code == 0 else CUT if code is None and seconds < part.limit_s else FAILED
    record["rows"] = [row for row in map(_row, lines) if row is not None]
    return record if code == 0 else {**record, "tail": tail}


def _row(line: str) -> Any:
    """A row; None for one that its writer could not finish."""
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return None


def _wait(command: list[str], sink: Any, seconds: float) -> int | None:
    """The child's exit code, None where its time ended; nothing that it started is left."""
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver is left to it
            child.wait(5)


def run_all(results: Results, parts: Iterable[Part], end: float) -> list[str]:
    """Run parts until `end` of the monotonic clock; the names of those that time was too short for."""
    late = []
    for part in parts:
        left_s = end - time.monotonic() - RESERVE_S
        if left_s < part.needs_s:
            late.append(part.name)
            continue
        record = run_part(part, left_s)
        results.parts[part.name] = {**record, "call": len(results.calls) - 1}
        results.save()
        sys.stderr.write(f"{part.name}: {record['state']}, {record['seconds']:.0f} s\n")
        if "tail" in record:
            sys.stderr.write(record["tail"][-500:].rstrip() + "\n")
    return late
