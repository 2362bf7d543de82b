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
        (tmp_path / "self").write_bytes(os.fsencode(membership))
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
        # Four levels, the tightest in the middle: a pod's slice above its container.
        (
            "0::/kubepods.slice/pod1.slice/cri-1.scope/app\n",
            {
                "kubepods.slice/cpu.max": "1200000 100000",
                "kubepods.slice/pod1.slice/cpu.max": "250000 100000",
                "kubepods.slice/pod1.slice/cri-1.scope/cpu.max": "max 100000",
                "kubepods.slice/pod1.slice/cri-1.scope/app/cpu.max": "800000 100000",
            },
            3,
        ),
        # Version 1 nests too, and a container's own group is the mount's root.
        (
            "4:cpu,cpuacct:/docker/abc\n",
            {
                "cpu,cpuacct/docker/cpu.cfs_quota_us": "350000",
                "cpu,cpuacct/docker/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            "4:cpu,cpuacct:/docker/abc\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2,
        ),
        # Both versions at once: the quota is with version 1, version 2 only names the group.
        (
            "4:cpu:/a\n0::/a\n",
            {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000", "unified/a/x": ""},
            3,
        ),
        # A period other than 100 ms, a quota below a core, a group that was deleted, and odd names.
        (V2, {"a/b/cpu.max": "30000 20000"}, 2),
        (V2, {"a/b/cpu.max": "1000 100000"}, 1),
        ("0::/a/b (deleted)\n", {"a/cpu.max": "200000 100000"}, 2),
        ("0::/a:b/c\n", {"a:b/c/cpu.max": "200000 100000"}, 2),
        ("0::/\udcff\n", {"\udcff/cpu.max": "200000 100000"}, 2),
        ("no colon\n\n1:one:\n" + V2, {"a/b/cpu.max": "200000 100000"}, 2),
        (V2, {"a/b/cpu.max": "inf 100000"}, 16),
        (V2, {"a/b/cpu.max": "200000 0"}, 16),
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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_a_cpuset_is_the_affinity_mask():
    """The kernel cuts the mask of every process to its cpuset, so the mask is what counts."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores.visible_cores() == backends.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
