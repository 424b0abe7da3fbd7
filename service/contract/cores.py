"""Number of CPUs that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cpu_count(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Number of CPUs that this process may use: its affinity, or the container's quota, rounded up, if that is less.

    Args:
        cgroup: Where the files of cgroup v2 or v1 are mounted.
    """
    allowed = len(os.sched_getaffinity(0))
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((cgroup / name).read_text() for name in names).split()
            quota, period = words[:2]
            if quota not in ("max", "-1"):
                return max(1, min(allowed, math.ceil(int(quota) / int(period))))
        except (OSError, ValueError):
            continue
    return allowed
