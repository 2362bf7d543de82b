"""Options declared once: the flag, the value in the dataclass, the check, and the name in messages."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from engine.errors import InputError
from export.flags import (
    POSITIVE,
    SECONDS,
    WHOLE,
    add_flags,
    as_option,
    check_values,
    flag,
    group,
    read_options,
)


@dataclass(frozen=True)
class Inner:
    limit_s: float = flag(60.0, "seconds", name="limit", type=SECONDS)
    lean: bool = flag(False, "leave it out")


@dataclass(frozen=True)
class Outer:
    out: str
    kind: str | None = flag(None, "which", choices=("a", "b"))
    max_count: int = flag(3, "how many (%(default)s)", type=POSITIVE)
    inner: Inner = group(Inner(), "inside")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser, Outer)
    return read_options(Outer, parser.parse_args(arguments), out="here")


def test_the_defaults_are_the_dataclass_own():
    assert parse() == Outer("here")


def test_every_flag_reaches_its_field():
    made = parse("--kind", "b", "--max-count", "7", "--limit", "1.5", "--lean")
    assert made == Outer("here", "b", 7, Inner(1.5, True))


@pytest.mark.parametrize(
    ("options", "message", "shown"),
    [
        (Outer("x", kind="c"), "kind: expected one of a, b, got 'c'", "--kind: "),
        (Outer("x", max_count=0), "max_count: expected a whole number from 1, got 0", "--max-count: "),
        (
            Outer("x", inner=Inner(0.0)),
            "limit_s: expected seconds above 0, a day at most, got 0",
            "--limit: ",
        ),
    ],
)
def test_a_value_out_of_range_is_named_as_a_field_and_as_a_flag(options, message, shown):
    with pytest.raises(InputError) as caught:
        check_values(options)
    assert str(caught.value).startswith(message)
    assert as_option(str(caught.value), Outer).startswith(shown + "expected")
    assert as_option("out of luck: nothing", Outer) == "out of luck: nothing"


@pytest.mark.parametrize("text", ["-1", "1.5", "many", "", "1_0", "nan"])
def test_text_that_is_no_whole_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected a whole number from 0, got '{text}'"):
        WHOLE(text)


@pytest.mark.parametrize("text", ["0", "-3", "86401", "nan", "inf", "soon"])
def test_text_that_is_no_number_of_seconds(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected seconds above 0, a day at most"):
        SECONDS(text)
