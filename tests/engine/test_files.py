"""Files that appear whole or not at all, digests, and the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine.files import cache_folder, replacing, sha256_of, without_nan
from engine.packages import version_of


@pytest.mark.parametrize("only_writer", [False, True])
def test_the_new_file_takes_the_place_of_the_old_one(tmp_path, only_writer):
    path = tmp_path / "x.json"
    path.write_text("old")
    with replacing(path, only_writer) as partial:
        assert partial.parent == tmp_path
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_reach_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with replacing(tmp_path / "x") as partial:
        partial.write_bytes(b"x")
    assert calls == ["fsync", "replace"]


def test_a_killed_process_leaves_the_old_file_and_the_next_sweeps(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_text("old")
    code = """
        import os, signal, sys
        from pathlib import Path
        from engine.files import replacing
        with replacing(Path(sys.argv[1]), only_writer=True) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)])
    assert done.returncode < 0
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(path, only_writer=True) as partial:
        partial.write_text("new")
    assert list(tmp_path.iterdir()) == [path]


def test_digests_of_paths_and_of_open_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert sha256_of(path) == expected
    with path.open("rb") as file:
        assert sha256_of(file) == expected


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dgm4"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dgm4"


def test_versions_of_packages():
    assert version_of("no-such-package-here") is None
    assert version_of("no-such-package-here", "numpy") == version_of("numpy") is not None


def test_json_lacks_nan():
    data = {"a": (1, float("nan")), "b": {"c": [float("nan"), None, "nan"]}}
    assert without_nan(data) == {"a": [1, None], "b": {"c": [None, None, "nan"]}}
