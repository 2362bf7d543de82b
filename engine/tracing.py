"""OpenTelemetry spans around the stages of a prediction, in a process that uses OpenTelemetry.

A program that traces has imported `opentelemetry.trace`, be it by `opentelemetry-instrument`. Elsewhere nothing
is imported and a span costs a look into a dictionary. Attributes are names and numbers of shapes: no captions,
images or paths.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Attributes = Mapping[str, str | int]

_NONE: AbstractContextManager[None] = nullcontext()


def span(name: str, attributes: Attributes) -> AbstractContextManager[Any]:
    """A context manager that is the span `dgm4.<name>` within the current one; it holds no exceptions' texts.

    An exception makes its status an error, without the message, which may repeat what a user gave.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not hasattr(trace, "get_tracer"):  # being imported
        return _NONE
    from engine import __version__

    tracer = trace.get_tracer("dgm4", __version__)
    started: AbstractContextManager[Any] = tracer.start_as_current_span(
        f"dgm4.{name}", attributes=attributes, record_exception=False, set_status_on_exception=False
    )
    return started
