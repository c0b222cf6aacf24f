"""What this machine gives to a job: cores and memory, as the kernel will really grant them.

`nproc` knows the affinity but not a container's CPU quota; `free` knows the machine's memory but not a container's limit.
"""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Return how many cores this process may use at the same time: its affinity, or less under a cgroup's CPU quota."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota() -> float | None:
    """Return the smallest CPU quota, in cores, of the cgroups this process is in, or None without one."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
            if quota.strip() not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue
    return min(quotas, default=None)


def memory_nbytes() -> int:
    """Return the machine's memory, or less under a cgroup's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return min(limits)


def process_state(pid: int) -> str:
    """Return the kernel's letter for a process (R running, S sleeping, D in the kernel, T stopped, Z ended), or "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _cgroup_folders(controller: str) -> list[Path]:
    """Return this process's folder of a controller and all above it, in version 2 or version 1 of cgroups."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if names == "":
            tops = [_CGROUPS, _CGROUPS / "unified"]
        elif controller in names.split(","):
            tops = [_CGROUPS / names, _CGROUPS / controller]
        else:
            continue
        for top in tops:
            # Inside a container the path may be the host's; then only the top is there.
            folder = top / path.lstrip("/")
            while folder != top.parent:
                if folder.is_dir():
                    folders.append(folder)
                folder = folder.parent
    return folders
