"""Control groups that bound the memory of each rank of a job: of version 1 or 2, whichever this process may make groups in.

A group is charged for what its processes touch first: their own memory, pages of memory files that they share, and files that they read, which the
kernel gives up before it kills anybody. The groups' names hold the test process's number: what a killed one has left is swept by the next.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryGroups", "missing_feature"]

NAME = "ringfold-test-"
EMPTY_S = 10.0  # how long killed processes may take to be gone
_numbers = itertools.count()


@dataclass(frozen=True)
class Version:
    """The names of a version's files; both say `oom_kill N` in `kills`."""

    limit: str
    peak: str
    kills: str
    swap: str
    swap_is_beside: bool  # the limit of swap counts swap alone, not memory too


VERSION_1 = Version("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control", "memory.memsw.limit_in_bytes", False)
VERSION_2 = Version("memory.max", "memory.peak", "memory.events", "memory.swap.max", True)


class MemoryGroups:
    """`number` groups, each with `limit_nbytes` of memory and no swap, or without a limit; closing kills what is in them and removes them.

    Raises: OSError, if this process may not make them.
    """

    def __init__(self, number: int, limit_nbytes: int | None = None) -> None:
        parent, self._version = _parent()
        _sweep(parent)
        self.prefix = f"{parent}/{NAME}{os.getpid()}-{next(_numbers)}-"  # the group of rank r is the folder `prefix`r
        self._folders = [Path(f"{self.prefix}{rank}") for rank in range(number)]
        try:
            for folder in self._folders:
                folder.mkdir()
                if limit_nbytes is not None:
                    self._limit(folder, limit_nbytes)
        except BaseException:
            self.close()
            raise

    def _limit(self, folder: Path, nbytes: int) -> None:
        (folder / self._version.limit).write_text(str(nbytes))
        with suppress(FileNotFoundError):  # a kernel that does not account for swap
            (folder / self._version.swap).write_text("0" if self._version.swap_is_beside else str(nbytes))

    def peaks(self) -> list[int]:
        """Return the most bytes that each group has been charged for at once."""
        return [int((folder / self._version.peak).read_text()) for folder in self._folders]

    def killed(self) -> list[bool]:
        """Tell of each group whether the kernel has killed a process for its limit."""
        lines = [dict(line.split() for line in (folder / self._version.kills).read_text().splitlines()) for folder in self._folders]
        return [int(line["oom_kill"]) > 0 for line in lines]

    def close(self) -> None:
        for folder in self._folders:
            _remove(folder)

    def __enter__(self) -> MemoryGroups:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def missing_feature() -> str | None:
    """Return what keeps this machine from having such groups, or None."""
    try:
        with MemoryGroups(1, 64 << 20) as groups:
            groups.peaks()
            subprocess.run(["sh", "-ec", 'echo 0 >"$0"', f"{groups.prefix}0/cgroup.procs"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"this machine does not let us make control groups of memory: {error}"
    return None


def _parent() -> tuple[Path, Version]:
    """Return the folder in which groups can be made: this process's own group, or in version 2 the nearest above that passes memory on."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    for _, point, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return _own(Path(point), paths.get("memory", "/")), VERSION_1
        if kind == "cgroup2":
            own = _own(Path(point), paths.get("", "/"))
            for folder in (own, *own.parents):
                with suppress(FileNotFoundError):
                    if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                        return folder, VERSION_2
    raise FileNotFoundError("no mounted hierarchy that passes the controller `memory` on to new groups")


def _own(mount: Path, path: str) -> Path:
    """Return this process's group; a container may see its own as the root without being told its path."""
    own = mount / path.lstrip("/")
    return own if own.is_dir() else mount


def _remove(folder: Path) -> None:
    """Kill what is in a group and remove it."""
    deadline = time.monotonic() + EMPTY_S
    while folder.is_dir():
        for pid in _processes(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _processes(folder: Path) -> Iterator[int]:
    yield from map(int, (folder / "cgroup.procs").read_text().split())


def _sweep(parent: Path) -> None:
    """Remove the groups of test processes that are no more."""
    for folder in parent.glob(f"{NAME}*"):
        if not Path("/proc", folder.name.removeprefix(NAME).partition("-")[0]).exists():
            _remove(folder)
