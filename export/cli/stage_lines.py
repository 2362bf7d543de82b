"""The stages of an export as lines on stderr: each is named when it begins."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from engine.progress import on_terminal

if TYPE_CHECKING:
    from export.stages import Stage

_CLEAR = "\r\x1b[K"


class StageLines:
    """Writes a line when a stage begins and one when it ends; on a terminal the second takes its place."""

    def __init__(self, shown: bool) -> None:
        self._shown, self._terminal = shown, on_terminal()
        self.finished: list[Stage] = []

    def begin(self, name: str) -> None:
        """Name the stage that begins."""
        self._write(f"{_CLEAR}{name} ..." if self._terminal else f"{name} ...\n")

    def end(self, stage: Stage) -> None:
        """Describe the stage that has ended: name, seconds, what it did, its distance from another one."""
        self.finished.append(stage)
        distances = "".join(
            f" | from the {d.against}: max {d.max:.1e}, RMS {d.rms:.1e} (allowed: {d.kind} {d.tolerance:g})"
            for d in stage.differences
        )
        clear = _CLEAR if self._terminal else ""
        self._write(f"{clear}{stage.name:<10}{stage.seconds:7.1f} s  {stage.text}{distances}\n")

    def __enter__(self) -> StageLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the line of a stage that did not end."""
        if self._terminal:
            self._write(_CLEAR)

    def _write(self, text: str) -> None:
        if self._shown:
            sys.stderr.write(text)
            sys.stderr.flush()
