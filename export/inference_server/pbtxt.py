"""Protobuf's text format, in which the server reads config.pbtxt: a message is a dict, an enum an `Enum`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_INDENT = "  "


class Enum(str):
    """A value that is written without quotes."""


def write_message(fields: Mapping[str, Any]) -> str:
    """The text of a message; a list of dicts is a repeated message, another list a repeated value."""
    return "\n".join(_lines(fields)) + "\n"


def as_map(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map of the format: one message an entry."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _lines(fields: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """A message's fields, a repeated message by one block each."""
    for name, value in fields.items():
        if isinstance(value, list) and not isinstance(value[0], dict):
            yield f"{_INDENT * depth}{name}: [{', '.join(map(_scalar, value))}]"
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield f"{_INDENT * depth}{name} {{"
                yield from _lines(item, depth + 1)
                yield f"{_INDENT * depth}}}"
            else:
                yield f"{_INDENT * depth}{name}: {_scalar(item)}"


def _scalar(value: str | int) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (Enum, int)) else json.dumps(value)
