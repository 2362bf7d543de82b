"""Options declared once: a dataclass field states its command-line flag, its help and the values it takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from engine.errors import InputError, quoted

T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    """The numbers from `low` to `high`, which messages call `text`; a type for argparse."""

    text: str
    kind: type[int] | type[float]
    low: float
    high: float = float("inf")

    def __call__(self, text: str) -> int | float:
        """Parse an argument; raises ArgumentTypeError."""
        try:
            value = self.kind(text)
        except ValueError:
            value = self.kind(-1)
        if value not in self or (self.kind is int and not text.isdecimal()):
            raise argparse.ArgumentTypeError(f"expected {self.text}, got {quoted(text)}")
        return value

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


WHOLE = Number("a whole number from 0", int, 0)
POSITIVE = Number("a whole number from 1", int, 1)
SECONDS = Number("seconds above 0, a day at most", float, 1e-9, 86_400)


@dataclass(frozen=True)
class Flag:
    """The command-line side of a field; `name` is the field's where it is empty."""

    help: str
    name: str
    metavar: str | None
    choices: Collection[str] | None
    type: Callable[[str], Any] | None


def flag(
    default: Any,
    help: str,  # noqa: A002 (as argparse calls it)
    name: str = "",
    metavar: str | None = None,
    choices: Collection[str] | None = None,
    type: Callable[[str], Any] | None = None,  # noqa: A002
) -> Any:
    """A dataclass field that is a flag too: one of `choices`, or what `type` makes of text."""
    return field(default=default, metadata={"flag": Flag(help, name, metavar, choices, type)})


def group(default: Any, title: str) -> Any:
    """A dataclass field that holds a dataclass with flags of its own, shown under `title` in the help."""
    return field(default=default, metadata={"group": title})


def _option(name: str, flag: Flag) -> str:
    return f"--{flag.name or name.replace('_', '-')}"


def add_flags(parser: argparse._ActionsContainer, options: type[Any]) -> None:
    """Add the flags of the dataclass `options` to a parser, those of a `group` in it under its title."""
    for item in fields(options):
        flag: Flag | None = item.metadata.get("flag")
        if flag is not None and item.default is False:
            parser.add_argument(_option(item.name, flag), dest=item.name, action="store_true", help=flag.help)
        elif flag is not None:
            parser.add_argument(
                _option(item.name, flag),
                dest=item.name,
                default=item.default,
                type=flag.type or str,
                choices=flag.choices,
                metavar=flag.metavar,
                help=flag.help,
            )
        elif is_dataclass(item.default):
            title = item.metadata.get("group")
            add_flags(parser.add_argument_group(title) if title else parser, type(item.default))


def read_options(options: type[T], given: argparse.Namespace, **values: Any) -> T:
    """Make an `options` of `values` and of what the command line gives under the names of its fields."""
    made = dict(values)
    for item in fields(options):  # type: ignore[arg-type]
        if item.name in made:
            continue
        if is_dataclass(item.default):
            made[item.name] = read_options(type(item.default), given)
        elif hasattr(given, item.name):
            made[item.name] = getattr(given, item.name)
    return options(**made)


def check_values(options: Any) -> None:
    """Raise InputError for a value that its flag excludes, in `options` or in a dataclass in it."""
    for item in fields(options):
        value = getattr(options, item.name)
        if is_dataclass(value):
            check_values(value)
        elif value is not None and (flag := item.metadata.get("flag")) is not None:
            if flag.choices is not None and value not in flag.choices:
                raise InputError(
                    f"{item.name}: expected one of {', '.join(flag.choices)}, got {quoted(value)}"
                )
            if isinstance(flag.type, Number) and value not in flag.type:
                raise InputError(f"{item.name}: expected {flag.type.text}, got {value}")


def as_option(message: str, options: type[Any]) -> str:
    """A message that begins with the name of a field, as the command line calls it."""
    name, colon, rest = message.partition(":")
    for item in fields(options):
        if item.name == name and "flag" in item.metadata:
            return f"{_option(name, item.metadata['flag'])}{colon}{rest}"
        if is_dataclass(item.default) and (inner := as_option(message, type(item.default))) != message:
            return inner
    return message
