"""What a result was measured on, and which code was measured."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from export.bench import machine

_ROOT = Path(__file__).resolve().parent.parent


def describe_machine() -> dict[str, Any]:
    """`export.bench.machine`'s description with the commit and the hash of the code, ready for JSON."""
    return {**machine.describe_machine(), "commit": _commit(), "source": _source()}


def _commit() -> str:
    """The commit of the tree, with a plus sign where it has changes; outside a repository DGM4_COMMIT."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    return os.environ.get("DGM4_COMMIT", "unknown")


def _source() -> str:
    """Hash of all Python code, which tells the commit of a copy that has lost its repository."""
    total = hashlib.sha256()
    for path in sorted(_ROOT.glob("*/**/*.py")):
        total.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
