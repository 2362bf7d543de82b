"""What is logged: how much, once, and never what a user's pairs hold."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from engine import logs
from engine.errors import InputError
from engine.logs import level_of_environment, warn_once
from export.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
SECRET = "Rosebud"


@pytest.mark.parametrize(
    ("value", "level"),
    [("", None), ("debug", logging.DEBUG), (" INFO ", logging.INFO), ("error", logging.ERROR)],
)
def test_the_level_of_the_environment(value, level, monkeypatch):
    monkeypatch.setenv("DGM4_LOG", value)
    assert level_of_environment() == level


def test_a_level_that_is_none_is_an_error_of_usage(monkeypatch, capsys):
    monkeypatch.setenv("DGM4_LOG", "debg")
    with pytest.raises(
        InputError, match="DGM4_LOG: expected one of debug, .*, got 'debg'; did you mean debug"
    ):
        level_of_environment()
    with pytest.raises(SystemExit) as stopped:
        main(["list"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dgm4 list: error: DGM4_LOG: expected one of")


@pytest.mark.parametrize(
    ("flag", "level"), [((), logging.DEBUG), (("-v",), logging.INFO), (("-q",), logging.ERROR)]
)
def test_the_options_come_before_the_environment(flag, level, monkeypatch, capsys):
    monkeypatch.setenv("DGM4_LOG", "debug")
    root = logging.getLogger()
    before, heard = root.level, []
    monkeypatch.setattr(app.models, "run", lambda options: heard.append(_level()) or 0)
    root.setLevel(logging.ERROR if flag == ("-q",) else logging.WARNING)  # basicConfig leaves pytest's alone
    try:
        assert main([*flag, "list"]) == 0
    finally:
        root.setLevel(before)
        monkeypatch.delenv("DGM4_LOG")
        app._set_up_log(0, False)
    assert heard == [level]


def _level():
    return logging.getLogger("engine.bundle").getEffectiveLevel()


def test_a_warning_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(logs, "_told", {})
    monkeypatch.setattr(logs, "_MOST", 2)
    logger = logging.getLogger("engine.test")
    for message in ("a", "a", "b", "b", "c", "a"):  # the third takes the first one's place
        warn_once(logger, message)
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "c", "a"]


def test_a_librarys_warning_is_one_line(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = app._log_warning
        warnings.warn("two\nlines", UserWarning, stacklevel=1)
        warnings.warn("large", Image.DecompressionBombWarning, stacklevel=1)  # our own limit tells it
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("UserWarning: two (") and "\n" not in message


def test_nothing_of_a_pair_is_logged(tmp_path):
    """All that -vv shows of a list with pairs that can be answered and others that fail in every way."""
    photo = (ROOT / "dgm4" / "demo" / "sample.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(photo + SECRET.encode())
    (tmp_path / "cut.jpg").write_bytes(SECRET.encode() + photo[:500])
    lines = [
        {"image": "a.jpg", "caption": f"{SECRET} smiles"},
        {"image": "cut.jpg", "caption": f"{SECRET} smiles"},
        {"image": "absent.jpg", "caption": SECRET},
        {"image": "a.jpg", "caption": [SECRET]},
        {"image": None, "caption": f"{SECRET} \ud800 " + "word " * 5000},
        {"image": "a.jpg", "caption": SECRET * 3000},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + f"{SECRET}\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DGM4_SERVE_TOKEN": SECRET}
    command = [sys.executable, "-m", "export.cli", "-vv", "predict", "demo:asap"]
    for arguments in (["--list", "list.jsonl", "--out", "out.jsonl"], ["a.jpg", f"{SECRET} smiles"]):
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == (1 if "--list" in arguments else 0), done.stderr
        assert "DEBUG engine." in done.stderr
        assert SECRET not in done.stderr
    assert (tmp_path / "out.jsonl").read_text().count(SECRET) > 2
