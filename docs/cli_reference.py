"""Write docs/cli.md from the parsers of `dgm4`: `python docs/cli_reference.py > docs/cli.md`."""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator

from export.cli.app import make_parser

HEAD = """# Command line

<!-- Written by `python docs/cli_reference.py > docs/cli.md`; a test compares. -->

stdout carries the results, stderr the log and the progress. Exit codes:

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | bad input: a pair, a checkpoint, a damaged bundle |
| 2 | usage |
| 3 | a verification or the accuracy gate failed |
| 4 | the machine lacks something |
| 129, 130, 143 | the terminal was lost; interrupted; stopped |"""


def reference() -> str:
    """The whole page."""
    return "\n\n".join([HEAD, *_sections(make_parser(), "dgm4", 2)]) + "\n"


def _sections(parser: argparse.ArgumentParser, command: str, level: int) -> Iterator[str]:
    """The sections of a command and its verbs: the description and a table of the arguments."""
    yield f"{'#' * level} {command}"
    verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if parser.description:
        yield _cell(parser.description)
    shown = [action for action in parser._actions if action is not verbs and action.dest != "help"]
    if rows := [_row(parser, action) for action in shown if action.help != argparse.SUPPRESS]:
        yield "\n".join(["| argument | meaning |", "| --- | --- |", *rows])
    if parser.epilog:
        yield _cell(parser.epilog)
    below = level if parser.prog == "dgm4" else level + 1
    for name, verb in verbs.choices.items() if verbs else ():
        yield from _sections(verb, f"{command} {name}", below)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    value = formatter._format_args(action, action.dest.upper())
    if action.option_strings:
        value = f"{', '.join(action.option_strings)} {value}".strip()
    value = value.replace("|", " or ")  # Markdown takes a bar for the end of the cell
    notes = formatter._expand_help(action) if action.help else ""
    needed = " (required)" if action.required and action.option_strings else ""
    return f"| `{value}` | {_cell(notes)}{needed} |"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", html.escape(text, quote=False)).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
