"""The log of a run: one line of JSON an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.files import replacing, without_nan


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line; NaN, which JSON lacks, is written as null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(without_nan(line)) + "\n")


def keep_lines(path: Path, epoch: int) -> None:
    """Drop the lines of epochs that a run taken up after `epoch` of them judges again, and a torn last."""
    if not path.is_file():
        return
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["epoch"] <= epoch:
                lines.append(text)
        except ValueError:
            continue  # the run was killed while it wrote
    with replacing(path, only_writer=True) as partial:
        partial.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
