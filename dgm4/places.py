"""Whether a checkpoint and a data folder are there: checks that cost nothing and need no torch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import CheckpointError, InputError


def check_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless `path` is a file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")


def check_data(folder: Path) -> None:
    """Raise InputError unless `folder` is one, such as a data folder in the published layout."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the data folder (with origin, manipulation and metadata)")
