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

stdout carries the results, stderr the log and the progress. `-v` and `-q` may stand before or after the verb.

| exit code | meaning | for example |
| --- | --- | --- |
| 0 | done | |
| 1 | an input cannot be used | an image, a bundle, a checkpoint, a folder; a list of which a pair failed |
| 2 | usage | an unknown verb or option, or one that does not fit the others or the bundle |
| 3 | a verification or the accuracy gate failed | |
| 4 | the machine lacks something | a library, a GPU, an engine for it, shared memory |
| 129, 130, 143 | stopped | the terminal was lost, Ctrl-C, SIGTERM |

A run that is stopped leaves no unfinished file or folder. `dgm4 train` saves a checkpoint first, and names
the command that goes on."""


def reference() -> str:
    """The whole page."""
    return "\n\n".join([HEAD, *_sections(make_parser(), "dgm4", 2)]) + "\n"


def _sections(parser: argparse.ArgumentParser, command: str, level: int) -> Iterator[str]:
    """The sections of a command and its verbs: the description and a table of the arguments."""
    yield f"{'#' * level} {command}"
    verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if parser.description:
        yield _cell(parser.description)
    told = {"help"} if parser.prog == "dgm4" else {"help", "verbose", "quiet"}
    shown = [action for action in parser._actions if action is not verbs and action.dest not in told]
    if rows := [_row(parser, action) for action in shown if action.help != argparse.SUPPRESS]:
        yield "\n".join(["| argument | meaning |", "| --- | --- |", *rows])
    yield from map(_paragraph, filter(None, re.split(r"\n{2,}", (parser.epilog or "").strip("\n"))))
    below = level if parser.prog == "dgm4" else level + 1
    for name, verb in verbs.choices.items() if verbs else ():
        yield from _sections(verb, f"{command} {name}", below)


def _paragraph(text: str) -> str:
    """A paragraph of an epilog; lines that are indented below its first are commands, or verbs."""
    head, *lines = text.splitlines()
    if not lines or not all(line.startswith("  ") for line in lines):
        return _cell(text)
    if head == "examples:":
        return "\n".join(["```sh", *(line.strip() for line in lines), "```"])
    verbs = (line.split(maxsplit=1) for line in lines)
    return "\n".join(
        [f"{head.capitalize()}\n", *(f"- [`{name}`](#dgm4-{name}): {_cell(notes)}" for name, notes in verbs)]
    )


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
