"""The pages of the documentation, README first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.stem: path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="session")
def pages():
    """The Markdown of each page by its name."""
    return PAGES


@pytest.fixture(scope="session")
def blocks():
    """A function from a language to the code blocks in it, by page."""
    return lambda language: {
        name: [code for kind, code in FENCE.findall(text) if kind == language] for name, text in PAGES.items()
    }


@pytest.fixture(scope="session")
def tables():
    """A function from a page and a heading, if any, to the cells of each row of the tables below it."""

    def read(page, heading=""):
        text = PAGES[page]
        if heading:
            text = re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
        lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
        return [re.split(r" +\| +", line) for line in lines if "---" not in line]

    return read
