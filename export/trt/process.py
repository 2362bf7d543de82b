"""The parent's side of the process that builds an engine: its start, its events, and why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from engine.errors import BuildError

Progress = Callable[[str, int, int], None]

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_LOG_LINES = 20  # of the builder's log that an error repeats
_MOST_WARNINGS = 100
_SIGNAL_HINTS = {
    "SIGKILL": "most often the kernel, out of memory: a build holds about four times the weights, "
    "so free memory or build on a larger machine",
    "SIGSEGV": "a crash inside the native builder",
    "SIGABRT": "the native builder gave up: an ONNX node may carry the name of a registered plugin",
    "SIGTERM": "something asked the build to stop",
}


class BuildLimitError(BuildError):
    """A build that took longer than it may."""


class BuildProcess:
    """A running worker; ends it when the block is left, in whatever way."""

    def __init__(self, command: Sequence[str], request: dict[str, Any], limit_s: float) -> None:
        self.warnings: dict[str, None] = {}
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._done: dict[str, Any] | None = None
        self._refusal: str | None = None
        self._expired = False
        self._limit_s = limit_s
        self._request = request
        self._process = start(command, stdin=subprocess.PIPE)
        self._timer = threading.Timer(limit_s, self._expire)
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)

    def __enter__(self) -> BuildProcess:
        self._timer.start()
        self._drain.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        self._drain.join()
        _pipe(self._process.stdout).close()

    def follow(self, show: Progress) -> None:
        """Send the request and read the events of the worker to their end."""
        # A worker that died at once is explained by its exit status.
        with contextlib.suppress(BrokenPipeError), _pipe(self._process.stdin) as stdin:
            stdin.write(json.dumps(self._request) + "\n")
        for line in _pipe(self._process.stdout):
            event = decode(line)
            if event is None:
                self._lines.append(line.strip())
            elif event["event"] == "progress":
                show(event["phase"], event["step"], event["total"])
            else:
                self._take(event)
        self._process.wait()
        self._drain.join()

    def result(self) -> dict[str, Any]:
        """Fields of the `done` event; raises `BuildError` with the likely cause where there is none."""
        if self._expired:
            limit = f"the build took longer than its limit of {self._limit_s:g} s"
            raise BuildLimitError(self._explain(limit))
        if self._refusal is not None:
            raise BuildError(self._explain(self._refusal))
        status = self._process.returncode
        if status != 0 or self._done is None:
            raise BuildError(self._explain(describe_status(status)))
        return self._done

    def _take(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "log", "severity": "warning", "text": text}:
                if len(self.warnings) < _MOST_WARNINGS:
                    self.warnings[text] = None
            case {"event": "log", "text": text}:
                self._lines.append(text)
            case {"event": "error", "message": message}:
                self._refusal = message
            case {"event": "done"}:
                self._done = event

    def _explain(self, cause: str) -> str:
        lines = [line for line in self._lines if line and line not in cause]
        log = "\n  ".join(lines)
        hint = "; a higher --workspace may do" if self._short_of_workspace(lines) else ""
        model = Path(self._request["onnx"]).name  # its folder may be one that goes with this error
        return f"no engine from {model}: {cause}{hint}" + (
            f"; the builder's log ends:\n  {log}" if log else ""
        )

    def _short_of_workspace(self, lines: Sequence[str]) -> bool:
        return self._request["workspace_mb"] is not None and any("OutOfMemory" in line for line in lines)

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def _read_stderr(self) -> None:
        with _pipe(self._process.stderr) as stderr:
            self._lines.extend(line.rstrip() for line in stderr)


def start(command: Sequence[str], stdin: int) -> subprocess.Popen[str]:
    """Start a worker with this package first on its path; it dies with the calling thread on Linux."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([os.fspath(_PACKAGE_ROOT), *([before] if before else [])])
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"the building process {command[0]} cannot be started: {error}") from error


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise BuildError("the building process was started without a pipe")
    return stream


def decode(line: str) -> dict[str, Any] | None:
    """Event of a line; None for a line that is something else."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def describe_status(status: int) -> str:
    """Why a process ended, by its exit status, negative for a signal."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"the building process was ended by {name}: {_SIGNAL_HINTS.get(name, 'no usual cause')}"
    return f"the building process ended with status {status} and no engine"
