"""The README's tables are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import accuracy, demo, engines

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("accuracy-cpu", lambda result: accuracy.table(result["bundles"])),
        ("demo", demo.table),
        ("engines-cpu", lambda result: engines.table(result["rows"])),
    ],
)
def test_tables_are_the_results(name, make):
    rows = make(json.loads((RESULTS / f"{name}.json").read_text())).strip().splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(rows) > 5
    assert [row for row in rows if row not in readme] == []
