"""What the kernels share: the range of Triton, and how columns are split."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kernels.jit import NEWEST_TRITON, OLDEST_TRITON, column_parts, triton

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def version(text):
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def pinned():
    """The Triton that the tests run with: the one that torch for CUDA requires."""
    return re.search(r"^triton==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_installed_triton_is_in_the_range():
    assert OLDEST_TRITON <= version(triton.__version__) <= NEWEST_TRITON


def test_the_pinned_triton_is_in_the_range():
    assert OLDEST_TRITON <= version(pinned()) <= NEWEST_TRITON


@pytest.mark.parametrize("name", ["kernels-aot.jsonl", "plugins-aot.jsonl"])
def test_the_reports_are_of_the_pinned_triton(name):
    rows = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
    assert {row["triton"] for row in rows} == {pinned()}


@pytest.mark.parametrize(
    ("width", "parts"),
    [(1, (16, 1)), (16, (16, 1)), (24, (32, 1)), (64, (64, 1)), (96, (32, 3)), (768, (256, 3))],
)
def test_parts_hold_the_columns(width, parts):
    assert column_parts(width) == parts
