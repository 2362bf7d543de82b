"""How many CPU cores this process may use: its affinity mask, and the quota of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

_MOUNT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def visible_cores() -> int:
    """Number of CPU cores that this process may run on (its affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """Number of cores whose time this process gets: those that it may run on, within its container's quota.

    A quota of 1.5 cores counts as 2. More threads than that are stopped for part of every period. The cores
    of a cpuset are those of the affinity mask.
    """
    quotas = [math.ceil(quota) for quota in _quotas(_MOUNT, _MEMBERSHIP)]
    return max(1, min([visible_cores(), *quotas]))


def keep_to_quota() -> None:
    """Have libraries that are imported later start no more threads than the container's quota allows.

    torch, NumPy and others count the cores of the affinity mask. The user's OMP_NUM_THREADS has precedence.
    """
    if (cores := usable_cores()) < visible_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _quotas(mount: Path, membership: Path) -> Iterator[float]:
    """Quotas, in cores, of the control groups that hold this process, of version 1 and 2."""
    try:
        lines = membership.read_bytes().split(b"\n")
    except OSError:
        return  # another system than Linux
    for line in lines:
        # A group's name may hold any byte, and colons.
        _, _, entry = os.fsdecode(line).partition(":")
        controllers, colon, group = entry.partition(":")
        if not colon:
            continue
        if not controllers:
            yield from _read_levels(mount, group, _read_v2)
        elif "cpu" in controllers.split(","):
            yield from _read_levels(mount / controllers, group, _read_v1)
            yield from _read_levels(mount / "cpu", group, _read_v1)


def _read_levels(mount: Path, group: str, read: Callable[[Path], tuple[float, float]]) -> Iterator[float]:
    """The quotas of a group and of those above it; inside a container only the mount's own may be there."""
    inside = PurePosixPath("" if ".." in group else group.lstrip("/"))
    for level in (inside, *inside.parents):
        try:
            quota, period = read(mount / level)
        except (OSError, ValueError):  # no such group here, no such file, or "max": no quota
            continue
        if 0 < quota < math.inf and period > 0:
            yield quota / period


def _read_v2(folder: Path) -> tuple[float, float]:
    quota, period = (folder / "cpu.max").read_text().split()
    return float(quota), float(period)


def _read_v1(folder: Path) -> tuple[float, float]:
    names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
    quota, period = (float((folder / name).read_text()) for name in names)
    return quota, period
