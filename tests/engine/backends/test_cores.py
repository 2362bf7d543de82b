"""The cores that a process may use: affinity, and the quota of its control group in both versions."""

from __future__ import annotations

import os

import pytest

from engine import backends
from engine.backends import cores

V2, V1 = "0::/a/b\n", "5:memory:/a\n4:cpu,cpuacct:/a/b\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 16 cores: the process's groups, and the files under /sys/fs/cgroup."""

    def make(membership, files):
        (tmp_path / "self").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "self")
        monkeypatch.setattr(cores, "_MOUNT", tmp_path / "cgroup")
        monkeypatch.setattr(cores, "visible_cores", lambda: 16)
        return cores.usable_cores()

    return make


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2, {"a/b/cpu.max": "200000 100000"}, 2),
        (V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, 4),
        (V2, {"a/b/cpu.max": "800000 100000", "a/cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/host/path\n", {"cpu.max": "300000 100000"}, 3),  # a container that sees the host's path
        ("0::/../..\n", {"cpu.max": "300000 100000"}, 3),
        (V2, {"a/b/cpu.max": "max 100000"}, 16),
        (V2, {"a/b/cpu.max": "9900000 100000"}, 16),
        (V2, {"a/b/cpu.max": "nonsense"}, 16),
        (V2, {}, 16),
        (
            V1,
            {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "200000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"},
            2,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, 16),
        ("", {}, 16),
    ],
)
def test_the_quota_counts(machine, membership, files, expected):
    assert machine(membership, files) == expected


def test_libraries_keep_to_the_quota(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    machine(V2, {"a/b/cpu.max": "200000 100000"})
    cores.keep_to_quota()
    assert os.environ["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores.keep_to_quota()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine("", {})
    cores.keep_to_quota()
    assert "OMP_NUM_THREADS" not in os.environ


def test_another_system_has_no_quota(machine, monkeypatch, tmp_path):
    machine(V2, {"a/b/cpu.max": "200000 100000"})
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "none")
    assert cores.usable_cores() == 16


def test_this_machine():
    assert 1 <= backends.usable_cores() <= cores.visible_cores()
