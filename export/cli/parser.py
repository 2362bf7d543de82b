"""The parser of `dgm4` and of each of its verbs: short usage, suggestions, help in paragraphs."""

from __future__ import annotations

import argparse
import contextlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from engine.errors import InputError, did_you_mean, quoted, shorten
from export.output import escaped

_VERBS = "dgm4 --help lists the verbs"
_NEGATIVE = re.compile(r"-\.?\d")  # the beginning of a value, for no option has a digit there
_UNBROKEN = 10_000  # columns of the usage's line, which a terminal breaks where it likes


class HelpFormatter(argparse.HelpFormatter):
    """Fills each paragraph of a text by itself; one with indented lines, which are examples, stays."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = re.split(r"\n{2,}", text.strip("\n"))
        return "\n\n".join(
            block
            if block.startswith(" ") or "\n  " in block
            else textwrap.fill(" ".join(block.split()), width)
            for block in blocks
        )


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the verb's own usage in one line, and what was probably meant.

    Each takes -v and -q, so that they may stand before and after the verb. `surplus` is what an error says of
    one argument too many.
    """

    surplus = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs})
        self._given_usage, self._usage_line = self.usage, ""
        self._negative_number_matcher = _NEGATIVE  # argparse knows no list of numbers, as a box is one
        loudness = self.add_mutually_exclusive_group()
        loudness.add_argument(
            *("-v", "--verbose"),
            action="count",
            default=argparse.SUPPRESS,
            help="log what happens, and show the traceback of an error; -vv logs more",
        )
        loudness.add_argument(
            *("-q", "--quiet"),
            action="store_true",
            default=argparse.SUPPRESS,
            help="errors only, no progress",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Let options stand among arguments that may be left out; argparse would take these for absent."""
        optional = any(x.nargs == argparse.OPTIONAL and not x.option_strings for x in self._actions)
        if self._usage_line or not optional:
            return super().parse_known_args(args, namespace)
        self._usage_line = self._short_usage()  # meanwhile argparse takes the arguments away
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._usage_line = ""

    def error(self, message: str) -> NoReturn:
        """Show the usage in one line and the reason in the next; exit with 2."""
        usage = self._usage_line or self._short_usage()
        self.exit(2, f"{usage}\n{self.prog}: error: {escaped(message)}\n")

    def unrecognized(self, arguments: Iterable[str]) -> NoReturn:
        """Refuse arguments that nothing reads, with the options that are spelled nearly so."""
        arguments = list(arguments)
        options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
        known = self._option_string_actions
        hints = [did_you_mean(option, known) for option in options] if options else [self.surplus]
        self.error(f"unrecognized arguments: {shorten(' '.join(arguments))}{next(filter(None, hints), '')}")

    def _short_usage(self) -> str:
        required = [action for action in self._actions if action.required or not action.option_strings]
        named = self.prog if self._given_usage else f"{self.prog} [options]"
        formatter = HelpFormatter(prog=named, width=_UNBROKEN)
        formatter.add_usage(self._given_usage, required, [])
        return f"{formatter.format_help().strip()}   ({self.prog} --help tells more)"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), choices)
            if isinstance(action, argparse._SubParsersAction):
                raise argparse.ArgumentError(None, f"no verb {quoted(value)}{hint or '; ' + _VERBS}")
            chosen = f"(choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, f"invalid choice: {quoted(value)} {chosen}{hint}")


@contextlib.contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Report an InputError of the block, which only checks arguments, as an error of usage.

    A message with the names of options' values gets the options' own.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        known = parser._option_string_actions
        name = re.split("[: ]", message, maxsplit=1)[0]
        # A value's name begins the message; others within it have an underscore, which no plain word has.
        for word in {name, *re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", message)}:
            option = f"--{word.replace('_', '-')}"
            if option in known:
                begins = "^" if "_" not in word else r"\b"
                message = re.sub(rf"{begins}{word}\b", option, message)
        parser.error(message)
