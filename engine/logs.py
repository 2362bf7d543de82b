"""What is logged, under the names of the packages: never captions, the contents of files, keys or tokens.

Paths, sizes, names of networks and reasons of errors may be logged.
"""

from __future__ import annotations

import logging
import os

from engine.errors import InputError, did_you_mean, quoted

VARIABLE = "DGM4_LOG"

_LEVELS = {name.lower(): getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR")}
_MOST = 1000  # messages that are remembered
_told: dict[str, None] = {}


def level_of_environment() -> int | None:
    """The level of logging that $DGM4_LOG names, as logging.INFO; None where it is not set.

    Raises InputError for another name.
    """
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        return None
    if name.lower() not in _LEVELS:
        expected, hint = ", ".join(_LEVELS), did_you_mean(name.lower(), _LEVELS)
        raise InputError(f"{VARIABLE}: expected one of {expected}, got {quoted(name)}{hint}")
    return _LEVELS[name.lower()]


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning that this process has not logged yet."""
    if message in _told:
        return
    while len(_told) >= _MOST:
        _told.pop(next(iter(_told)), None)
    _told[message] = None
    logger.warning("%s", message)
