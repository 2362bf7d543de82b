"""The errors of the project: one root, eight kinds, each with the exit code of the command line.

A message says what was expected, what came and what to do. The command line prints the message
alone; a library user catches `Dgm4Error` or one of its kinds.
"""

from __future__ import annotations


class Dgm4Error(Exception):
    """Root of every error that this project raises on purpose."""

    exit_code = 1


class InputError(Dgm4Error):
    """A picture, a caption or a list of them that cannot be used; names the item's path or index."""


class CheckpointError(Dgm4Error):
    """A checkpoint that is unreadable, unsafe, or whose keys or shapes are not the network's."""


class BundleError(Dgm4Error):
    """A bundle with a missing, altered or foreign file, or of an unknown format."""


class NumericalError(Dgm4Error):
    """A network answered NaN or infinity; no score is made of it."""


class VerificationError(Dgm4Error):
    """A stage of an export differs from the stage before by more than its tolerance."""

    exit_code = 3


class BuildError(Dgm4Error):
    """The engine builder failed, crashed or ran out of time."""

    exit_code = 4


class BackendError(Dgm4Error):
    """The machine lacks a library, a device or a permission that the request needs."""

    exit_code = 4


class EngineMismatchError(Dgm4Error):
    """An engine was built for another machine or library version; names both sides."""

    exit_code = 4
