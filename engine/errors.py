"""The exceptions of the project: one base class, ten kinds, each with its exit code on the command line.

A message says what was expected, what was given and what to do. The command line prints the message
alone; a library user catches `Dgm4Error` or one of its kinds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Dgm4Error(Exception):
    """Base class of all errors that this project raises on purpose.

    Examples:
        >>> from engine import Dgm4Error, InputError, Predictor
        >>> try:
        ...     Predictor("my-bundle").predict("nowhere.jpg", "Obama speaks")
        ... except InputError as error:  # or Dgm4Error, for all of them
        ...     print(error)
        'nowhere.jpg': no such file; expected the path of an image (addresses are not fetched)
    """

    exit_code = 1


class InputError(Dgm4Error):
    """An image, a caption or a list of them that cannot be used; names the item's path or index."""


class CheckpointError(Dgm4Error):
    """A checkpoint that is unreadable, unsafe, or has other keys or shapes than the network."""


class BundleError(Dgm4Error):
    """A bundle with a missing, altered or foreign file, or of an unknown format."""


class NumericalError(Dgm4Error):
    """A network's outputs are NaN or infinite, so there is no score."""


class VerificationError(Dgm4Error):
    """A stage of an export differs from the previous one by more than its tolerance."""

    exit_code = 3


class BuildError(Dgm4Error):
    """The engine builder failed, crashed or ran out of time."""

    exit_code = 4


class BackendError(Dgm4Error):
    """The machine lacks a library, a device or a permission that the request needs."""

    exit_code = 4


class OverloadedError(Dgm4Error):
    """More pairs wait already than a `Batcher` holds; the caller should try again later, or elsewhere."""

    exit_code = 4


class DeadlineError(Dgm4Error, TimeoutError):
    """A pair was not answered within the `timeout` that its caller gave."""

    exit_code = 4


class EngineMismatchError(Dgm4Error):
    """An engine was built for another machine or library version; names both sides."""

    exit_code = 4


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """A question that names what is spelled most like `text`; empty where nothing is.

    The dashes of options, which all have, are not compared.
    """
    import difflib  # only for a mistake

    names = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(text.lstrip("-"), names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def why_no_json(error: Exception) -> str:
    """What is wrong with a text that `json.loads` refused, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


_LONGEST = 120  # characters of what a user gave that a message repeats


def shorten(text: str) -> str:
    """Cut what a message repeats of a user's text to 120 characters, its beginning and its end."""
    end = _LONGEST // 3
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - end - 3]}...{text[-end:]}"


def quoted(value: object) -> str:
    """`repr` of what a user gave, cut to 120 characters."""
    return shorten(repr(value))
