"""Progress: plain lines elsewhere, one line that goes away on a terminal, nothing without stderr."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

from engine.progress import progress_bar

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
    from engine.progress import progress_bar

    with progress_bar("work", 3, "pairs") as bar:
        for _ in range(3):
            bar.update()
"""


def test_plain_lines(capsys):
    with progress_bar("work", 3, "pairs") as bar:
        assert capsys.readouterr().err.startswith("work: 0 of 3 pairs, ")  # at once
        for _ in range(3):
            bar.update()
    assert capsys.readouterr().err.startswith("work: 3 of 3 pairs, ")
    with progress_bar("work", None, "pairs") as bar:
        bar.update(2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("work: 2 pairs, ")


def test_the_time_that_is_left_is_told_where_it_is_known(capsys, monkeypatch):
    monkeypatch.setattr("engine.progress._EVERY_S", 0.0)
    with progress_bar("work", 5, "pairs", initial=3) as bar:
        bar.update()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "work: 3 of 5 pairs, 00:00 so far"
    assert last == "work: 4 of 5 pairs, 00:00 so far, 00:00 left"
    with progress_bar("work", 3, "pairs", initial=3):  # a finished list, once more
        pass
    assert set(capsys.readouterr().err.splitlines()) == {"work: 3 of 3 pairs, 00:00 so far"}


def test_not_shown(capsys):
    with progress_bar("work", 3, "pairs", shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/null"])
def test_without_stderr(closed):
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, textwrap.dedent(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 0


def test_one_line_on_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    subprocess.run(command, env=environment, stderr=theirs, timeout=60, check=True)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert "work:" in shown and "0/3" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")
